"""The table of families: what it says of one that holds, and of one that is not read."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.run.verify import Difference
from graphwright.tools.bench import families
from graphwright.tools.bench.family_models import FAMILIES, Family


def test_there_are_at_least_ninety() -> None:
    assert len(FAMILIES) >= 90
    assert len({(f.model, str(f.sizes)) for f in FAMILIES.values()}) == len(FAMILIES)


def test_a_family_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--only", "gpt-neox", "--markdown"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| gpt-neox"))
    loads, blocks, attention, linears, quantized, exact, cache = row.strip("| ").split(" | ")[1:]
    assert (loads, blocks, attention, linears, quantized) == ("yes", "2", "2", "9 of 9", "9 of 9")
    assert 0 < float(exact) < 1e-5 and 0 < float(cache) < 1e-5
    assert "load 1 of 1, counted right 1 of 1, every linear quantized 1 of 1" in text


def test_what_does_not_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Family("BertModel", "BertConfig", {"num_hidden_layers": 1, "hidden_act": "nothing"})
    row = families.judge("broken", Family("BertModel", "BertConfig", FAMILIES["bert"].sizes,
                                          blocks=(3,)))  # fmt: skip
    assert (row.loads, row.blocks, row.counted) == (True, "2, not 3", False)
    row = families.judge("broken", broken)
    assert not row.loads and "KeyError" in row.words[0]
    monkeypatch.setattr(families, "difference", lambda *_: Difference(0.5, 0.5, 1.0, 1.0))
    assert families.judge("bert", FAMILIES["bert"]).wrong


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--only", "lama"]) == 2
    assert "no family 'lama'; did you mean llama" in capsys.readouterr().err
    assert torch.is_grad_enabled()

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
    """One whose keys change behind 8 tokens: what it writes reads its text again there."""
    assert families.main(["--only", "phi3-longrope", "--markdown"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| phi3-longrope"))
    *counts, exact, cache, depth, text_ = row.strip("| ").split(" | ")[1:]
    assert (*counts, text_) == ("yes", "2", "2", "9 of 9", "9 of 9", "equal")
    assert all(0 < float(gap) < 1e-5 for gap in (exact, cache, depth))
    assert "load 1 of 1, counted right 1 of 1, every linear quantized 1 of 1" in text


def test_what_does_not_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Family("BertModel", "BertConfig", {"num_hidden_layers": 1, "hidden_act": "nothing"})
    row = families.judge("broken", broken)
    assert not row.loads and "KeyError" in row.words[0]
    monkeypatch.setattr(families, "difference", lambda *_: Difference(0.5, 0.5, 1.0, 1.0))
    row = families.judge("broken", Family("BertModel", "BertConfig", FAMILIES["bert"].sizes,
                                          blocks=(3,)))  # fmt: skip
    assert (row.loads, row.blocks, row.counted) == (True, "2, not 3", False) and row.wrong


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--only", "lama"]) == 2
    assert "no family 'lama'; did you mean llama" in capsys.readouterr().err
    assert torch.is_grad_enabled()

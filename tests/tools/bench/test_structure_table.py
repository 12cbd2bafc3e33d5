"""The table of what is recognised: what it prints, and that it fails where something is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from graphwright.tools.bench.structure_table import (
    COLUMNS,
    FAMILIES,
    Facts,
    Row,
    cells,
    main,
    problems,
)


def test_families_with_images_and_with_a_flattened_stream(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["opt", "clip", "llava", "--markdown"]) == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(COLUMNS)
    assert set(rule) == set("|- ")
    by_family = {line.split("|")[1].strip(): line for line in rows}
    assert list(by_family) == ["opt", "clip", "llava"]
    assert "| 2 | 4 / 4 x 8 | q k v o fc1 fc2 | head | - | 2 of 2 | yes |" in by_family["opt"]
    assert "4x4 patches, CLS" in by_family["clip"]
    assert "| 2 + 2 | 4 / 4 x 8, 4 / 2 x 8 | q k v o gate up down |" in by_family["llava"]
    assert "2 linears project, 16 tokens enter before block 2" in by_family["llava"]


def test_a_family_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lama"]) == 2
    assert "no family 'lama'" in capsys.readouterr().err


SEEN = Facts(
    blocks=(2,),
    attention=((4, 2, 8), (4, 2, 8)),
    linears=(*((f"{i}.{r}", r, i) for i in (0, 1) for r in FAMILIES["llama"].roles),
             ("head", "head", None)),
    slots=(True, True),
)  # fmt: skip


def test_what_is_wrong_is_said() -> None:
    family = FAMILIES["llama"]
    assert problems(family, SEEN) == []
    for facts, message in (
        (replace(SEEN, blocks=(1, 1)), "(1, 1) blocks, the model has (2,)"),
        (replace(SEEN, attention=SEEN.attention[:1]), "1 attention sites in 2 blocks"),
        (replace(SEEN, attention=((4, 4, 8),) * 2), "attention of (4, 4, 8)"),
        (replace(SEEN, linears=SEEN.linears[1:]), "block 0 has down 1"),
        (replace(SEEN, linears=SEEN.linears[:-1]), "outside of blocks nothing"),
        (replace(SEEN, slots=(True, False)), "cache slots at (True, False)"),
    ):
        assert any(message in text for text in problems(family, facts)), message


def test_what_is_not_recognised_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"llama": Row("llama", SEEN, ("FX and ONNX differ",)),
            "vit": Row("vit", None, ("no block is recognised",))}  # fmt: skip
    monkeypatch.setattr("graphwright.tools.bench.structure_table.examine", rows.__getitem__)
    assert main(["llama", "vit"]) == 1
    out = capsys.readouterr().out
    assert "llama: FX and ONNX differ" in out and "vit: no block is recognised" in out
    assert cells(rows["vit"])[1] == "not recognised" and cells(rows["llama"])[-1] == "no"
    assert len(cells(rows["vit"])) == len(COLUMNS)

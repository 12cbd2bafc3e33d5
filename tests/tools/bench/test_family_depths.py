"""The table of depth by family: what is tried, and that it fails where something differs."""

from __future__ import annotations

from pathlib import Path as Folder
from typing import Any

import pytest
from graphwright.ir.core.errors import Refusal
from graphwright.ir.moves import Path
from graphwright.tools.bench import family_depths
from graphwright.tools.bench.family_depths import COLUMNS, Row, deeper, main, names
from graphwright.tools.bench.family_models import FAMILIES


def test_there_are_two_layers_of_each_kind_and_more() -> None:
    sizes = {name: deeper(FAMILIES[name]).sizes for name in ("llama", "bamba", "lfm2-vl", "gemma4")}
    assert sizes["llama"]["num_hidden_layers"] == 4
    assert sizes["bamba"]["attn_layer_indices"] == [1, 3]
    text = sizes["lfm2-vl"]["text_config"]
    assert text["layer_types"] == ["conv", "full_attention"] * 2
    assert sizes["gemma4"]["num_hidden_layers"] == 4, "of which two are alike already"
    assert {"qwen3.5-vl", "deepseek-v3"} < set(names()) and not {"t5", "bert"} & set(names())


def test_what_differs_fails_and_what_is_refused_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts: dict[str, Any] = {"0": "equal", "1": Refusal("no reason"), "2": "off by 1", "3": 3}

    def compared(_view: Any, _library: Any, path: Path, _folder: Folder) -> str:
        verdict = verdicts[str(path)]
        if isinstance(verdict, Refusal):
            raise verdict
        return str(verdict.strip())

    def judge(name: str, _family: Any) -> Row:
        row, folder = Row(name), Folder()
        for paths in (["0"], ["0", "1"], ["0", "2"], ["3"], [None]):
            given = [None if path is None else Path.parse(path) for path in paths]
            row.cells.append(family_depths._tried(row, None, None, given, folder))  # type: ignore[arg-type]
        return row

    monkeypatch.setattr(family_depths, "_compared", compared)
    monkeypatch.setattr(family_depths, "judge", judge)
    assert main(["--only", "llama", "--markdown"]) == 1
    head, _, row, *words = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == list(COLUMNS)
    assert "| equal | 1 equal, 1 refused | 1 equal, 1 DIFFERENT | not judged | no halves" in row
    assert any("path 1: no reason" in line for line in words)
    assert any("path 2: off by 1" in line for line in words)
    assert main(["--only", "lama"]) == 2

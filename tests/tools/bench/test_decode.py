"""The bench of decoding: steps of a small decoder, and a peer that answers as onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path

import graphwright as gw
import pytest
from graphwright.tools.bench import decode
from graphwright.tools.bench.decode import Step, steps, texts

PEER = """#!/bin/sh
while read prompt tokens vocabulary; do
  case "$3" in *other) last=9 ;; *) last=$vocabulary ;; esac
  echo "[$prompt, $tokens, [7, 8, $last]]"
done
"""
"""Gets ``-c``, what it is to run, the folder and the threads."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = gw.export(gw.load("zoo:tiny-llama"), tmp_path_factory.mktemp("made") / "out")
    sizes = {"vocab_size": 21, "decoder": {"head_size": 16}}
    (out / "genai_config.json").write_text(json.dumps({"model": sizes}))
    return out


def test_a_step_follows_a_cache(folder: Path) -> None:
    step = Step(folder, threads=1)
    for past in (3, 11):
        step.prepare(past)
        cache = next(v for k, v in step._feeds.items() if k.startswith("past"))
        assert cache.shape()[2] == past and step.run() > 0
    times = steps([folder], [3, 11], threads=2, rounds=1, repeats=1)
    assert list(times[folder]) == [3, 11] and min(times[folder].values()) > 0


def test_texts_are_compared_with_the_first(folder: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PEER)
    python.chmod(0o755)
    other = tmp_path / "other"
    other.mkdir()
    (other / "genai_config.json").write_text((folder / "genai_config.json").read_text())
    by_folder = texts([folder, other], [5], python=str(python), threads=1, rounds=2, tokens=2)
    assert by_folder == {folder: {5: (5, 2, [7, 8, 21])}, other: {5: (5, 2, [7, 8, 9])}}
    table = decode._text_table(by_folder, 2)
    assert list(table.columns[2].cells) == ["3 of 3", "2 of 3"]


def test_the_tables_and_a_folder_without_a_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--past", "3", "--rounds", "1", "--repeats", "1"]
    assert decode.main([str(folder), *arguments]) == 0
    assert "past 3" in capsys.readouterr().out
    assert decode.main([str(tmp_path), *arguments]) == 3
    assert "model.onnx is not there" in capsys.readouterr().err

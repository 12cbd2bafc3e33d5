"""A folder that another tool quantized, and ``--original``: as a person types it, and again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.zoo.text import english_sentences
from graphwright.tools.cli.main import main
from graphwright.tools.evaluate.task import silent
from graphwright.tools.formats.convert import convert
from graphwright.tools.run.replay import replay


def test_eora_on_a_quantized_folder(
    language_model: Path, publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, words = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(language_model, model)
    words.write_text("\n".join(english_sentences(60)))
    rounded = gw.optimize(gw.load(model, cache=False), "quantize{bits=3 group=16}")
    gw.export(rounded.graph, tmp_path / "rounded", report=rounded.report)
    convert(tmp_path / "rounded", "compressed-tensors", tmp_path / "quantized")
    data = ("--calib", str(words))
    recipe = "eora{rank=64 factors=float32}"
    artifact = publish(str(tmp_path / "quantized"), recipe, "--original", str(model), *data)
    known = json.loads((artifact / "graphwright.json").read_text())
    assert known["original"]["name"] == str(model)
    assert known["original"]["sha256"] and known["original"]["beside"]
    # The artifact is a graph: its config tells of no tensors of another format.
    assert "quantization_config" in json.loads((tmp_path / "quantized/config.json").read_text())
    assert "quantization_config" not in json.loads((artifact / "config.json").read_text())
    ids = torch.arange(3, 13)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, actual, before = (
        gw.compile(gw.load(name, cache=False if name != artifact else None))(**inputs)["logits"]
        for name in (model, artifact, tmp_path / "quantized")
    )
    # A path of every rank makes the original of it, in ONNX Runtime.
    assert torch.linalg.norm(before - expected) > 0.05 * torch.linalg.norm(expected)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    assert replay(artifact, None, silent)["identical"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": 1}))
    with pytest.raises(BadInput, match="model has changed: its hash was"):
        replay(artifact, None, silent)
    with pytest.raises(SystemExit) as ending:
        main([str(model), "-p", "quantize", "--original", str(model), "-o", str(tmp_path / "x")])
    assert ending.value.code == 2
    assert "is for passes that close the gap to it" in capsys.readouterr().err

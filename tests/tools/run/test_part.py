"""``--part``: one graph of an encoder-decoder, as the artifact's manifest tells."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.evaluate.task import silent
from graphwright.tools.run.pipeline import Request, dry_run
from graphwright.tools.run.replay import replay


def test_a_part_is_taken_told_and_repeated(publish: Any, tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    save(FAMILIES["t5"], tmp_path / "t5")
    artifact = publish(tmp_path / "t5", "clean", "--part", "encoder")
    assert json.loads((artifact / "graphwright.json").read_text())["source"]["part"] == "encoder"
    ids = torch.arange(3, 13).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    with torch.no_grad():
        expected = encoder(**inputs).last_hidden_state
    outputs = gw.compile(artifact)(**inputs)
    assert outputs.keys() == {"last_hidden_state"}
    torch.testing.assert_close(outputs["last_hidden_state"], expected)
    assert replay(artifact, None, silent)["identical"]
    request = Request(str(tmp_path / "t5"), gw.Recipe.parse("clean"), None, part="encodr")
    with pytest.raises(BadInput, match="no part 'encodr'; did you mean encoder"):
        dry_run(request)

"""The examples run, and give what they say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import graphwright as gw
import pytest
from graphwright.ir.load.zoo import minilm, text, tiny_llama, tiny_vision
from graphwright.tools.examples import (
    any_size,
    onnx_file,
    own_pass,
    pruned_vision,
    sentence_encoder,
    text_model,
)
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of two rows to check on: the examples are run, not the models measured."""
    for zoo in (minilm, tiny_llama, tiny_vision):
        monkeypatch.setattr(zoo, "SAMPLE_COUNT", 4)
        monkeypatch.setattr(zoo, "SAMPLE_BATCH", 2)


def first_layers(folder: Path, to: Path, count: int) -> Path:
    """A model's folder again, with so many of its layers: to trace all of them takes longest."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    layers = re.compile(r"model\.layers\.(\d+)\.")
    tensors = load_file(to / "model.safetensors")
    rest = {n: t for n, t in tensors.items() if not (m := layers.match(n)) or int(m[1]) < count}
    save_file(rest, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_sentence_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence_encoder.main(tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").is_file()
    assert "sentence_embedding: cosine 0.999" in capsys.readouterr().out


def test_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_llama, "SHIPPED", first_layers(text.SHIPPED, tmp_path / "two", 2))
    assert len(text_model.main(tmp_path / "out").split()) > 10


def test_pruned_vision(tmp_path: Path) -> None:
    assert pruned_vision.main(tmp_path / "out") == "1"
    assert Image.open(tmp_path / "out.png").size == (96, 96)


def test_own_pass() -> None:
    clip, quantize = own_pass.main().report.passes
    assert len(clip.result.sites) == len(quantize.result.sites) == 37
    assert 0.01 < max(site.rel_l2 or 0.0 for site in clip.result.sites) < 0.2
    with pytest.raises(gw.BadInput, match="sigmas=0 must be above 0"):
        own_pass.Clip(sigmas=0)


def test_onnx_file(tmp_path: Path) -> None:
    before, after = onnx_file.main(tmp_path / "out")
    assert after < 0.2 * before


def test_any_size(tmp_path: Path) -> None:
    errors = any_size.main(tmp_path / "out")
    assert len(errors) == 3 and sorted(errors.values()) == [*errors.values()]

"""Encoder-decoders: the exported parts write what the library's greedy decoding writes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.backends.artifacts.pair import export_pair
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.quiet import quiet
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.passes.manager import optimize
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.evaluate.seq2seq import Seq2Seq
from safetensors.torch import load_file, save_file

transformers: Any = importlib.import_module("transformers")
PARTS = ("encoder", "decoder", "decoder_with_past")
NEW = 8

Parts = dict[str, View]


def source_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator)}
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def saved(name: str, folder: Path) -> Path:
    """A family's model with larger weights: small ones write one word over and over."""
    save(FAMILIES[name], folder)
    path = folder / "model.safetensors"
    tensors = {key: 4 * tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Parts]]:
    """A family's folder and its parts, loaded once."""

    @functools.cache
    def load_parts(name: str) -> tuple[Path, Parts]:
        folder = saved(name, tmp_path_factory.mktemp(name) / "model")
        return folder, {part: load(folder, part=part) for part in PARTS}

    return load_parts


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_the_parts_write_what_the_library_writes(name: str, loaded: Any, tmp_path: Path) -> None:
    folder, parts = loaded(name)
    out = export_pair(parts, tmp_path / "out")
    assert {p.name for p in out.glob("*.onnx")} == {f"{part}_model.onnx" for part in PARTS}
    cls = getattr(transformers, FAMILIES[name].model)
    with quiet():
        model = cls.from_pretrained(folder).eval()
    start, source = model.config.decoder_start_token_id, source_of(name)
    text = torch.full((2, 1), start)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=text, use_cache=False).logits
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(Seq2Seq(out).greedy(source, start, max_new_tokens=NEW), text)
    assert len(set(text[:, 1:].flatten().tolist())) > 1, "a text of one word would prove little"


def test_a_row_that_has_ended_is_padded(loaded: Any, tmp_path: Path) -> None:
    _, parts = loaded("t5")
    graphs = {p: optimize(v, "quantize{bits=8 group=32}").graph for p, v in parts.items()}
    run = Seq2Seq(export_pair(graphs, tmp_path / "out"))
    source = source_of("t5")
    text = run.greedy(source, 0, max_new_tokens=NEW)
    end = int(text[0, 2])
    ended = run.greedy(source, 0, max_new_tokens=NEW, eos=(end,), pad=5)
    last = text[0].tolist().index(end, 1)
    assert ended[0, : last + 1].tolist() == text[0, : last + 1].tolist()
    assert set(ended[0, last + 1 :].tolist()) <= {5}


def test_what_is_no_part_is_refused(tmp_path: Path) -> None:
    save(FAMILIES["t5"], tmp_path / "t5")
    with pytest.raises(BadInput, match="no part 'encodr'; did you mean encoder"):
        load(tmp_path / "t5", part="encodr")
    save(FAMILIES["bert"], tmp_path / "bert")
    with pytest.raises(BadInput, match="BertModel is not an encoder-decoder"):
        load(tmp_path / "bert", part="encoder")
    with pytest.raises(BadInput, match="part is for the folders of encoder-decoders"):
        load("zoo:tiny-llama", part="encoder")
    with pytest.raises(BadInput, match="the parts are encoder, decoder, decoder_with_past, not"):
        export_pair({}, tmp_path / "out")
    with pytest.raises(Missing, match=r"encoder_model\.onnx: no such file"):
        Seq2Seq(tmp_path)

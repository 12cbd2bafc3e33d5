"""Layers that read from beside their stream (Gemma 4 E2B), which may be several (Gemma 3n): inputs
of their own for each token, and the keys of an earlier layer. Left out and run again as the
library's model does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View, is_value
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path, follow
from graphwright.ir.moves.bypass_blocks import refusals
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import last_tower, recognize
from graphwright.ir.structure.units import whole
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

from .test_bypass_states import STEPS, greedy

TYPES = ["sliding_attention", "full_attention", "full_attention"]
SHARED = {"num_hidden_layers": len(TYPES), "layer_types": TYPES, "num_kv_shared_layers": 1}
SIZES: dict[str, dict[str, Any]] = {
    "gemma4-e2b": SHARED,
    "gemma3n": SHARED | {
        "intermediate_size": [64] * 3, "activation_sparsity_pattern": [0.5, 0.0, 0.0]},
}  # fmt: skip
"""The last of three layers looks at the keys of the second."""
NAMES = tuple(SIZES)
CASES = (("gemma4-e2b", "fx"), ("gemma4-e2b", "onnx"), ("gemma3n", "fx"))
Models = dict[str, tuple[Any, dict[str, View]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The library's models, and their raised graphs."""
    return {name: _made(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def _made(name: str, folder: Folder) -> tuple[Any, dict[str, View]]:
    import transformers

    save(replace(FAMILIES[name], sizes={**FAMILIES[name].sizes, **SIZES[name]}), folder)
    library: Any = getattr(transformers, FAMILIES[name].model).from_pretrained(folder).eval()
    if name == "gemma4-e2b":  # whose layers scale the stream
        for place, layer in enumerate(library.model.layers):
            layer.layer_scalar.fill_(0.75 + 0.1 * place)
        library.save_pretrained(folder)
    fx = load(folder, cache=True)
    views: dict[str, View] = {"fx": fx}
    if (name, "onnx") in CASES:
        views["onnx"] = translated(fx)
    for view in views.values():
        canonicalize(view)
    return library, views


@contextmanager
def run_times(layers: Any, counts: list[int]) -> Iterator[None]:
    """Each of the layers so often."""
    def repeated(own: Any, count: int) -> Any:
        def forward(stream: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            for _ in range(count):
                stream = own(stream, *args, **options)
            return stream
        return forward

    for layer, count in zip(layers, counts, strict=True):
        layer.forward = repeated(layer.forward, count)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@pytest.mark.parametrize("path", [(0, 1), (0, 1, 2, 2), (0,)], ids=str)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_path_writes_as_the_librarys_model_does(
    name: str, path: tuple[int, ...], kind: str, models: Models
) -> None:
    library, views = models[name]
    view = views[kind].copy()
    follow(view, last_tower(recognize(view)), Path.of(path), rule="path")
    check_structure(view)
    ids, mask = torch.tensor([[5, 17, 60, 2, 7, 8], [0, 0, 9, 3, 4, 4]]), torch.ones(2, 6).long()
    mask[1, :2] = 0
    tokens, logits = greedy(view, ids, mask)
    every = torch.cat([mask, torch.ones(2, STEPS).long()], 1)
    counts = [path.count(layer) for layer in range(len(TYPES))]
    with run_times(library.model.layers, counts), torch.no_grad():
        expected = library(tokens, attention_mask=every, use_cache=False).logits
    torch.testing.assert_close(logits, expected[:, -STEPS - 1 : -1], rtol=1e-4, atol=1e-4)
    pasts = [name for name in view.input_names() if name.startswith("past")]
    assert len(pasts) == 2 * len(set(path) - {2})  # the layer at the end has no keys of its own


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_what_scales_the_stream_is_of_its_layer(kind: str, models: Models) -> None:
    """The last one's too, behind which there is but a norm that knows no scale."""
    view = models["gemma4-e2b"][1][kind]
    for number, block in enumerate(last_tower(recognize(view))):
        scale = view.operands(view.maker(block.exit))
        named = [view.name(operand) for operand in scale if is_value(operand)]
        assert f"model.layers.{number}.layer_scalar" in named


@pytest.mark.parametrize("name", NAMES)
def test_what_makes_the_inputs_of_all_layers_is_of_none(name: str, models: Models) -> None:
    for view in models[name][1].values():
        structure = recognize(view)
        (linear,) = (x for x in structure.linears if x.name.endswith("per_layer_model_projection"))
        assert linear.block is None
        assert not any(linear.name in block.linears for block in structure.blocks)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_layer_whose_keys_others_read_stays(name: str, kind: str, models: Models) -> None:
    view = models[name][1][kind]
    reasons = refusals(view, whole(last_tower(recognize(view))))
    for number, reason in enumerate(reasons):
        needed = f"layers behind block {number} attend over its keys and values"
        assert reason.startswith(needed) == (number == 1)
    assert not reasons[-1]

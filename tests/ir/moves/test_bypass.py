"""Blocks left out and run through again, on both graph kinds, against the model's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Refusal
from graphwright.ir.core.types import Dim, Type
from graphwright.ir.core.view import Origin, View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.moves import Path, bypass, follow
from graphwright.ir.moves.bypass_blocks import is_one_stream
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import in_halves, whole

from ... import models as small_models

OWNERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "llama": (lambda m: m.model.model, "layers"),
    "gemma2": (lambda m: m.model.model, "layers"),
    "gpt2": (lambda m: m.model.transformer, "h"),
    "opt": (lambda m: m.model.model.decoder, "layers"),
    "bert": (lambda m: m.model.encoder, "layer"),
    "t5_encoder": (lambda m: m.model.encoder, "block"),
    "clip_vision": (lambda m: m.model.vision_model.encoder, "layers"),
}
"""Where each model keeps its layers: the module, and its attribute."""
KINDS = ("fx", "onnx")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """By name: the small model of three layers, and its raised graphs by kind."""
    by_name: dict[str, Any] = {}
    for name in OWNERS:
        small = getattr(small_models, name)(layers=3)
        by_name[name] = small, small_models.raised(small)
    return by_name


@contextmanager
def layers(small: Any, name: str, path: tuple[int, ...]) -> Iterator[None]:
    """Within it the eager model runs through its layers as the path says."""
    get, attribute = OWNERS[name]
    owner = get(small.module)
    own = getattr(owner, attribute)
    configs = {id(c): c for c in (owner.config, small.module.model.config)}.values()
    counts = [(c, n, getattr(c, n)) for c in configs for n in COUNTS if hasattr(c, n)]
    kinds = getattr(owner.config, "layer_types", None)
    setattr(owner, attribute, torch.nn.ModuleList([own[i] for i in path]))
    for config, count, _ in counts:
        setattr(config, count, len(path))
    if kinds is not None:  # the model takes a layer's mask by its place
        owner.config.layer_types = [kinds[i] for i in path]
    try:
        yield
    finally:
        setattr(owner, attribute, own)
        if kinds is not None:
            owner.config.layer_types = kinds
        for config, count, number in counts:
            setattr(config, count, number)


def eager(small: Any, name: str, path: tuple[int, ...]) -> list[torch.Tensor]:
    with layers(small, name, path), torch.no_grad():
        out = small.module(**small.inputs)
    return list(out.values()) if isinstance(out, dict) else [out]


def assert_same(view: View, small: Any, expected: list[torch.Tensor]) -> None:
    check_structure(view)
    for actual, tensor in zip(sweep(view, small.inputs).values(), expected, strict=True):
        torch.testing.assert_close(actual, tensor, rtol=1e-4, atol=1e-5)


PATHS = [(0, 2), (0, 1), (0,), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 0, 1, 2), (0, 2, 2, 0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "path"),
    [(n, p) for n in OWNERS for p in PATHS[:: 1 if n in ("llama", "bert") else 3]],
    ids=str,
)
def test_a_path_equals_the_models_own_layers(
    name: str, path: tuple[int, ...], kind: str, models: Any
) -> None:
    small, views = models[name]
    view = views[kind].copy()
    structure = recognize(view)
    assert [b.tower for b in structure.blocks] == [0, 0, 0]
    follow(view, structure.blocks, Path.of(path), rule="path", step=3)
    assert_same(view, small, eager(small, name, path))
    assert len(recognize(view).blocks) == len(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_first_block_can_go(name: str, kind: str, models: Any) -> None:
    small, views = models[name]
    view = views[kind].copy()
    bypass(view, whole(recognize(view).blocks)[0], rule="drop-blocks")
    assert_same(view, small, eager(small, name, (1, 2)))
    assert len(recognize(view).blocks) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWNERS)
def test_every_block_once_changes_nothing(name: str, kind: str, models: Any) -> None:
    small, views = models[name]
    view = views[kind].copy()
    nodes = [view.name(n) for n in view.nodes()]
    follow(view, recognize(view).blocks, Path.of((0, 1, 2)), rule="path")
    assert [view.name(n) for n in view.nodes()] == nodes
    for a, b in zip(sweep(views[kind], small.inputs).values(),
                    sweep(view, small.inputs).values(), strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_leave_with_a_block_and_are_shared_by_copies(kind: str, models: Any) -> None:
    view = models["llama"][1][kind].copy()
    names = set(view.weights())
    follow(view, recognize(view).blocks, Path.of((0, 2, 2)), rule="path")
    gone = {n for n in names - set(view.weights()) if "weight" in n}
    assert gone == {n for n in names if ".layers.1." in n and "weight" in n}
    assert set(view.weights()) <= names
    copies = [n for n in view.nodes() if _origin(view, n) == Origin("path")]
    assert copies and all(_origin(view, n).rule == "path" for n in copies)


def _origin(view: View, node: Any) -> Any:
    if view.kind == "fx":
        return node.meta.get("graphwright")
    rule = node.metadata_props.get("graphwright.rule")
    return Origin(rule, int(node.metadata_props["graphwright.pass"])) if rule else None


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_block_can_go(kind: str, models: Any) -> None:
    small, views = models["llama"]
    view = views[kind].copy()
    mlp = in_halves(recognize(view).blocks)[3]
    bypass(view, mlp, rule="drop")
    down = small.module.model.model.layers[1].mlp.down_proj
    kept = down.weight.detach().clone()
    with torch.no_grad():
        down.weight.zero_()
        expected = eager(small, "llama", (0, 1, 2))
        down.weight.copy_(kept)
    assert_same(view, small, expected)
    assert not any(".layers.1.mlp." in name for name in view.weights())


# --- refusals -------------------------------------------------------------------------------------


def test_a_path_prints_as_it_is_read() -> None:
    for text in ("0-3,3,5-11", "0", "2,2,2", "0-1,0-1", "0-3,5.attn,7-11", "0-2.mlp,3.attn,3"):
        assert str(Path.parse(text)) == text
    assert Path.parse("0-1,1,3.mlp").steps == ((0, ""), (1, ""), (1, ""), (3, "mlp"))
    assert str(Path.of((0, 1, 2, 3, 5))) == "0-3,5"
    no_block = "is not a block"
    for text, reason in (("", no_block), ("0-", no_block), ("a", f"'a' {no_block}"),
                         ("3-1", "goes backwards"), ("1,,2", no_block),
                         ("1.ffn", no_block)):  # fmt: skip
        with pytest.raises(BadInput, match=reason):
            Path.parse(text)


def test_blocks_that_are_not_there_or_move_forward(models: Any) -> None:
    view = models["llama"][1]["fx"].copy()
    blocks = recognize(view).blocks
    with pytest.raises(BadInput, match="there is no block 3; there are 0 to 2"):
        follow(view, blocks, Path.of((0, 3)), rule="path")
    with pytest.raises(Refusal, match="block 1 comes first after a later one"):
        follow(view, blocks, Path.of((0, 2, 1)), rule="path")
    with pytest.raises(Refusal, match=r"block 1\.attn comes first after a later one"):
        follow(view, blocks, Path.parse("0,1.mlp,1.attn"), rule="path")


class Peeking(torch.nn.Module):
    """Two attention blocks; the output also takes a value from inside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = x
        for linear in (self.first, self.second):
            inner = linear(x)
            x = x + torch.nn.functional.scaled_dot_product_attention(inner, inner, inner)
        return x, inner


def test_a_value_that_is_needed_elsewhere() -> None:
    view = trace(Peeking().eval(), torch.randn(2, 3, 8))
    canonicalize(view)
    blocks = whole(recognize(view).blocks)
    assert len(blocks) == 2
    before = [view.name(n) for n in view.nodes()]
    with pytest.raises(Refusal, match=r"returns .* from inside block 1"):
        bypass(view, blocks[1], rule="drop")
    assert [view.name(n) for n in view.nodes()] == before
    bypass(view, blocks[0], rule="drop")
    assert len(recognize(view).blocks) == 1


class Sharing(torch.nn.Module):
    """Three layers; in the last one what the one before attends with is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = torch.zeros(8)
        for place, linear in enumerate(self.layers):
            inner = linear(x)
            keys = inner if place == 1 else keys
            x = x + torch.nn.functional.scaled_dot_product_attention(inner, inner, inner)
            x = x + torch.relu(x + keys if place == 2 else x)
        return x


def test_a_path_that_breaks_a_tie_across_layers() -> None:
    """The block that another one reads from can neither leave nor run twice; others can."""
    view = trace(Sharing().eval(), torch.randn(2, 3, 8))
    canonicalize(view)
    blocks = recognize(view).blocks
    for path in ((0, 2), (0, 1, 1, 2)):
        with pytest.raises(Refusal, match=r"reads a value from inside block 1"):
            follow(view, blocks, Path.of(path), rule="path")
    follow(view, blocks, Path.of((1, 2)), rule="path")
    assert len(recognize(view).blocks) == 2


MADE_UP = [
    (("batch", "tokens", 32), ("unk__2", "unk__3", 32), True),
    (("batch", "?", 32), ("batch", "unk__3", 32), True),
    (("batch", "tokens", 32), ("batch", "past + tokens", 32), False),
    (("batch", "unk__1", 32), ("batch", 5, 32), False),
    (("batch", "tokens", 32), ("batch", "tokens", "unk__1"), False),
    (("batch", "tokens", 32), ("tokens", 32), False),
]


@pytest.mark.parametrize(("entry", "leaving", "same"), MADE_UP)
def test_sizes_by_names_that_no_input_has_are_not_told_apart(
    entry: tuple[Dim, ...], leaving: tuple[Dim, ...], same: bool
) -> None:
    class Three(torch.nn.Module):
        def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
            return x.sum() + past.sum()

    batch, tokens, past = (torch.export.Dim(n) for n in ("batch", "tokens", "past"))
    view = trace(
        Three(), (torch.randn(2, 3, 32), torch.randn(2, 4)),
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: past}),
    )  # fmt: skip
    types = (Type(torch.float32, shape) for shape in (entry, leaving))
    assert is_one_stream(view, *types) is same

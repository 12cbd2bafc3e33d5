"""Blocks left out and run through again in graphs with a cache: slots leave, multiply, renumber."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import InvalidGraph
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path, bypass, follow
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.cache_slots import PARTS, SLOTS_KEY, past_name, present_name
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import in_halves, whole

from ... import models as small_models
from .test_bypass import OWNERS, layers

KINDS = ("fx", "onnx")
MODELS = ("llama", "gemma2", "gpt2")
STEPS = 16
PATHS = [(1, 2), (0, 2), (0, 1), (0,), (0, 1, 1, 2), (0, 2, 2), (0, 1, 0, 1, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the small model of three layers, and its raised graphs with a cache by kind."""
    by_name: dict[str, Any] = {}
    for name in MODELS:
        small = getattr(small_models, name)(layers=3)
        folder = tmp_path_factory.mktemp(name)
        small.module.model.save_pretrained(folder)
        fx = load(folder, cache=True)
        views: dict[str, View] = {"fx": fx, "onnx": translated(fx)}
        for view in views.values():
            canonicalize(view)
        by_name[name] = small, views
    return by_name


def greedy(view: View, prompts: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """What the graph writes by its cache, and the logits of every step ``[steps, rows, words]``."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    state: dict[str, torch.Tensor] = {}
    steps, tokens = [], []
    for _ in range(STEPS):
        outputs = sweep(view, {"input_ids": ids, "attention_mask": mask, **state})
        steps.append(outputs.pop("logits")[:, -1])
        ids = steps[-1].argmax(-1, keepdim=True)
        tokens.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        state = {name.replace("present", "past_key_values"): t for name, t in outputs.items()}
    return torch.cat(tokens, 1).tolist(), torch.stack(steps)


def assert_slots(view: View, path: tuple[int, ...]) -> None:
    """Slots numbered densely in the order of the path, recognised where they are."""
    slots = range(len(path))
    pasts = [past_name(slot, part) for slot in slots for part in PARTS]
    presents = [present_name(slot, part) for slot in slots for part in PARTS]
    assert view.input_names() == ("input_ids", "attention_mask", *pasts)
    assert view.output_names() == ("logits", *presents)
    assert json.loads(view.metadata()[SLOTS_KEY]) == list(path)
    inputs = dict(zip(view.inputs(), view.input_names(), strict=True))
    outputs = dict(zip(view.outputs(), view.output_names(), strict=True))
    for slot, site in zip(slots, recognize(view).attentions, strict=True):
        assert site.cache is not None
        assert [inputs[v] for v in site.cache.past] == pasts[2 * slot : 2 * slot + 2]
        assert [outputs[v] for v in site.cache.present] == presents[2 * slot : 2 * slot + 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "path"),
    [(n, p) for n in MODELS for p in PATHS[:: 1 if n == "llama" else 3]],
    ids=str,
)
def test_a_path_with_a_cache_equals_the_models_own_layers(
    name: str, path: tuple[int, ...], kind: str, models: Any
) -> None:
    small, views = models[name]
    view = views[kind].copy()
    follow(view, recognize(view).blocks, Path.of(path), rule="path")
    check_structure(view)
    assert_slots(view, path)
    assert_text_of(view, small, name, path)


def assert_text_of(view: View, small: Any, name: str, path: tuple[int, ...]) -> None:
    """The graph writes by its cache what the model's own layers do without one."""
    prompts = [[5, 17, 60, 2], [9]]
    written, logits = greedy(view, prompts)
    for row, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
        ids = torch.tensor([prompt + tokens])
        with layers(small, name, path), torch.no_grad():
            out = small.module(input_ids=ids, attention_mask=torch.ones_like(ids))
        expected = (out["logits"] if isinstance(out, dict) else out)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[:, row], expected, rtol=1e-4, atol=1e-5)
        assert expected.argmax(-1).tolist() == tokens


WITHOUT: dict[str, dict[str, Callable[[Any], Any]]] = {
    "llama": {"attn": lambda b: b.self_attn.o_proj, "mlp": lambda b: b.mlp.down_proj},
    "gpt2": {"attn": lambda b: b.attn.c_proj, "mlp": lambda b: b.mlp.c_proj},
}
"""The last linear of each half: without its numbers the half adds nothing."""


@pytest.fixture(params=list(WITHOUT))
def halved(request: pytest.FixtureRequest, models: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A model whose layer 3 is layer 1 without its feed-forward part, and 4 without attention."""
    name: str = request.param
    get, attribute = OWNERS[name]
    owner = get(models[name][0].module)
    own = getattr(owner, attribute)
    added = []
    for part in ("mlp", "attn"):
        layer = copy.deepcopy(own[1])
        for parameter in WITHOUT[name][part](layer).parameters():
            parameter.data.zero_()
        added.append(layer)
    setattr(owner, attribute, torch.nn.ModuleList([*own, *added]))
    yield name, models[name]
    setattr(owner, attribute, own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "layers_run", "slots"),
    [
        ("0,1.mlp,2", (0, 4, 2), (0, 2)),
        ("0,1.attn,1-2", (0, 3, 1, 2), (0, 1, 1, 2)),
        ("0-1,1.mlp,2", (0, 1, 4, 2), (0, 1, 2)),
        ("0.attn,0.mlp,1.attn,2", (0, 3, 2), (0, 1, 2)),
    ],
)
def test_halves_of_blocks_equal_the_models_own(
    path: str, layers_run: tuple[int, ...], slots: tuple[int, ...], kind: str, halved: Any
) -> None:
    name, (small, views) = halved
    view = views[kind].copy()
    follow(view, recognize(view).blocks, Path.parse(path), rule="path")
    check_structure(view)
    assert_slots(view, slots)
    assert_text_of(view, small, name, layers_run)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_once_changes_nothing(kind: str, models: Any) -> None:
    source = models["llama"][1][kind]
    view = source.copy()
    follow(view, recognize(view).blocks, Path.of((0, 1, 2)), rule="path")
    assert SLOTS_KEY not in view.metadata()
    assert view.input_names() == source.input_names()
    (tokens, logits), (same, expected) = greedy(view, [[3, 4]]), greedy(source, [[3, 4]])
    assert tokens == same and torch.equal(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_kept_over_several_edits(kind: str, models: Any) -> None:
    view = models["llama"][1][kind].copy()
    follow(view, recognize(view).blocks, Path.of((0, 1, 2, 2)), rule="path")
    assert_slots(view, (0, 1, 2, 2))
    bypass(view, whole(recognize(view).blocks)[0], rule="drop-blocks")
    assert_slots(view, (1, 2, 2))
    bypass(view, whole(recognize(view).blocks)[1], rule="drop-blocks")
    assert_slots(view, (1, 2))
    check_structure(view)
    assert not any(".layers.0." in name for name in view.weights())


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_block_takes_its_slot_along(kind: str, models: Any) -> None:
    view = models["llama"][1][kind].copy()
    _, _, attention, mlp, *_ = in_halves(recognize(view).blocks)
    bypass(view, mlp, rule="drop")
    assert_slots(view, (0, 1, 2))
    bypass(view, attention, rule="drop")
    assert_slots(view, (0, 2))
    assert greedy(view, [[3, 4]])[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_slot_leaves(kind: str, halved: tuple[str, Any]) -> None:
    """Masks and positions are sized by a cache: where none stays, by the mask and the tokens."""
    name, (small, views) = halved
    view = views[kind].copy()
    follow(view, recognize(view).blocks, Path.parse("1.mlp"), rule="path")
    check_structure(view)
    assert view.input_names() == ("input_ids", "attention_mask")
    ids = torch.tensor([[5, 17, 60, 2], [9, 3, 4, 4]])
    logits = sweep(view, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
    with layers(small, name, (4,)), torch.no_grad():
        out = small.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = out["logits"] if isinstance(out, dict) else out
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_an_export_takes_the_numbers_along(models: Any) -> None:
    view = models["llama"][1]["fx"].copy()
    follow(view, recognize(view).blocks, Path.of((0, 2, 2)), rule="path")
    onnx = translated(view)
    assert onnx.input_names() == view.input_names()
    assert onnx.output_names() == view.output_names()
    assert onnx.metadata()[SLOTS_KEY] == "[0, 2, 2]"
    assert greedy(onnx, [[3, 4], [7]])[0] == greedy(view, [[3, 4], [7]])[0]


# --- a graph's inputs and outputs -----------------------------------------------------------------


def test_inputs_leave_come_and_change_places(draft: Callable[..., Any]) -> None:
    d = draft(x=(3, 5), y=(5,), z=(3, 5))
    total = d.op("add", d.x, d.z)
    view = d.finish(total)
    with pytest.raises(InvalidGraph, match="is still used"):
        view.set_inputs({"x": d.x})
    assert view.input_names() == ("x", "y", "z")
    new = view.add_input("x.more", d.y)
    assert str(view.type(new)) == "f32[5]"
    view.set_inputs({"z": d.x, "x": d.z, "more": new})
    assert view.input_names() == ("z", "x", "more")
    assert view.inputs() == (d.x, d.z, new)
    view.rewire(view.producer(total), d.z, new)
    check_structure(view)
    a, c = torch.randn(3, 5), torch.randn(5)
    for graph in (view, view.copy()):
        (actual,) = sweep(graph, {"z": a, "x": a, "more": c}).values()
        assert torch.equal(actual, a + c)


def test_outputs_leave_come_and_change_places(draft: Callable[..., Any]) -> None:
    d = draft(outputs=2)
    total, product = d.op("add", d.x, d.y), d.op("mul", d.x, d.y)
    view = d.finish(total, product)
    if view.kind == "onnx":
        view.set_outputs({"out0": total, "out1": product})
    view.set_outputs({"out1": total, "again": total, "out0": product, "given": d.x})
    assert view.output_names() == ("out1", "again", "out0", "given")
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    outputs = sweep(view, {"x": x, "y": y})
    assert torch.equal(outputs["out1"], x + y) and torch.equal(outputs["again"], x + y)
    assert torch.equal(outputs["out0"], x * y) and torch.equal(outputs["given"], x)
    view.set_outputs({"only": view.outputs()[2]})
    assert view.output_names() == ("only",)
    assert list(sweep(view.copy(), {"x": x, "y": y})) == ["only"]
    check_structure(view)

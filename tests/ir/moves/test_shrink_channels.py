"""The move shrink channels: what is zero goes without a trace, in graphs of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.view import View
from graphwright.ir.core.weights import MemoryWeight, Spool
from graphwright.ir.moves import Shrunk, kept_heads, kept_units, shrink_channels
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure, compare
from graphwright.ir.structure.channels import Channels, heads_of, units_of
from graphwright.ir.structure.recognize import Structure, recognize

from ... import models as small_models

NAMES = ("llama", "bert", "gpt2")
SHRINKING = NAMES[:2]
KINDS = ("fx", "onnx")
Models = dict[str, tuple[Any, dict[str, View]]]


@pytest.fixture(scope="module")
def models() -> Models:
    by_name = {}
    for name in NAMES:
        small = getattr(small_models, name)()
        by_name[name] = small, small_models.raised(small)
    return by_name


def heads(view: View, structure: Structure, block: int) -> Channels:
    order = {node: place for place, node in enumerate(view.nodes())}
    linears = {linear.name: linear for linear in structure.linears}
    return heads_of(view, structure.attentions[block], linears, order)


def units(view: View, structure: Structure) -> Channels:
    order = {node: place for place, node in enumerate(view.nodes())}
    linears = {linear.name: linear for linear in structure.linears}
    first = [x for x in structure.linears if x.block == 0 and x.role in ("gate", "up", "fc1")]
    (last,) = (x for x in structure.linears if x.block == 0 and x.role in ("down", "fc2"))
    return units_of(view, first, last, linears, order)


def without(view: View, channels: Channels, columns: Sequence[int]) -> None:
    """Let the sink take nothing from some columns."""
    held = view.weight(channels.sink.weight)
    assert held is not None
    weight = held.read().clone()
    weight[:, list(columns)] = 0
    view.set_weight(channels.sink.weight, MemoryWeight(weight))


@pytest.mark.parametrize("name", SHRINKING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_zero_goes_without_a_trace(name: str, kind: str, models: Models) -> None:
    small, views = models[name]
    view = views[kind].copy()
    structure = recognize(view)
    first, second = heads(view, structure, 0), heads(view, structure, 1)
    third = units(view, structure)
    site = structure.attentions[0]
    assert site.heads and site.kv_heads and site.head_dim
    every, shared, width = range(site.heads), site.heads // site.kv_heads, site.head_dim
    # All queries of one key; then, where several share one, the last query of each.
    whole = [h for h in every if h // shared != 1]
    part = [h for h in every if h % shared != shared - 1] if shared > 1 else list(every)[1:]
    some = [u for u in range(third.sink.in_features) if u % 5]
    places = []
    for channels, stays in ((first, whole), (second, part)):
        gone = [h * width + i for h in every if h not in stays for i in range(width)]
        without(view, channels, gone)
        places.append(Shrunk(channels, kept_heads(channels, stays)))
    without(view, third, [u for u in range(third.sink.in_features) if not u % 5])
    places.append(Shrunk(third, kept_units(third, some)))
    expected, names = sweep(view, small.inputs), [x.name for x in structure.linears]
    shrink_channels(view, places, spool=Spool(), rule="test")
    view.drop_unused_weights()
    check_structure(view)
    after = recognize(view)
    assert [x.name for x in after.linears] == names, "sites keep their names"
    assert (after.attentions[0].heads, after.attentions[0].kv_heads) == (
        len(whole), site.kv_heads - 1
    )  # fmt: skip
    assert after.attentions[1].heads == len(part)
    (down,) = (x for x in after.linears if x.name == third.sink.name)
    assert down.in_features == len(some)
    for difference in compare(expected, sweep(view, small.inputs)).values():
        assert difference.rel_l2 < 2e-6
    ran = gw.compile(view, backend="onnxruntime")(**small.inputs)
    for difference in compare(expected, ran).values():
        assert difference.rel_l2 < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_where_there_was_none(kind: str, models: Models) -> None:
    small, views = models["llama"]
    view = views[kind].copy()
    channels = units(view, recognize(view))
    assert channels.sink.bias is None
    every = kept_units(channels, range(channels.sink.in_features))
    before = sweep(view, small.inputs)
    nothing = Shrunk(channels, every, bias=torch.zeros(channels.sink.out_features))
    shrink_channels(view, [nothing], spool=Spool(), rule="test")
    check_structure(view)
    (linear,) = (x for x in recognize(view).linears if x.name == channels.sink.name)
    assert linear.bias is not None
    for difference in compare(before, sweep(view, small.inputs)).values():
        assert difference.rel_l2 == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_cannot_be_told_apart(kind: str, models: Models) -> None:
    view = models["gpt2"][1][kind]
    with pytest.raises(Refusal, match="queries, keys and values come out of one linear"):
        heads(view, recognize(view), 0)


def test_a_mask_of_its_own_for_each_head(models: Models) -> None:
    view = models["llama"][1]["fx"].copy()
    structure = recognize(view)
    node = structure.attentions[0].node
    each = view.add_weight("each", MemoryWeight(torch.ones(1, 4, 1, 1, dtype=torch.bool)))
    mask = view.build("logical_and", [view.tensor(node, 3), each], before=node)
    view.set_operand(node, 3, mask)
    with pytest.raises(Refusal, match="is another mask for each head"):
        heads(view, structure, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_whose_keys_the_graph_gives_out(kind: str, models: Models) -> None:
    """As a key-value cache does."""
    view = models["llama"][1][kind].copy()
    structure = recognize(view)
    (key,) = (x for x in structure.linears if x.name == structure.attentions[0].k)
    named = dict(zip(view.output_names(), view.outputs(), strict=True))
    view.set_outputs({**named, "present.0.key": key.out})
    with pytest.raises(Refusal, match="is an output of the graph: heads of a cache stay"):
        heads(view, structure, 0)


def test_heads_that_share_keys_stay_in_equal_numbers(models: Models) -> None:
    view = models["llama"][1]["fx"]
    channels = heads(view, recognize(view), 0)
    with pytest.raises(Refusal, match="removed unevenly: of 2 each, 2, 1 would stay"):
        kept_heads(channels, [0, 1, 2])
    with pytest.raises(Refusal, match="no head would be left"):
        kept_heads(channels, [])
    with pytest.raises(Refusal, match="no unit would be left"):
        kept_units(units(view, recognize(view)), [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_with_other_readers(kind: str, models: Models) -> None:
    view = models["llama"][1][kind].copy()
    structure = recognize(view)
    gates = [x for x in structure.linears if x.role == "gate"]
    view.set_operand(gates[1].node, 1, gates[0].weight)
    channels = units(view, structure)
    place = Shrunk(channels, kept_units(channels, [0, 1]))
    before = view.edits
    with pytest.raises(Refusal, match=f"the weight of {gates[0].name} is shared"):
        shrink_channels(view, [place], spool=Spool(), rule="test")
    assert view.edits == before, "nothing was changed"


def test_units_that_something_else_takes(models: Models) -> None:
    view = models["llama"][1]["fx"].copy()
    structure = recognize(view)
    channels = units(view, structure)
    x = view.tensor(channels.sink.node)
    place = view.after(channels.sink.node)
    named = dict(zip(view.output_names(), view.outputs(), strict=True))
    mean = view.build("mean", [x], {"dims": (2,), "keepdim": True}, before=place)
    view.set_outputs({**named, "also": mean})
    with pytest.raises(Refusal, match="takes the channels too"):
        units(view, structure)

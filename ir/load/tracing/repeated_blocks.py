"""Tracing a model of many equal blocks: some are traced, the others copied in the graph.

The exporter takes each operation of each block through fake tensors of symbolic sizes: a third of
what it costs to read a checkpoint of 24 layers. What a block does is known after two of its kind:
where both left the same nodes, but for the parameters, arguments and cache slots that those read,
the next one's are these again.

A block is copied where its modules have the classes, parameters and settings of the two, where the
model's settings say the same of its layer (``layer_types``), and where it is called with the same.
The last block is always traced, and so is every block whose code asks for the number of its layer
for more than to pass it on. What that misses is caught where the graph is held against its module.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from .plain_call import is_cache

LEAST = 5
"""Blocks of a list below which little is won: two or three are traced, and the last one."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx"})
"""Attributes by which a module knows the number of its layer."""


@contextlib.contextmanager
def repeated_blocks(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the exporter traces few of the equal blocks of each ``ModuleList`` of a module.

    One in which a module lies in two places is traced whole.
    """
    paths = [name for name, _ in module.named_modules(remove_duplicate=False)]
    named = dict(module.named_modules())
    lists = {name: m for name, m in named.items()
             if isinstance(m, torch.nn.ModuleList) and len(m) >= LEAST}  # fmt: skip
    patched: list[torch.nn.Module] = []
    try:
        for name, blocks in lists.items() if len(paths) == len(named) else ():
            configs = [getattr(m, "config", None) for path, m in named.items()
                       if not path or f"{name}.".startswith(f"{path}.")]  # fmt: skip
            stack = _Stack(name, list(blocks), configs)
            for index, block in enumerate(blocks):
                if "forward" not in vars(block):
                    block.forward = stack.forward_of(index, block.forward)
                    patched.append(block)
        yield
    finally:
        for block in patched:
            del block.forward


class _Unclear(Exception):
    """A copy of this call would have to guess."""


@dataclass(frozen=True)
class _Part:
    """What a node is to a call: a weight, an argument, a tensor of the cache, one of the nodes that
    the call leaves (``inner``), or a node of the model's that it reads (``outer``)."""

    kind: str
    which: Any


@dataclass(frozen=True)
class _Call:
    """What a block is called with."""

    index: int
    leaves: list[Any]
    """Arguments, flat; a cache is one."""
    weights: Mapping[str, torch.Tensor]
    tensors: list[torch.Tensor]
    """Arguments, then keys and values that it finds in a cache."""
    parts: dict[Node, _Part]
    """What the nodes are that it reads by all these."""
    kind: Hashable
    """What calls have in common of which one may be a copy of the other."""

    def slots(self) -> list[Any]:
        """This layer's places in the caches among the arguments."""
        return [_layer(leaf, self.index) for leaf in self.leaves if is_cache(leaf)]


@dataclass(frozen=True)
class _Segment:
    """What one call left in the graph."""

    call: _Call
    nodes: list[Node]
    form: list[Any]
    """The nodes, each reading parts in place of nodes: equal for calls that do the same."""
    results: list[Any]
    """Parts, or plain values: what was returned, flat, then keys and values of the caches."""
    returned: pytree.TreeSpec


class _Stack:
    """The blocks of one list, and what their calls left in the graph."""

    def __init__(self, name: str, blocks: Sequence[torch.nn.Module], configs: list[Any]) -> None:
        self._name = name
        self._blocks = blocks
        self._settings = [_settings(block, index, len(blocks), configs)
                          for index, block in enumerate(blocks)]  # fmt: skip
        self._last: dict[Hashable, _Segment] = {}
        self._settled: set[Hashable] = set()

    def forward_of(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            mode = proxy_tensor.get_proxy_mode()
            if mode is None:
                return forward(*args, **kwargs)
            try:
                call = self._call(index, args, kwargs, mode.tracer)
                if call.kind in self._settled and index < len(self._blocks) - 1:
                    return _copied(self._last[call.kind], call, self._name, mode.tracer)
            except _Unclear:
                return forward(*args, **kwargs)
            return self._watched(call, functools.partial(forward, *args, **kwargs), mode.tracer)

        return called

    def _call(self, index: int, args: Any, kwargs: Any, tracer: Any) -> _Call:
        block = self._blocks[index]
        weights = dict((*block.named_parameters(), *block.named_buffers()))
        leaves, shape = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        kind: list[Any] = [id(tracer), self._settings[index], repr(shape)]
        parts: dict[Node, _Part] = {}
        tensors: list[torch.Tensor] = []

        def read(tensor: torch.Tensor, part: _Part) -> None:
            # A tensor in two places has the first one's part, in both calls or in neither.
            kind.extend((parts.setdefault(_node(tensor, tracer), part), _type(tensor)))

        for name, weight in weights.items():
            read(weight, _Part("weight", name))
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                read(leaf, _Part("argument", place))
                tensors.append(leaf)
            elif is_cache(leaf):
                kind.append(id(leaf))
            elif isinstance(leaf, _PLAIN):
                kind.append(leaf)
            else:
                raise _Unclear
        call = _Call(index, leaves, weights, tensors, parts, tuple(kind))
        for place, tensor in enumerate(_cached(call)):
            read(tensor, _Part("cache", place))
            tensors.append(tensor)
        return dataclasses.replace(call, kind=tuple(kind))

    def _watched(self, call: _Call, run: Callable[[], Any], tracer: Any) -> Any:
        last, before = self._last.pop(call.kind, None), _newest(tracer.graph)
        result = run()
        with contextlib.suppress(_Unclear):
            segment = _segment(call, before, result, tracer)
            self._last[call.kind] = segment
            if last and (last.form, last.results) == (segment.form, segment.results):
                self._settled.add(call.kind)
        return result


# --- what a block is ----------------------------------------------------------------------------


def _settings(
    block: torch.nn.Module, index: int, count: int, configs: Sequence[Any]
) -> tuple[Any, ...]:
    """Classes and settings of a block's modules, and what the model's settings list for its layer;
    of a block whose code asks for its number, the number."""
    kinds: list[Any] = [type(module) for module in block.modules()]
    settings: list[Any] = [index] if any(map(_asks_for_its_number, kinds)) else []
    for name, module in block.named_modules():
        settings.append((name, type(module)))
        settings += [(key, repr(value)) for key, value in sorted(vars(module).items())
                     if _is_plain(value) and not (key in _NUMBERS and value == index)]  # fmt: skip
    settings += [
        (key, repr(value[index]))
        for config in configs
        for key, value in sorted(getattr(config, "__dict__", {}).items())
        if isinstance(value, list | tuple) and len(value) == count
    ]
    return tuple(settings)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    # A function of a module's own tells by its place in memory.
    return isinstance(value, _PLAIN) or inspect.isfunction(value)


@functools.cache
def _asks_for_its_number(kind: Any) -> bool:
    """Whether the code of a module does more with the number of its layer than to pass it on."""
    if kind.__module__.startswith("torch.") or not _NUMBERS & _names(kind):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return True
    methods = [m for m in ast.walk(tree) if isinstance(m, ast.FunctionDef) and m.name != "__init__"]
    asked = {id(n) for m in methods for n in ast.walk(m)
             if isinstance(n, ast.Attribute) and n.attr in _NUMBERS}  # fmt: skip
    passed = {id(a) for m in methods for call in ast.walk(m) if isinstance(call, ast.Call)
              for a in (*call.args, *(k.value for k in call.keywords))}  # fmt: skip
    return not asked <= passed


def _names(kind: type) -> set[str]:
    """Names that the methods of a class read."""
    methods = [m for m in vars(kind).values() if inspect.isfunction(m)]
    return {name for m in methods for name in inspect.unwrap(m).__code__.co_names}


# --- what a call reads and leaves ---------------------------------------------------------------


def _segment(call: _Call, before: Node, result: Any, tracer: Any) -> _Segment:
    nodes: list[Node] = []
    node = before.next
    while node.op != "root":
        nodes.append(node)
        node = node.next
    places = {node: place for place, node in enumerate(nodes)}

    def part(node: Node) -> _Part:
        if node in places:
            return _Part("inner", places[node])
        return call.parts.get(node) or _Part("outer", node)

    form: list[Any] = []
    for node in nodes:
        if node.op != "call_function" or "unbacked_bindings" in node.meta:
            raise _Unclear
        args = torch.fx.node.map_arg((node.args, node.kwargs), part)  # type: ignore[arg-type]
        value = node.meta.get("val")
        form.append((node.target, args, _type(value) if isinstance(value, torch.Tensor) else None))
    leaves, returned = pytree.tree_flatten(result, is_leaf=is_cache)
    results: list[Any] = []
    for leaf in (*leaves, *_cached(call)):
        value = part(_node(leaf, tracer)) if isinstance(leaf, torch.Tensor) else leaf
        if not isinstance(value, (*_PLAIN, _Part)) or getattr(value, "kind", "") == "outer":
            raise _Unclear
        results.append(value)
    return _Segment(call, nodes, form, results, returned)


def _copied(segment: _Segment, call: _Call, name: str, tracer: Any) -> Any:
    """What ``call`` would return; the graph and the caches hold what it would leave there."""
    _same_sizes(segment.call, call)
    own = {part: node for node, part in call.parts.items()}
    copies = {node: own[part] for node, part in segment.call.parts.items()}
    old = re.compile(re.escape(f"{name}.{segment.call.index}") + r"(?=\.|$)")
    for node in segment.nodes:
        copies[node] = _copy(node, copies, old, f"{name}.{call.index}", tracer.graph)
    values = _values(segment, call, copies, tracer)
    count = segment.returned.num_leaves
    cached = iter(values[count:])
    for layer in call.slots():
        layer.keys, layer.values = next(cached), next(cached)
    return pytree.tree_unflatten(values[:count], segment.returned)


def _copy(
    node: Node, copies: Mapping[Node, Node], old: re.Pattern[str], new: str, graph: Graph
) -> Node:
    """A node as it would stand in the block ``new``."""
    copy = graph.node_copy(node, lambda read: copies.get(read, read))
    stack = node.meta.get("nn_module_stack", {})
    copy.meta["nn_module_stack"] = {
        old.sub(new, key): (old.sub(new, path), kind) for key, (path, kind) in stack.items()
    }
    return copy


def _values(segment: _Segment, call: _Call, copies: Mapping[Node, Node], tracer: Any) -> list[Any]:
    """The results of a segment as those of ``call``."""
    places = {part.which for part in segment.results if getattr(part, "kind", "") == "inner"}
    nodes = {place: segment.nodes[place] for place in places}
    homes: dict[str, Any] = {
        "weight": call.weights,
        "argument": call.leaves,
        "cache": _cached(call),
        "inner": {place: _tracked(node.meta["val"], copies[node], tracer)
                  for place, node in nodes.items()},
    }  # fmt: skip
    return [homes[part.kind][part.which] if isinstance(part, _Part) else part
            for part in segment.results]  # fmt: skip


def _same_sizes(one: _Call, other: _Call) -> None:
    """Tells the exporter, which gives each input sizes of its own, that these are equal.

    So would the code of the block: it joins them with the same mask.
    """
    pairs = zip(one.tensors, other.tensors, strict=True)
    sizes = [both for x, y in pairs for both in zip(x.shape, y.shape, strict=True)]
    with proxy_tensor.disable_proxy_modes_tracing():
        if not all(bool(a == b) for a, b in sizes):
            raise _Unclear


def _tracked(like: torch.Tensor, node: Node, tracer: Any) -> torch.Tensor:
    """A fake tensor of that type, known to the tracer as what ``node`` computes."""
    with proxy_tensor.disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        tensor = torch.empty_strided(
            like.size(), like.stride(), dtype=like.dtype, device=like.device
        )
    proxy_tensor.track_tensor_tree(tensor, tracer.proxy(node), constant=None, tracer=tracer)
    return tensor


def _cached(call: _Call) -> list[torch.Tensor]:
    return [tensor for layer in call.slots() for tensor in (layer.keys, layer.values)]


def _layer(cache: Any, index: int) -> Any:
    """The place of a layer in a cache, if it keeps all that it has seen, and has seen something."""
    layers = getattr(cache, "layers", ())
    if index >= len(layers) or type(layers[index]).__name__ != "DynamicLayer":
        raise _Unclear
    if layers[index].keys is None or layers[index].values is None:
        raise _Unclear
    return layers[index]


def _newest(graph: Graph) -> Node:
    return graph._root.prev


def _node(tensor: torch.Tensor, tracer: Any) -> Node:
    slot = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    if slot is None:
        raise _Unclear
    node: Node = slot.proxy.node
    return node


def _type(tensor: torch.Tensor) -> Hashable:
    """Dtype and sizes in the example: what else they are is settled when all is traced."""
    return tensor.dtype, tuple(map(_hint, tensor.shape)), tuple(map(_hint, tensor.stride()))


def _hint(size: int | torch.SymInt) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size

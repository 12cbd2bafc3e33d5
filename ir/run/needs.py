"""What an ONNX graph needs of the open sizes of its inputs: numbers, multiples, least sizes.

Files name dimensions that can have one size only, or none below that of a window of a convolution,
or leave them without a name. What the nodes do with them says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..core.dims import names_in
from ..core.types import UNKNOWN_DIM, Dim
from ..core.view import NATIVE, Node, Operand, Value, View, is_value
from ..vocab import spec
from ..vocab.rules import comparison, elementwise

Key = str | tuple[Value, int]
"""A dimension: its name, or an input and the axis where it has none."""
Window = Callable[[Node, Sequence[Any], list[int]], list[int]]
"""What a window asks of each axis of its operand, of what is asked of its result's."""
_WINDOWED = frozenset({"Conv", "MaxPool", "AveragePool", "LpPool"})
_CHANNELS = {"BatchNormalization": 0, "InstanceNormalization": 0, "ConvTranspose": 0}
"""Native ops whose second dimension is as long as a dimension of their first weight."""
_WIDENING = frozenset({"Resize", "Upsample"})
"""Native ops that make axes longer."""
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_SAME_TYPE = frozenset({
    "Relu", "LeakyRelu", "Elu", "Selu", "PRelu", "HardSigmoid", "HardSwish", "Softplus", "Clip",
    "BatchNormalization", "InstanceNormalization", "LRN", "Dropout",
})  # fmt: skip
"""Native ops whose result is of the shape of their first operand."""


class Needs:
    """``fixed``: sizes that dimensions must have; ``multiples``: numbers that must divide them;
    ``least``: sizes that they must not be below."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._inputs = set(view.inputs())
        self.fixed: dict[Key, int] = {}
        self.multiples: dict[Key, int] = {}
        self.least: dict[Key, int] = {}
        nodes = list(view.nodes())
        for node in nodes:
            for a, b in self._equal(node):
                if a is not None and isinstance(b, int) and b > 0:
                    self.fixed.setdefault(a, b)
        self._take_least(nodes)
        if any(view.native_op(node) in _WIDENING for node in nodes):
            self._take_strides(nodes)

    def key(self, value: Value, axis: int) -> Key | None:
        """What stands for a dimension that is open."""
        shape = self._view.type(value).shape
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        dim = shape[axis]
        if dim == UNKNOWN_DIM:
            return (value, axis % len(shape)) if value in self._inputs else None
        return dim if isinstance(dim, str) and names_in(dim) == [dim] else None

    def _shape(self, operand: Operand) -> tuple[Dim, ...] | None:
        return self._view.type(operand).shape if is_value(operand) else None

    # --- sizes that are equal ---------------------------------------------------------------------

    def _equal(self, node: Node) -> Iterator[tuple[Key | None, Dim]]:
        """Dimensions, each with the size that another operand gives it."""
        view = self._view
        op, operands = view.op(node), view.operands(node)
        if not operands or not is_value(operands[0]):
            return
        if op == NATIVE:
            yield from self._native(node, operands)
        elif op in ("matmul", "linear"):
            yield from self._product(operands, -1 if op == "linear" else -2)
        elif op == "conv":
            weight = self._shape(operands[1]) or ()
            groups = view.attrs(node)["groups"]
            if len(weight) > 1 and isinstance(weight[1], int):
                yield self.key(operands[0], 1), weight[1] * groups
        elif op in ("layer_norm", "rms_norm"):
            scale = (self._shape(operands[1]) if len(operands) > 1 else None) or ()
            for axis in range(-len(scale), 0):
                yield self.key(operands[0], axis), scale[axis]
        elif op == "split":
            sizes, dim = view.attrs(node)["sizes"], view.attrs(node)["dim"]
            yield self.key(operands[0], dim), sum(sizes) if len(sizes) > 1 else UNKNOWN_DIM
        elif op == "squeeze":
            yield from ((self.key(operands[0], dim), 1) for dim in view.attrs(node)["dims"])
        elif op == "reshape":
            yield from self._reshape(operands)
        elif op == "where" or spec(op).infer in (elementwise, comparison):
            yield from self._broadcast([o for o in operands if is_value(o)])

    def _product(self, operands: Sequence[Any], axis: int) -> Iterator[tuple[Key | None, Dim]]:
        x, w = operands[:2]
        shapes = self._shape(x), self._shape(w)
        if not shapes[0] or not shapes[1]:
            return
        inner = axis if len(shapes[1]) > 1 else -1
        yield self.key(x, -1), shapes[1][inner]
        yield self.key(w, inner), shapes[0][-1]
        if axis == -2:
            yield from self._broadcast([x, w], skip=2)

    def _broadcast(
        self, operands: Sequence[Value], skip: int = 0
    ) -> Iterator[tuple[Key | None, Dim]]:
        shapes = [(value, self._shape(value) or ()) for value in operands]
        for axis in range(-max((len(s) for _, s in shapes), default=0), -skip):
            sizes = [s[axis] for _, s in shapes if len(s) >= -axis]
            number = next((d for d in sizes if isinstance(d, int) and d > 1), UNKNOWN_DIM)
            yield from ((self.key(v, axis), number) for v, s in shapes if len(s) >= -axis)

    def _reshape(self, operands: Sequence[Any]) -> Iterator[tuple[Key | None, Dim]]:
        """Of sizes in numbers, their product is the operand's; beside -1 they divide it."""
        x, *sizes = operands
        shape = self._shape(x)
        if shape is None or not all(isinstance(s, int) for s in sizes):
            return
        rest = [i for i, d in enumerate(shape) if i >= len(sizes) or sizes[i] != 0]
        open_ = [i for i in rest if not isinstance(shape[i], int)]
        total = math.prod(s for s in sizes if s > 0)
        fixed = math.prod(d for i in rest if isinstance(d := shape[i], int))
        key = self.key(x, open_[0]) if len(open_) == 1 else None
        if key is None or not fixed:
            return
        if -1 not in sizes:
            yield key, total // fixed
        elif total // math.gcd(total, fixed) > 1:
            known = self.multiples.get(key, 1)
            self.multiples[key] = math.lcm(known, total // math.gcd(total, fixed))

    def _native(self, node: Node, operands: Sequence[Any]) -> Iterator[tuple[Key | None, Dim]]:
        op, x = self._view.native_op(node), operands[0]
        weight = self._shape(operands[1]) if len(operands) > 1 else None
        if not weight:
            return
        attrs = self._view.attrs(node)
        if op in _CHANNELS:
            yield self.key(x, 1), weight[_CHANNELS[op]]
        elif op == "Conv" and len(weight) > 1 and isinstance(weight[1], int):
            yield self.key(x, 1), weight[1] * int(attrs.get("group", 1))
        elif op == "Gemm" and len(weight) == 2:
            yield self.key(x, 0 if attrs.get("transA") else 1), weight[bool(attrs.get("transB"))]
        elif op in _RECURRENT and len(weight) == 3:
            yield self.key(x, 2), weight[2]
            yield from self._states(x, operands[3:], int(attrs.get("layout", 0)))

    def _states(
        self, x: Value, operands: Sequence[Any], layout: int
    ) -> Iterator[tuple[Key | None, Dim]]:
        """The rows of a recurrent node are as many as those of the states that it begins with, the
        only operands of three dimensions behind its weights."""
        for state in operands:
            shape = self._shape(state) or ()
            if len(shape) == 3:
                yield self.key(x, 1 - layout), shape[1 - layout]
                yield self.key(state, 1 - layout), (self._shape(x) or shape)[1 - layout]

    # --- windows ----------------------------------------------------------------------------------

    def _take_least(self, nodes: Sequence[Node]) -> None:
        """How long each axis must be for all windows behind it."""
        for key, size in self._follow(nodes, self._reach, max):
            self.least[key] = max(size, self.least.get(key, 1))

    def _take_strides(self, nodes: Sequence[Node]) -> None:
        """What is widened again is added to what it was before it was made narrower: the strides
        on the way divide the axis, or the two are not equally long."""
        for key, size in self._follow(nodes, self._strides, math.lcm):
            self.multiples[key] = math.lcm(size, self.multiples.get(key, 1))

    def _follow(
        self, nodes: Sequence[Node], window: Window, join: Callable[[int, int], int]
    ) -> Iterator[tuple[Key, int]]:
        """From the outputs to the inputs: the sizes above 1 that the windows ask of open axes."""
        demands: dict[Value, list[int]] = {}
        for node in reversed(nodes):
            results = self._view.results(node)
            shape = self._shape(results[0]) if results else None
            after = demands.get(results[0]) if results else None
            for value, sizes in self._before(node, after, shape, window):
                known = demands.setdefault(value, [1] * len(sizes))
                if len(known) == len(sizes):
                    demands[value] = [join(a, b) for a, b in zip(known, sizes, strict=True)]
        for value in self._inputs & set(demands):
            for axis, size in enumerate(demands[value]):
                key = self.key(value, axis)
                if key is not None and size > 1:
                    yield key, size

    def _before(
        self, node: Node, after: list[int] | None, result: tuple[Dim, ...] | None, window: Window
    ) -> Iterator[tuple[Value, list[int]]]:
        """The operands with what is asked of each of their axes."""
        view = self._view
        op, operands = view.op(node), view.operands(node)
        x = operands[0] if operands else None
        shape = self._shape(x)
        if shape is None or not is_value(x):
            return
        native = view.native_op(node) if op == NATIVE else ""
        if op == "conv" or native in _WINDOWED:
            yield x, window(node, operands, after or [1] * len(shape))
        elif after is None:
            return
        elif op == "transpose":
            perm = view.attrs(node)["perm"]
            yield x, [after[perm.index(i)] for i in range(len(perm))]
        elif op == "unsqueeze":
            gone = {d % len(after) for d in view.attrs(node)["dims"]}
            yield x, [size for i, size in enumerate(after) if i not in gone]
        elif op == "squeeze":
            rest, gone = iter(after), {d % len(shape) for d in view.attrs(node)["dims"]}
            yield x, [1 if i in gone else next(rest, 1) for i in range(len(shape))]
        elif op not in (NATIVE, "reshape") or native in _SAME_TYPE:
            for value in (o for o in operands if is_value(o)):
                own = self._shape(value)
                if own is not None and result is not None and len(own) == len(result):
                    open_ = [not isinstance(d, int) for d in own]
                    yield value, [a if o else 1 for a, o in zip(after, open_, strict=True)]

    def _reach(self, node: Node, operands: Sequence[Any], after: list[int]) -> list[int]:
        """The least sizes that give ``after``."""
        sizes = [1, 1]
        for size, (kernel, stride, dilation, edges) in self._axes(node, operands, after):
            sizes.append(max(1, (size - 1) * stride + dilation * (kernel - 1) + 1 - edges))
        return sizes if len(sizes) == len(after) else [1] * len(after)

    def _strides(self, node: Node, operands: Sequence[Any], after: list[int]) -> list[int]:
        """The sizes that ``stride`` times ``after`` divides."""
        sizes = [1, 1, *(n * stride for n, (_, stride, _, _) in self._axes(node, operands, after))]
        return sizes if len(sizes) == len(after) else [1] * len(after)

    def _axes(
        self, node: Node, operands: Sequence[Any], after: list[int]
    ) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Of each spatial axis what is behind it, and the window's kernel, stride, dilation and
        padding at both ends together; nothing where the graph does not say it."""
        attrs, spatial = self._view.attrs(node), len(after) - 2
        weight = self._shape(operands[1]) if len(operands) > 1 else None
        ours = "stride" in attrs
        kernel = (weight or ())[2:] if ours or weight else attrs.get("kernel_shape", ())
        strides = attrs.get("stride" if ours else "strides") or [1] * spatial
        dilations = attrs.get("dilation" if ours else "dilations") or [1] * spatial
        padding = attrs.get("padding") if ours else attrs.get("pads")
        pads = [*padding, *padding] if ours and padding else padding or [0] * 2 * spatial
        known = [*kernel, *strides, *dilations, *pads]
        if len(kernel) != spatial or len(known) != 5 * spatial:
            return
        if not all(isinstance(n, int) for n in known) or "SAME" in str(attrs.get("auto_pad")):
            return
        for i in range(spatial):
            edges = int(pads[i]) + int(pads[i + spatial])
            yield after[i + 2], (int(kernel[i]), int(strides[i]), int(dilations[i]), edges)

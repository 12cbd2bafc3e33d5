"""What a model says when its stream runs through other blocks: many paths, each prefix run once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ir.core.errors import Refusal
from ...ir.core.view import NATIVE, Node, Value, View
from ...ir.moves.bypass_blocks import bodies
from ...ir.run.masks import mask_of, padding_masks
from ...ir.run.sweep import bound, run_part
from ...ir.structure.cache_slots import answers
from ...ir.structure.recognize import Structure
from ...ir.structure.units import Unit
from ...ir.vocab import traits

JUDGED = 512
"""Tokens of the calibration data on which outputs are compared, evenly spread."""
HELD_BYTES = 256 << 20
"""What the streams behind prefixes of paths may take together; the oldest go first."""
Places = tuple[int, ...]
"""A path, as places in the list of units."""
Stream = list[Tensor]
"""The residual stream at one place, batch by batch."""


class PathRunner:
    """Runs a graph on batches by other paths through ``units``, and says how far the outputs move.

    What lies before the units runs once. The stream behind each prefix of a path is kept, so that
    paths that begin alike share that part: ``units_run`` counts what was run, ``units_asked`` what
    the paths hold; none is compared twice. With ``last`` outputs are compared at the last token of
    each row that counts.
    Raises ``Refusal`` where the output needs a value from inside a unit.
    """

    def __init__(
        self, view: View, structure: Structure, units: Sequence[Unit],
        batches: Sequence[Mapping[str, Tensor]], *, last: bool = False,
    ) -> None:  # fmt: skip
        self._view, self._units = view, units
        self.units_run = self.units_asked = self.paths = 0
        self._bodies = bodies(view, units)
        self._over_words = any(linear.role == "head" for linear in structure.linears)
        self._output = _output(view)
        first, self._last = units[0].entry, units[-1].exit
        before, self._tail = _around(view, self._bodies, self._last, self._output)
        readers = [*self._tail, *(node for body in self._bodies for node in body)]
        read = {value for node in readers for value in view.arguments(node)}
        self._fixed = run_part(view, before, bound(view, batches), read | {first})
        self._entry: Stream = self._fixed[first]
        self._held: OrderedDict[Places, Stream] = OrderedDict()
        self._held_bytes = 0
        whole = tuple(range(len(units)))
        stream = self._stream(whole, 0)
        masks = padding_masks(view, batches)
        self._chosen = _last(stream, masks) if last else _spread(stream, masks)
        self._joined = self._is_pointwise(stream)
        self._source = self._ends(stream)
        if self._over_words:
            self._source = self._source.log_softmax(-1)
        self._moved: dict[Places, float] = {}
        self.units_run = self.units_asked = 0

    def divergence(self, path: Places, shared: int | None = None) -> float:
        """How far the outputs by a path are from the source's.

        Where the model has a head over words or classes: the mean KL divergence of its distribution
        from the source's, in nats, on up to ``JUDGED`` tokens that count; else the relative L2
        distance of the output. ``shared`` says how many of its first units the next paths begin
        with too, where that is known: what lies behind the others is then not kept.
        """
        if path not in self._moved:
            self._moved[path] = self._distance(self.outputs(path, shared))
        return self._moved[path]

    def _distance(self, output: Tensor) -> float:
        if not self._over_words:
            return float((output - self._source).norm()) / max(float(self._source.norm()), 1e-30)
        gap = self._source.exp() * (self._source - output.log_softmax(-1))
        return float(gap.sum(-1, dtype=torch.float64).mean())

    def outputs(self, path: Places, shared: int | None = None) -> Tensor:
        """The outputs by a path where they are compared, ``[tokens, K]`` f32, in the order of the
        rows; ``shared`` as in ``divergence``."""
        self.units_asked += len(path)
        self.paths += 1
        return self._ends(self._stream(path, len(path) if shared is None else shared))

    def without(self, path: Sequence[int], at: int) -> float:
        """How far the outputs move where a path goes without its unit at a place."""
        return self.divergence((*path[:at], *path[at + 1 :]), shared=at)

    def effort(self) -> str:
        """What keeping the streams of shared beginnings has saved."""
        asked, run = self.units_asked, self.units_run
        return (
            f"{self.paths} paths measured in {run} runs of blocks; each by itself would take "
            f"{asked} ({asked / max(1, run):.1f} times as many)"
        )

    def behind(self, path: Places) -> Stream:
        """The stream behind a path, batch by batch."""
        return self._stream(path, len(path))

    def tokens(self, path: Places) -> Tensor:
        """The stream behind a path at the tokens that are compared, f64 ``[tokens, width]``."""
        stream = self.behind(path) if path else self._entry
        pairs = zip(stream, self._chosen, strict=True)
        return torch.cat([x[chosen] for x, chosen in pairs]).double()

    def _stream(self, path: Places, shared: int) -> Stream:
        """The stream behind the last unit of a path; those behind the first ``shared`` are kept."""
        known = len(path)
        while known and path[:known] not in self._held:
            known -= 1
        stream = self._held[path[:known]] if known else self._entry
        if known:
            self._held.move_to_end(path[:known])
        for length in range(known + 1, len(path) + 1):
            place = path[length - 1]
            unit = self._units[place]
            inputs = {**self._fixed, unit.entry: stream}
            stream = run_part(self._view, self._bodies[place], inputs, {unit.exit})[unit.exit]
            self.units_run += 1
            if length <= shared:
                self._hold(path[:length], stream)
        return stream

    def _hold(self, prefix: Places, stream: Stream) -> None:
        self._held[prefix] = stream
        self._held_bytes += _bytes(stream)
        while self._held_bytes > HELD_BYTES and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= _bytes(oldest)

    def _ends(self, stream: Stream) -> Tensor:
        """The output that a stream ends in, ``[tokens, K]`` f32: at the tokens that are compared
        where it has the stream's tokens, else all of it."""
        if self._joined:
            rows = torch.cat([x[chosen] for x, chosen in zip(stream, self._chosen, strict=True)])
            (output,) = self._tail_of({self._last: [rows[None]]})
            return output[0].float()
        parts: list[Tensor] = []
        for i, (x, chosen) in enumerate(zip(stream, self._chosen, strict=True)):
            inputs = {value: [column[i]] for value, column in self._fixed.items()}
            (output,) = self._tail_of({**inputs, self._last: [x]})
            parts.append(
                output[chosen] if output.shape[:-1] == chosen.shape else output.flatten(0, -2)
            )
        return torch.cat(parts).float()

    def _tail_of(self, inputs: Mapping[Value, Stream]) -> Stream:
        return run_part(self._view, self._tail, inputs, {self._output})[self._output]

    def _is_pointwise(self, stream: Stream) -> bool:
        """Whether the output is computed for each token by itself, as norms and heads do: then it
        is computed for those tokens alone that are compared."""
        view = self._view
        for node in self._tail:
            op, known = view.op(node), traits(view.op(node))
            computed = [v for v in view.arguments(node) if view.weight(v) is None]
            moves = known.rearranges and op not in ("cast", "identity")
            if op == NATIVE or moves or known.picks or len(computed) != 1:
                return False
        x, chosen = stream[0], self._chosen[0]
        if x.dim() != 3 or not chosen.any():
            return False
        (whole,) = self._tail_of({self._last: [x]})
        (part,) = self._tail_of({self._last: [x[chosen][None]]})
        same = whole.shape[:-1] == chosen.shape and part.shape[1:] == whole[chosen].shape
        return same and torch.allclose(part[0], whole[chosen], rtol=1e-3, atol=1e-4)


def _output(view: View) -> Value:
    """The first output of numbers that is not a part of the cache."""
    for value in answers(dict(zip(view.output_names(), view.outputs(), strict=True))).values():
        dtype = view.type(value).dtype
        if dtype is not None and dtype.is_floating_point:
            return value
    raise Refusal("the graph returns no numbers that could be compared")


def _around(
    view: View, inside: Sequence[Sequence[Node]], last: Value, output: Value
) -> tuple[list[Node], list[Node]]:
    """The nodes that no unit's results reach, and those that lead from ``last`` to ``output``."""
    members = {node for body in inside for node in body}
    reached: set[Node] = set()
    order = list(view.nodes())
    for node in order:
        makers = {view.producer(value) for value in view.arguments(node)}
        if node in members or makers & (reached | members):
            reached.add(node)
    before = [node for node in order if node not in reached]
    needed: set[Node] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        maker = None if value is last else view.producer(value)
        if maker is None or maker in needed or maker not in reached:
            continue
        if maker in members:
            raise Refusal(f"the output needs what {view.name(maker)} computes inside the blocks")
        needed.add(maker)
        stack += view.arguments(maker)
    return before, [node for node in order if node in needed]


def _spread(stream: Stream, masks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each batch which tokens are compared, bool ``[batch, seq]``: up to ``JUDGED`` of those
    that count, at even distances."""
    counts = [mask_of(x, fitting).clone() for x, fitting in zip(stream, masks, strict=True)]
    step = max(1, -(-sum(int(c.sum()) for c in counts) // JUDGED))
    earlier = 0
    for count in counts:
        places = count.flatten().nonzero()[:, 0]
        drop = places[(torch.arange(len(places)) + earlier) % step != step - 1]
        earlier += len(places)
        count.view(-1)[drop] = False
    return counts


def _last(stream: Stream, masks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The same for the last token of each row that counts."""
    chosen = []
    for x, fitting in zip(stream, masks, strict=True):
        counts = mask_of(x, fitting)
        behind = counts.flip(1).cumsum(1).flip(1)
        chosen.append(counts & (behind == 1))
    return chosen


def _bytes(stream: Stream) -> int:
    return sum(x.numel() * x.element_size() for x in stream)

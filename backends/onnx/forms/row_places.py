"""What a decoder computes of the places of its tokens alone: tables of angles, and who sees whom.

Its graph computes both anew in each step, in as many ways as there are models. What they come to
is found by running just that part of the graph on texts that say nothing: ids of zeros, caches of
which only the length is looked at, and masks as of whole rows and of rows that are padded at their
end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from ....ir.core.errors import GraphwrightError, Refusal
from ....ir.core.view import Node, Value, View
from ....ir.structure.cache_slots import PAST_AXIS, STREAM, past_slot, positions
from ....ir.vocab import traits

T = TypeVar("T")
CHUNK = 4096
"""Rows of a table that are computed at once."""
FAR = 1 << 15
"""Keys behind which no window is looked for where nobody says how long a text may be."""
HIDDEN = -1e4
"""What is added to a logit, at most, so that its key counts as hidden; half types end at -65504."""


@dataclass(frozen=True)
class Text:
    """A call of a decoder: tokens of before, new ones, and which of all each row has."""

    past: int
    new: int
    mask: tuple[tuple[int, ...], ...] = ()
    """Of whole rows where absent."""

    @property
    def rows(self) -> int:
        return max(1, len(self.mask))

    @property
    def kept(self) -> torch.Tensor:
        """[rows, past + new], i64"""
        if self.mask:
            return torch.tensor(self.mask)
        return torch.ones(1, self.past + self.new, dtype=torch.int64)

    @property
    def real(self) -> torch.Tensor:
        """[rows, new]: which of the new tokens are no padding."""
        return self.kept[:, self.past :] > 0

    def seen(self, window: int) -> torch.Tensor:
        """[rows, new, past + new]: the keys up to each token's own that its row has."""
        own = torch.arange(self.past, self.past + self.new)[:, None]
        keys = torch.arange(self.past + self.new)[None]
        near = keys > own - window if window > 0 else torch.ones_like(keys, dtype=torch.bool)
        return ((keys <= own) & near)[None] & (self.kept > 0)[:, None]


TEXTS = (
    Text(0, 5), Text(3, 2), Text(4, 1),
    Text(0, 4, ((1, 1, 1, 1), (1, 1, 0, 0))), Text(4, 1, ((1, 1, 1, 1, 1), (1, 1, 0, 0, 1))),
)  # fmt: skip
"""A prompt, a chunk and a step; a prompt whose second row ends early, and the step after it."""


@dataclass
class Places:
    """The parts of one graph that are computed of places, by the values that they give."""

    view: View
    longest: int | None
    """Tokens of the longest text, where it is known."""
    _tables: dict[Value, torch.Tensor | Refusal] = field(default_factory=dict)
    _windows: dict[Value, int | Refusal] = field(default_factory=dict)

    def angles(self, value: Value) -> torch.Tensor:
        """The cosines or sines at each place, [longest, width / 2], which ``value`` [..., tokens,
        width] has twice in a row. Raises ``Refusal`` where it depends on anything else than the
        place of a token in its row."""
        if value not in self._tables:
            self._tables[value] = _kept(lambda: self._halved(value))
        return _or_raise(self._tables[value])

    def window(self, mask: Value) -> int:
        """How many keys a token sees, its own the last; -1 for all. Raises ``Refusal`` where the
        mask hides other keys than those behind a token, padding and those before a window."""
        if mask not in self._windows:
            self._windows[mask] = _kept(lambda: self._window(mask))
        return _or_raise(self._windows[mask])

    def _halved(self, value: Value) -> torch.Tensor:
        table = self._table(value)
        half = table.shape[1] // 2
        if table.shape[1] % 2 or not torch.equal(table[:, :half], table[:, half:]):
            raise Refusal("the two halves of a head are not turned by the same angles")
        return table[:, :half].contiguous()

    def _table(self, value: Value) -> torch.Tensor:
        if self.longest is None:
            raise Refusal("how long a text may be is not known: there is no config.json")
        starts = range(0, self.longest, CHUNK)
        chunks = [Text(start, min(CHUNK, self.longest - start)) for start in starts]
        table = torch.cat([self.run(value, text).reshape(text.new, -1) for text in chunks])
        for text in TEXTS:
            last = int(positions(text.kept, text.new).max())
            if last >= self.longest:
                continue
            rows = self.run(value, text)
            values = rows.reshape(-1, text.new, table.shape[1]).expand(text.rows, -1, -1)
            gap = (values - table[positions(text.kept, text.new)]).float().abs()[text.real]
            if float(gap.max()) > 4 * torch.finfo(table.dtype).eps:
                raise Refusal("its angles do not follow from the place of a token in its row")
        return table

    def _window(self, mask: Value) -> int:
        far = self.longest or FAR
        (row,) = self._seen(mask, Text(far - 1, 1)).reshape(1, far)
        count = int(row.sum())
        window = -1 if count == far else count
        wide = [Text(max(0, window - 2), 4)] if window > 0 else []
        for text in itertools.chain(TEXTS, wide):
            visible, expected = self._seen(mask, text), text.seen(window)
            if not torch.equal(visible[text.real], expected[text.real]):
                raise Refusal("its mask hides other keys than padding and those behind a token")
        return window

    def _seen(self, mask: Value, text: Text) -> torch.Tensor:
        """[rows, new, keys]: which keys a mask lets be seen."""
        visible = self.run(mask, text)
        if visible.dtype != torch.bool:
            hidden = visible <= HIDDEN
            if not bool((hidden | (visible == 0)).all()):
                raise Refusal("its mask adds numbers to the logits")
            visible = ~hidden
        shape = (text.rows, text.new, text.past + text.new)
        if visible.dim() == 4 and visible.shape[1] == 1:
            visible = visible[:, 0]
        return visible.expand(shape)

    def run(self, value: Value, text: Text) -> torch.Tensor:
        """``value`` on a text that says nothing."""
        view, env = self.view, dict(self._fed(text))
        for node in _needed(view, value):
            if view.native_op(node) == "Shape":
                whole = torch.tensor(env[view.arguments(node)[0]].shape)
                attrs = view.attrs(node)
                part = whole[attrs.get("start", 0) : attrs.get("end")]
                results: tuple[torch.Tensor, ...] = (part,)
            else:
                results = view.execute(node, [_known(view, env, a) for a in view.arguments(node)])
            env.update(zip(view.results(node), results, strict=True))
        return env[value]

    def _fed(self, text: Text) -> Mapping[Value, torch.Tensor]:
        view, fed = self.view, {}
        for name, value in zip(view.input_names(), view.inputs(), strict=True):
            if name == "attention_mask":
                fed[value] = text.kept.to(view.type(value).dtype or torch.int64)
            elif name == "input_ids":
                fed[value] = torch.zeros(1, dtype=torch.int64).expand(text.rows, text.new)
            elif name == STREAM:
                one = torch.zeros(1, dtype=view.type(value).dtype)
                fed[value] = one.expand(text.rows, text.new, 1)
            elif past_slot(name) is not None:
                sizes = [d if isinstance(d, int) else 1 for d in view.type(value).shape or ()]
                sizes[0], sizes[PAST_AXIS] = text.rows, text.past
                fed[value] = torch.zeros(1, dtype=view.type(value).dtype).expand(sizes)
        return fed


def _needed(view: View, value: Value) -> list[Node]:
    """The nodes that make a value, in order. Raises ``Refusal`` where they read more than the mask
    of tokens, and the shapes of ids and caches."""
    names = dict(zip(view.inputs(), view.input_names(), strict=True))
    order: dict[Node, None] = {}
    pending: list[tuple[Value, Node | None]] = [(value, None)]
    while pending:
        current, done = pending.pop()
        if done is not None:
            order[done] = None
            continue
        node = view.producer(current)
        if node is None:
            if view.weight(current) is None and names.get(current) != "attention_mask":
                raise Refusal(f"it depends on {names.get(current, view.name(current))}")
            continue
        if node in order:
            continue
        if traits(view.op(node)).heavy:
            raise Refusal(f"it depends on what {view.name(node)} computes")
        pending.append((current, node))
        arguments = view.arguments(node)
        only_shape = _reads_shape(view, node) and view.producer(arguments[0]) is None
        pending += [] if only_shape else [(a, None) for a in arguments]
    return list(order)


def _reads_shape(view: View, node: Node) -> bool:
    return view.native_op(node) == "Shape" or traits(view.op(node)).shape_only


def _known(view: View, env: Mapping[Value, torch.Tensor], value: Value) -> torch.Tensor:
    if value in env:
        return env[value]
    weight = view.weight(value)
    if weight is None:
        raise Refusal(f"it depends on the size of {view.name(value)}")
    return weight.read()


def _kept(work: Callable[[], T]) -> T | Refusal:
    """What is found, or why it is not: both are asked for once for each layer."""
    try:
        return work()
    except Refusal as refusal:
        return refusal
    except (GraphwrightError, RuntimeError, ValueError, IndexError) as error:
        return Refusal(f"it does not run on its own: {error}")


def _or_raise(answer: T | Refusal) -> T:
    if isinstance(answer, Refusal):
        raise answer
    return answer

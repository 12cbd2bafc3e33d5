"""``bake-prefix``: a beginning that all texts share is read once, and lies in the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, NodeFailed
from ...ir.core.types import UNKNOWN_DIM
from ...ir.core.view import Node, Value, View
from ...ir.run.batches import check_ids, table_rows
from ...ir.run.sweep import sweep
from ...ir.structure.cache_slots import PAST_AXIS, POSITIONS, answers, past_slot, present_of
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from ..base import Context, Pass, PassResult, Site
from ..narrowing import Inputs, Narrowing, Outputs
from .tokenizer_file import encoded, listed_ids, read_text, read_tokenizer

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
INSIDE = "prefixed"
"""What the length of a text behind its prefix is called inside of a graph."""


@dataclass(frozen=True, kw_only=True)
class BakePrefix(Pass):
    """Let every text stand behind a prefix, such as a system prompt, without reading it: exact.

    past => concat(keys and values of the prefix, past);  mask => concat(1, mask);  places => + P.
    The prefix is read here once; its keys and values become weights of the model, one row for any
    batch, and its time and its cache leave each text. Inputs and outputs are those of the text
    alone, and equal to the whole model's behind the prefix. ``text`` is a file, which the model's
    own tokenizer reads with the special tokens that it begins a text with; a text behind it begins
    as its reader lets it begin. ``tokens=[1 5-9 yes]`` names them instead. The longest text is
    shorter by the prefix. Put this behind passes that change what a cache holds: one with a prefix
    is none that they could take apart.
    """

    name: ClassVar[str] = "bake-prefix"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    text: str = ""
    """File of the prefix."""
    tokens: tuple[str, ...] = ()
    """Its tokens, instead: ids, runs, words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.text) == bool(self.tokens):
            raise BadInput("bake-prefix: give text=FILE or tokens=[...], one of them")

    def run(self, context: Context) -> PassResult:
        view = context.view
        prefix, named = self._prefix(view), self._inputs(view)
        result = self.plan(context)
        held = _caches(view, prefix)
        with view.made_by(self.name, context.step):
            cuts = self._cut(view, len(prefix))
            b = Builder(view, next(iter(view.nodes())))
            rows = b.size(named[IDS], dim=0)
            for name, value in named.items():
                if past_slot(name) is not None:
                    before = view.add_weight(f"{name}.prefix", context.spool.store(held[name]))
                    _put_before(b, before, value, rows, PAST_AXIS)
            ones = torch.ones(1, len(prefix), dtype=view.type(named[MASK]).dtype)
            before = view.add_weight("prefix.mask", context.spool.store(ones))
            _put_before(b, before, named[MASK], rows, 1)
            if POSITIONS in named:
                _replace_uses(view, named[POSITIONS], b.add(named[POSITIONS], len(prefix)))
        _renew(view, named[MASK], cuts)
        context.edited()
        result.narrowing = _narrowing(prefix, held)
        return result

    def _cut(self, view: View, count: int) -> set[Node]:
        """Return caches without the prefix; the nodes that cut it off."""
        outputs = dict(zip(view.output_names(), view.outputs(), strict=True))
        cuts = set()
        for name, value in outputs.items():
            maker = view.producer(value)
            if name == LOGITS or maker is None:
                continue
            b = Builder(view, view.after(maker))
            outputs[name] = b.slice(value, count, END, dim=PAST_AXIS, like=value)
            cuts.add(view.maker(outputs[name]))
        view.set_outputs(outputs)
        return cuts

    def plan(self, context: Context) -> PassResult:
        view = context.view
        count, named = len(self._prefix(view)), self._inputs(view)
        size = 0
        for name, value in named.items():
            declared = view.type(value)
            if past_slot(name) is not None and declared.dtype is not None:
                _, heads, _, width = declared.shape or (0, 0, 0, 0)
                size += count * int(heads) * int(width) * declared.dtype.itemsize
        site = Site(name="prefix", kind="cache", shape=(count,), bytes_before=0, bytes_after=size)
        return PassResult(sites=[site], notes=[f"{count} tokens stand before every text"])

    def _prefix(self, view: View) -> torch.Tensor:
        """Tokens i64 ``[count]``."""
        folder = Path(view.source.folder or "")
        ids = listed_ids(folder, self.tokens, self.name)
        if self.text:
            text = read_text(self.text, self.name)
            tokenizer, _ = read_tokenizer(folder, self.name)
            (ids,) = encoded(tokenizer, [text])
        if not ids:
            raise BadInput(f"bake-prefix: text={self.text}: empty: it holds no token")
        prefix = torch.tensor(ids)
        rows = table_rows(view)
        if IDS in rows:
            check_ids("bake-prefix", prefix, rows[IDS])
        return prefix

    def _inputs(self, view: View) -> dict[str, Value]:
        """The inputs by name. Raises ``BadInput`` where there is no cache of the usual form."""
        named = dict(zip(view.input_names(), view.inputs(), strict=True))
        pasts = [name for name in named if past_slot(name) is not None]
        if not pasts or not {IDS, MASK} <= set(named):
            raise BadInput(
                "bake-prefix: a prefix lies in a key-value cache, and the graph has none: load the "
                "model with its cache (without --no-cache)"
            )
        strange = set(answers(dict.fromkeys(view.output_names(), 0))) - {LOGITS}
        rest = set(named) - {IDS, MASK, POSITIONS, *pasts}
        if strange or rest:
            raise BadInput(
                f"bake-prefix: {min(strange or rest)} is neither words nor a cache: it takes "
                "models of text"
            )
        return named


def _caches(view: View, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys and values of the prefix by the names of the inputs, each ``[1, heads, P, width]``."""
    inputs = {IDS: prefix[None], MASK: torch.ones(1, len(prefix), dtype=torch.int64)}
    try:
        outputs = sweep(view, inputs)
    except NodeFailed as error:
        raise BadInput(f"bake-prefix: the model does not read the prefix: {error}") from None
    held = {
        name: outputs[present_of(name)] for name in view.input_names()
        if past_slot(name) is not None
    }  # fmt: skip
    if any(tensor.dim() != 4 or tensor.shape[PAST_AXIS] != len(prefix) for tensor in held.values()):
        raise BadInput("bake-prefix: the cache keeps a part of the text alone")
    return held


def _put_before(b: Builder, constant: Value, value: Value, rows: Value, dim: int) -> None:
    """Let all that reads an input read a constant, the same for each row, in front of it."""
    _, *rest = b.view.type(constant).shape or ()
    users = b.view.users(value)
    joined = b.concat(b.expand(constant, rows, *rest), value, dim=dim)
    for user in users:
        b.view.rewire(user, value, joined)


def _renew(view: View, mask: Value, cuts: Collection[Node]) -> None:
    """Forget that lengths inside are those of the inputs: they hold the prefix too."""
    total = (view.type(mask).shape or (UNKNOWN_DIM, UNKNOWN_DIM))[1]
    inside = [node for node in view.nodes() if node not in cuts]
    view.renew_types(inside, str(total), INSIDE)


def _replace_uses(view: View, old: Value, new: Value) -> None:
    for user in view.users(old):
        if user is not view.producer(new):
            view.rewire(user, old, new)


def _narrowing(prefix: torch.Tensor, held: Mapping[str, torch.Tensor]) -> Narrowing:
    """The whole model reads the prefix in front of a text; in front of what goes on from a cache it
    is given what it held of the prefix."""
    count = len(prefix)

    def widen(inputs: Inputs) -> Inputs:
        wide = dict(inputs)
        rows = len(inputs[IDS])
        ones = inputs[MASK].new_ones(rows, count)
        wide[MASK] = torch.cat([ones, inputs[MASK]], 1)
        if POSITIONS in inputs:
            wide[POSITIONS] = inputs[POSITIONS] + count
        if _goes_on(inputs):
            pasts = {n: t for n, t in inputs.items() if past_slot(n) is not None}
            grown = {n: torch.cat([held[n].expand(rows, -1, -1, -1), t], PAST_AXIS)
                     for n, t in pasts.items()}  # fmt: skip
            return wide | grown
        wide[IDS] = torch.cat([prefix.expand(rows, -1), inputs[IDS]], 1)
        if POSITIONS in inputs:
            places = torch.arange(count).expand(rows, -1)
            wide[POSITIONS] = torch.cat([places, wide[POSITIONS]], 1)
        return wide

    def narrow(inputs: Inputs) -> Inputs:
        return inputs

    def outputs(whole: Outputs) -> Outputs:
        # Where the prefix was read, there are as many rows of logits as tokens in the cache.
        lengths = {t.shape[PAST_AXIS] for n, t in whole.items() if n != LOGITS}
        read = not lengths or whole[LOGITS].shape[1] in lengths
        return {
            name: t[:, :, count:] if name != LOGITS else t[:, count:] if read else t
            for name, t in whole.items()
        }

    return Narrowing(widen, narrow, outputs)


def _goes_on(inputs: Inputs) -> bool:
    return any(t.shape[PAST_AXIS] for n, t in inputs.items() if past_slot(n) is not None)

"""``rerank-by-attention``: what the last tokens look at is the answer; what is behind it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import Node, Value, View, is_value
from ...ir.moves.attention_scores import paid
from ...ir.moves.block_path import Path
from ...ir.moves.slots import Slots
from ...ir.moves.upstream import upstream
from ...ir.structure.cache_slots import (
    PAST_AXIS,
    SLOTS_KEY,
    answers,
    past_slot,
    present_of,
    slot_layers,
)
from ...ir.structure.costs import weight_bytes
from ...ir.structure.recognize import Attention, Structure, last_tower, recognize
from ...ir.structure.words import ATTENTION
from ...ir.vocab.builder import Builder
from ..base import Context, Pass, PassResult, Site
from ..narrowing import Inputs, Narrowing, Outputs

LOGITS = "logits"
RANKING = "text-ranking"


@dataclass(frozen=True, kw_only=True)
class RerankByAttention(Pass):
    """Return what the last tokens of a text pay to each token, in the place of ``logits``.

    In-context re-ranking (ICR, Chen et al. 2024, arXiv 2410.02642): documents stand in a prompt, a
    query behind them, and the attention that the query pays to a document's tokens, summed over
    heads and blocks, is how relevant it is; no word is written. ``tools.run.reranking`` does the
    rest of it. ``attention``, f32 ``[batch, queries, tokens]``, is the mean over the heads of
    ``blocks`` for the last ``queries`` tokens of a call, a cache's tokens among those that they
    look at; of a shorter call the first row stands at the front, repeated. The head, the blocks
    behind the last of ``blocks``, with their caches, and what follows attention in that one leave:
    late blocks say little of relevance (Selective-ICR, arXiv 2602.22591), and time and bytes go
    with them. Exact: ``attention`` equals the library's own (``output_attentions``). A token that
    sees none, padding at the left, pays to all alike.
    """

    name: ClassVar[str] = "rerank-by-attention"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    blocks: str = ""
    """Blocks that count, as 4-11; all, if empty."""
    queries: int = 64
    """Last tokens whose attention is given; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 0:
            raise BadInput(f"{self.name}: queries={self.queries} must be at least 0")
        if self.blocks and any(part for _, part in Path.parse(self.blocks).steps):
            raise BadInput(f"{self.name}: blocks={self.blocks}: whole blocks have attention")

    def run(self, context: Context) -> PassResult:
        view = context.view
        before, size = view.copy(), weight_bytes(view)
        sites = self._sites(context.structure, view)
        with view.made_by(self.name, context.step):
            try:
                mean = _mean(view, [paid(view, site.node, self.queries) for site in sites])
                slots = _cut(view, mean, sites[-1].node)
            except Refusal as refusal:
                raise BadInput(f"{self.name}: {refusal}") from None
        view.drop_unused_weights()
        context.edited()
        result = self._result(view, sites, size)
        result.narrowing = self._narrowing(before, slots)
        return result

    def plan(self, context: Context) -> PassResult:
        sites = self._sites(context.structure, context.view)
        return self._result(context.view, sites, weight_bytes(context.view))

    def _result(self, view: View, sites: Sequence[Attention], size: int) -> PassResult:
        chosen = Path.of([site.block or 0 for site in sites])
        site = Site(
            name=ATTENTION, kind="output", shape=(self.queries,), bytes_before=size,
            bytes_after=weight_bytes(view), note=f"the mean over the heads of blocks {chosen}",
        )  # fmt: skip
        return PassResult(sites=[site])

    def _sites(self, structure: Structure, view: View) -> list[Attention]:
        """The attention of the blocks that count, from the first to the last."""
        if LOGITS not in view.output_names() or "input_ids" not in view.input_names():
            raise BadInput(
                f"{self.name}: takes a model that reads input_ids and gives logits, whose place "
                "attention takes"
            )
        tower = last_tower(structure)
        steps = Path.parse(self.blocks).steps if self.blocks else ()
        chosen = sorted({block for block, _ in steps}) or list(range(len(tower)))
        if chosen[-1] >= len(tower):
            raise BadInput(
                f"{self.name}: blocks={self.blocks}: there is no block {chosen[-1]}; there are 0 "
                f"to {len(tower) - 1}"
            )
        bare = next((i for i in chosen if len(tower[i].attentions) != 1), None)
        if bare is not None:
            raise BadInput(
                f"{self.name}: block {bare} has {len(tower[bare].attentions) or 'no'} attention "
                "that is seen, and one is asked: choose others by blocks="
            )
        return [structure.attentions[tower[i].attentions[0]] for i in chosen]

    def _narrowing(self, before: View, slots: int) -> Narrowing:
        """The graph before, asked for queries, keys and masks: of these ``attention`` is computed
        in torch, by none of the nodes that the pass made."""
        sites = self._sites(recognize(before), before)
        forms = [_Form.of(before, site.node) for site in sites]
        named = dict(zip(before.output_names(), before.outputs(), strict=True))
        for number, site in enumerate(sites):
            q, k, _, *masks = (o for o in before.operands(site.node) if is_value(o))
            for word, value in zip(("q", "k", "mask"), (q, k, *masks), strict=False):
                named[f"{ATTENTION}.{number}.{word}"] = value
        before.set_outputs(named)
        numbers = {name: past_slot(name) for name in before.input_names()}
        leaving = [name for name, n in numbers.items() if n is not None and n >= slots]
        types = before.input_types()

        def widen(inputs: Inputs) -> Inputs:
            # What late blocks hold is not looked at; that it is as long as the others is.
            held = next((t.shape[PAST_AXIS] for n, t in inputs.items() if numbers.get(n) == 0), 0)
            rows = len(inputs["input_ids"])
            zeros = {}
            for name in leaving:
                _, heads, _, width = types[name].shape or (0, 0, 0, 0)
                shape = (rows, int(heads), held, int(width))
                zeros[name] = torch.zeros(shape, dtype=types[name].dtype)
            return {**inputs, **zeros} if held else inputs

        def narrow(inputs: Inputs) -> Inputs:
            return {n: t for n, t in inputs.items() if n not in leaving}

        def outputs(whole: Outputs) -> Outputs:
            maps = []
            for i, form in enumerate(forms):
                q, k, mask = (whole.get(f"{ATTENTION}.{i}.{word}") for word in ("q", "k", "mask"))
                assert q is not None and k is not None
                maps.append(form.map(q, k, mask))
            mean = torch.stack(maps).mean(0)
            if self.queries:
                places = torch.arange(self.queries) + mean.shape[1] - self.queries
                mean = mean[:, places.clamp(min=0)]
            caches = whole.keys() - answers(whole).keys() - {present_of(name) for name in leaving}
            return {ATTENTION: mean} | {n: t for n, t in whole.items() if n in caches}

        return Narrowing(widen, narrow, outputs, before=before, task=RANKING)


def _mean(view: View, rows: Sequence[Value]) -> Value:
    """Of the blocks' attention, f32."""
    b = Builder(view, view.after(view.maker(rows[-1])))
    total = b.cast(rows[0], dtype=torch.float32)
    for one in rows[1:]:
        total = b.add(total, b.cast(one, dtype=torch.float32))
    return b.mul(total, 1 / len(rows))


def _cut(view: View, mean: Value, last: Node) -> int:
    """Return ``mean`` and the caches up to ``last``, the ``sdpa`` that it looks at last; how many
    slots these are. What nothing reads any more leaves."""
    slots = Slots(view)
    needed = upstream(view, mean)
    staying = [slot for node, slot in slots.sites if node in needed or node is last]
    leaving = [slot for node, slot in slots.sites if node not in needed and node is not last]
    needed |= upstream(view, *(v for slot in staying for v in slot.present))
    body = {node for node in view.nodes() if node not in needed}
    slots.release(leaving, slots.stand_ins(leaving, body), body)
    states = {value for slot in staying for value in slot.present}
    old = dict(zip(view.output_names(), view.outputs(), strict=True))
    view.set_outputs({ATTENTION: mean} | {n: v for n, v in old.items() if v in states})
    for value in old.values():
        maker = view.producer(value)
        if maker is not None and not view.users(value) and not view.is_output(value):
            view.erase_dead(maker)
    # Slots are numbered in the order of blocks, so that those that stay are the first ones.
    gone = {value for slot in leaving for value in slot.past}
    inputs = zip(view.input_names(), view.inputs(), strict=True)
    view.set_inputs({name: value for name, value in inputs if value not in gone})
    if SLOTS_KEY in view.metadata():
        layers = slot_layers(view.metadata())
        view.metadata()[SLOTS_KEY] = json.dumps(layers[: len(staying)])
    return len(staying)


# --- the same in torch ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How one site makes its logits."""

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, view: View, site: Node) -> _Form:
        attrs, shape = view.attrs(site), view.type(view.tensor(site, 0)).shape or ()
        return cls(attrs["scale"] or 1 / math.sqrt(int(shape[-1])), attrs["softcap"])

    def map(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mean of the heads ``[batch, queries, keys]`` f32."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q @ k.mT).float() * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        elif mask is not None:
            logits = logits + mask
        return torch.softmax(logits, -1).mean(1)

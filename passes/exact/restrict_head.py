"""``restrict-head``: of all words, compute the likelihoods of some."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.moves.pick_rows import Rows, pick_head_rows
from ...ir.structure.recognize import Linear, Structure
from ...ir.structure.words import HEAD_KEY
from ..base import Context, Pass, PassResult, Site
from ..narrowing import Inputs, Narrowing, Outputs
from .tokenizer_file import listed_ids

LOGITS = "logits"


@dataclass(frozen=True, kw_only=True)
class RestrictHead(Pass):
    """Keep the rows of the head that an application can say: labels, yes and no, digits.

    ``tokens=[yes no 1-9 523]`` are ids, runs of them, and words of the model's ``tokenizer.json``,
    in this order. ``logits`` are then of these alone, ``[.., count]``, equal to those columns of
    the model's own; the metadata ``graphwright.head_tokens`` says which they are, and
    ``optimize-model generate`` writes among them. Of a small model the head is a fifth to two
    thirds of all bytes; where it is tied to the embedding, that stays, and time alone is saved.
    """

    name: ClassVar[str] = "restrict-head"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    tokens: tuple[str, ...]
    """Ids, runs of them, or words of the tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens:
            raise BadInput("restrict-head: tokens is empty: a head says one token at least")

    def run(self, context: Context) -> PassResult:
        view = context.view
        head = find_head(context.structure, self.name)
        ids = self._ids(view, head)
        site = self._site(view, head, len(ids))
        try:
            rows = Rows(ids, context.spool)
            pick_head_rows(view, head, rows, rule=self.name, step=context.step)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        before = json.loads(view.metadata().get(HEAD_KEY, "[]"))
        chosen = [before[i] for i in ids] if before else ids.tolist()
        view.metadata()[HEAD_KEY] = json.dumps(chosen)
        context.edited()

        def outputs(whole: Outputs) -> Outputs:
            return {n: t[..., ids] if n == LOGITS else t for n, t in whole.items()}

        return PassResult(sites=[site], narrowing=Narrowing(_same, _same, outputs))

    def plan(self, context: Context) -> PassResult:
        head = find_head(context.structure, self.name)
        ids = self._ids(context.view, head)
        return PassResult(sites=[self._site(context.view, head, len(ids))])

    def _ids(self, view: View, head: Linear) -> torch.Tensor:
        ids = listed_ids(Path(view.source.folder or ""), self.tokens, self.name)
        beyond = next((i for i in ids if i >= head.out_features), None)
        if beyond is not None:
            raise BadInput(
                f"restrict-head: there is no token {beyond}: {head.name} has rows 0 to "
                f"{head.out_features - 1}"
            )
        twice = next((i for i, times in Counter(ids).items() if times > 1), None)
        if twice is not None or not ids:
            raise BadInput(
                f"restrict-head: the token {twice} is named twice" if ids else
                f"restrict-head: tokens=[{' '.join(self.tokens)}] names none"
            )  # fmt: skip
        return torch.tensor(ids)

    def _site(self, view: View, head: Linear, count: int) -> Site:
        weight = view.weight(head.weight)
        assert weight is not None
        tied = len(view.users(head.weight)) > 1
        after = weight.nbytes // head.out_features * count
        return Site(
            name=head.name, kind="head", shape=(count, head.in_features),
            bytes_before=0 if tied else weight.nbytes, bytes_after=after,
            note="tied to the embedding, which stays" if tied else "",
        )  # fmt: skip


def _same(inputs: Inputs) -> Inputs:
    return inputs


def find_head(structure: Structure, asked_by: str) -> Linear:
    """The one head of a graph. Raises ``BadInput`` where there is none, or are several."""
    heads = [linear for linear in structure.linears if linear.role == "head"]
    if len(heads) != 1:
        raise BadInput(
            f"{asked_by}: the graph has {len(heads) or 'no'} linears from the stream to words; it "
            "takes a model with one"
        )
    return heads[0]

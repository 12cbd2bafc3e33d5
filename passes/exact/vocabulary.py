"""``vocabulary``: a model that knows the words of one text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...ir.core.errors import BadInput, Refusal
from ...ir.core.scratch import Scratch
from ...ir.core.view import View
from ...ir.moves.pick_rows import Rows, pick_head_rows, pick_table_rows
from ...ir.structure.recognize import Embedding, Linear
from ...ir.vocab import traits
from ..base import Context, Pass, PassResult, Site
from ..narrowing import Inputs, Narrowing, Outputs
from .restrict_head import LOGITS
from .tokenizer_file import (
    FILE,
    closed,
    encoded,
    read_text,
    read_tokenizer,
    renumbered_config,
    special_ids,
    trimmed,
)

IDS = "input_ids"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
OTHERS = ("preprocessor_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Pass):
    """Trim embedding, head and tokenizer to the tokens of a text.

    What stays are the tokens that the model's own tokenizer reads ``text`` as, those that they are
    put together from, the special ones, and single letters and bytes, in which any other text can
    still be spelled: with more tokens. Ids are numbered anew, in ``tokenizer.json`` and in the
    configs too. The text is read as before, and on the tokens that stay the outputs are the model's
    own. Of a small model of many languages tables are a fifth to two thirds of all bytes.
    """

    name: ClassVar[str] = "vocabulary"
    exact: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    text: str
    """A file of what the model will read and say."""

    def run(self, context: Context) -> PassResult:
        view = context.view
        staying, folder = self._kept(view)
        table, heads = self._places(context, staying)
        sites = self._sites(context, table, heads, len(staying))
        rows = Rows(torch.tensor(staying), context.spool)
        try:
            for head in heads:
                pick_head_rows(view, head, rows, rule=self.name, step=context.step)
            pick_table_rows(view, table, rows, rule=self.name, step=context.step)
        except Refusal as refusal:
            raise BadInput(f"{self.name}: {refusal}") from None
        context.edited()
        note = f"{len(staying)} of {table.rows} tokens stay"
        return PassResult(
            sites=sites, notes=[note], narrowing=_narrowing(rows.ids, table.rows, folder)
        )

    def plan(self, context: Context) -> PassResult:
        staying, _ = self._kept(context.view)
        return PassResult(sites=self._sites(context, *self._places(context, staying), len(staying)))

    def _kept(self, view: View) -> tuple[list[int], Scratch]:
        """The ids that stay, and a folder with the files that say so."""
        lines, folder = read_text(self.text, self.name).splitlines(), Path(view.source.folder or "")
        tokenizer, content = read_tokenizer(folder, self.name)
        if not any(line.strip() for line in lines):
            raise BadInput(f"vocabulary: text={self.text}: empty: it holds no word to keep")
        read = encoded(tokenizer, lines)
        configs = {name: _json(folder / name) for name in CONFIGS}
        special = special_ids(configs["config.json"]) | special_ids(configs[CONFIGS[1]])
        staying = closed(content, {i for ids in read for i in ids} | special)
        new = {old: place for place, old in enumerate(staying)}
        scratch = Scratch("vocabulary")
        text = json.dumps(trimmed(content, staying), ensure_ascii=False)
        (scratch.path / FILE).write_text(text, encoding="utf-8")
        for name, config in configs.items():
            if config is not None:
                changed = renumbered_config(config, new, len(staying))
                (scratch.path / name).write_text(json.dumps(changed, indent=2) + "\n")
        for name in OTHERS:
            if (folder / name).is_file():
                (scratch.path / name).write_bytes((folder / name).read_bytes())
        smaller, _ = read_tokenizer(scratch.path, self.name)
        again = [[staying[i] for i in ids] for ids in encoded(smaller, lines)]
        if again != read:
            line = next(i for i, (a, b) in enumerate(zip(again, read, strict=True), 1) if a != b)
            raise BadInput(
                f"vocabulary: {folder / FILE} is of a kind that cannot be trimmed: with fewer "
                f"tokens, line {line} of {self.text} is read as others"
            )
        return staying, scratch

    def _places(self, context: Context, staying: list[int]) -> tuple[Embedding, list[Linear]]:
        """The table that the ids pick from, and the heads as wide as it. Raises ``BadInput`` where
        ids are read by anything else."""
        view, structure = context.view, context.structure
        named = dict(zip(view.input_names(), view.inputs(), strict=True))
        if IDS not in named:
            raise BadInput(f"vocabulary: the graph takes no {IDS}, it takes {', '.join(named)}")
        tables = [e for e in structure.embeddings if named[IDS] in view.operands(e.node)]
        others = set(view.users(named[IDS])) - {e.node for e in tables}
        blind = [
            n for n in others if view.op(n) not in ("shape", "size") and not _is_blind(view, n)
        ]
        if len(tables) != 1 or blind:
            reader = f"{view.name(blind[0])} ({view.native_op(blind[0])})" if blind else "no table"
            raise BadInput(
                f"vocabulary: {reader} reads {IDS}: ids have another meaning there than rows of "
                "one table, and cannot be numbered anew"
            )
        (table,) = tables
        if max(staying) >= table.rows:
            raise BadInput(
                f"vocabulary: the tokenizer has the token {max(staying)}, and {table.name} has "
                f"{table.rows} rows: is it another model's?"
            )
        heads = [x for x in structure.linears if x.role == "head" and x.out_features == table.rows]
        return table, heads

    def _sites(
        self, context: Context, table: Embedding, heads: list[Linear], count: int
    ) -> list[Site]:
        view, sites, sizes = context.view, [], {}
        for name, value in ((table.name, table.weight), *((h.name, h.weight) for h in heads)):
            weight = view.weight(value)
            if weight is None or weight.key in sizes:
                continue
            sizes[weight.key] = weight.nbytes
            sites.append(
                Site(
                    name=name, kind="table", shape=(count, *weight.shape[1:]),
                    bytes_before=weight.nbytes,
                    bytes_after=weight.nbytes // weight.shape[0] * count,
                )
            )  # fmt: skip
        return sites


def _is_blind(view: View, node: Any) -> bool:
    """Whether a node sees the shape of what it reads and nothing else."""
    return traits(view.op(node)).shape_only or view.native_op(node) in (
        "Shape",
        "aten.sym_size.int",
    )


def _narrowing(rows: torch.Tensor, count: int, folder: Scratch) -> Narrowing:
    places = torch.zeros(count, dtype=torch.int64)
    places[rows] = torch.arange(len(rows))

    def widen(inputs: Inputs) -> Inputs:
        return {n: rows[t] if n == IDS else t for n, t in inputs.items()}

    def narrow(inputs: Inputs) -> Inputs:
        return {n: places[t] if n == IDS else t for n, t in inputs.items()}

    def lacking(inputs: Inputs) -> str:
        ids = inputs.get(IDS, rows)
        strange = ids[~torch.isin(ids, rows)]
        return f"the token {int(strange[0])} of it is not in the vocabulary" if len(strange) else ""

    def outputs(whole: Outputs) -> Outputs:
        wide = {n: t[..., rows] for n, t in whole.items() if n == LOGITS and t.shape[-1] == count}
        return whole | wide

    return Narrowing(widen, narrow, outputs, lacking, folder)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None

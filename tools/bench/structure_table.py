"""What is recognised in each family of models, from FX and from ONNX, as a table.

``python -m graphwright.tools.bench.structure_table [FAMILY ...] [--markdown]`` makes a small
model of every family with random weights, without a download, traces it, translates it to ONNX, and
prints what the graphs alone tell. It ends with 1 where that is not what the model's config
says, or where the two graphs differ.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...backends.onnx.lowering import translated
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, Refusal, near_misses
from ...ir.core.quiet import quiet
from ...ir.core.view import View
from ...ir.fx.view import FxView
from ...ir.load.sources import load
from ...ir.structure.recognize import Structure, recognize
from ...ir.structure.vision import find_image_tokens, find_patches

LAYERS = 2
_BODY = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
_GROUPED = _BODY | {
    "intermediate_size": 56, "num_key_value_heads": 2, "vocab_size": 97,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_WHOLE = _BODY | {"vocab_size": 97, "max_position_embeddings": 64, "intermediate_size": 56}
_VISION = _BODY | {"intermediate_size": 56, "image_size": 16, "patch_size": 4}
_GPT2 = {"n_layer": LAYERS, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 64}
_OPT = _BODY | {"vocab_size": 97, "max_position_embeddings": 64, "ffn_dim": 56,
                "word_embed_proj_dim": 32}  # fmt: skip
_GEMMA2 = _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 10}
_GATED = {"q": 1, "k": 1, "v": 1, "o": 1, "gate": 1, "up": 1, "down": 1}
_PLAIN = {"q": 1, "k": 1, "v": 1, "o": 1, "fc1": 1, "fc2": 1}


@dataclass(frozen=True)
class Family:
    """A small model of one family, by transformers' names, and what a person would see in it."""

    model: str
    config: str
    sizes: Mapping[str, Any]
    roles: Mapping[str, int]
    """Linears of a block, by role."""
    head: int = 1
    """Linears that make an output."""
    other: int = 0
    """Linears outside of blocks that make none: a pooler, a projector."""
    kv_heads: int = 4
    tower: int = 0
    """Blocks of the vision tower before the language model."""
    patches: str = ""
    """Rows and columns of patches, and whether there is a CLS token."""

    @property
    def generates(self) -> bool:
        return self.model.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED, _GATED, kv_heads=2),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, _GATED, kv_heads=2),
    "mistral": Family("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 4},
                      _GATED, kv_heads=2),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", _GEMMA2, _GATED, kv_heads=2),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2, {"qkv": 1, "o": 1, "fc1": 1, "fc2": 1}),
    "opt": Family("OPTForCausalLM", "OPTConfig", _OPT, _PLAIN),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED,
                   {"qkv": 1, "o": 1, "gate_up": 1, "down": 1}, kv_heads=2),
    "bert": Family("BertModel", "BertConfig", _WHOLE, _PLAIN, head=0, other=1),
    "vit": Family("ViTForImageClassification", "ViTConfig", _VISION, _PLAIN,
                  patches="4x4 patches, CLS"),
    "clip": Family("CLIPVisionModelWithProjection", "CLIPVisionConfig",
                   _VISION | {"projection_dim": 24}, _PLAIN, patches="4x4 patches, CLS"),
    "clip-text": Family("CLIPTextModelWithProjection", "CLIPTextConfig",
                        _WHOLE | {"projection_dim": 24, "eos_token_id": 2}, _PLAIN),
    "llava": Family(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": _VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 3},
         "text_config": _GROUPED | {"model_type": "llama"},
         "image_token_id": 96, "image_seq_length": 16},
        _GATED, other=2, kv_heads=2, tower=2, patches="4x4 patches, CLS",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a graph tells, in words that do not depend on its kind."""

    blocks: tuple[int, ...]
    """Blocks of each tower, in order."""
    attention: tuple[tuple[int | None, int | None, int | None], ...]
    """Heads, key and value heads, size of a head; of each site in order."""
    linears: tuple[tuple[str, str, int | None], ...]
    """Name, role and block."""
    images: str = ""
    slots: tuple[bool, ...] = ()
    """For each attention site, in a graph with a cache, whether its slot is recognised."""


def read_facts(view: View, family: Family) -> Facts:
    """Recognise a raised graph. Raises ``Refusal`` where images are looked for and not found."""
    structure = recognize(view)
    towers = Counter(block.tower for block in structure.blocks)
    return Facts(
        tuple(towers[t] for t in sorted(towers)),
        tuple((a.heads, a.kv_heads, a.head_dim) for a in structure.attentions),
        tuple((x.name, x.role, x.block) for x in structure.linears),
        _images(view, structure) if family.patches else "",
    )


def _images(view: View, structure: Structure) -> str:
    if len(view.input_names()) == 1:
        patches = find_patches(view, structure)
        return f"{_grid(patches.grid)} patches{', CLS' if patches.cls_token else ''}"
    images = find_image_tokens(view, structure)
    return (
        f"tower of {len(images.tower)}, {_grid(images.grid)} patches"
        f"{', CLS' if images.cls_token else ''}; {len(images.projector)} linears "
        f"project, {images.patches} tokens enter before block {images.language[0].index}"
    )


def _grid(grid: tuple[int, int] | None) -> str:
    return "no grid of" if grid is None else f"{grid[0]}x{grid[1]}"


def problems(family: Family, facts: Facts) -> list[str]:
    """What a graph does not tell as the family's config does, a sentence each."""
    expected = (*(family.tower,) * bool(family.tower), LAYERS)
    lines: list[str] = []
    if facts.blocks != expected:
        lines.append(f"{facts.blocks} blocks, the model has {expected}")
    if len(facts.attention) != sum(facts.blocks):
        lines.append(f"{len(facts.attention)} attention sites in {sum(facts.blocks)} blocks")
    for index, heads in enumerate(facts.attention):
        config_heads = (4, 4 if index < family.tower else family.kv_heads, 8)
        if heads != config_heads:
            lines.append(f"attention of {heads}, the model has {config_heads}")
    for index in range(sum(facts.blocks)):
        roles = Counter(role for _, role, block in facts.linears if block == index)
        config_roles = _PLAIN if index < family.tower else family.roles
        if roles != Counter(config_roles):
            lines.append(f"block {index} has {_counted(roles)}, not {_counted(config_roles)}")
    outside = Counter(role for _, role, block in facts.linears if block is None)
    if outside["head"] != family.head or outside.total() != family.head + family.other:
        lines.append(f"outside of blocks {_counted(outside)}, not {family.head} head(s) and "
                     f"{family.other} other(s)")  # fmt: skip
    if family.patches not in facts.images:
        lines.append(f"images: {facts.images}; the model has {family.patches}")
    if family.generates and facts.slots != (True,) * LAYERS:
        lines.append(f"cache slots at {facts.slots}, the model has one a layer")
    return lines


def _counted(roles: Mapping[str, int]) -> str:
    return ", ".join(f"{role or 'no role'} {n}" for role, n in sorted(roles.items())) or "nothing"


@dataclass(frozen=True)
class Row:
    """One family: what its FX graph tells, and what is wrong."""

    name: str
    facts: Facts | None
    problems: tuple[str, ...]


def examine(name: str) -> Row:
    """Make a family's model and read its graphs, with and without a cache, of both kinds."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory(prefix="graphwright-structure-") as folder:
        save(family, folder)
        graphs: list[tuple[str, Facts]] = []
        try:
            cached = list(graphs_of(folder, cache=True)) if family.generates else []
            for kind, view in graphs_of(folder, cache=False):
                facts = read_facts(view, family)
                for other in (v for k, v in cached if k == kind):
                    facts = replace(facts, slots=_slots(other, layers=facts.blocks[-1:]))
                graphs.append((kind, facts))
        except (Refusal, BadInput) as error:
            return Row(name, None, (str(error),))
    wrong = [f"{kind}: {text}" for kind, facts in graphs for text in problems(family, facts)]
    if graphs[0][1] != graphs[1][1]:
        wrong.append("FX and ONNX differ")
    return Row(name, graphs[0][1], tuple(wrong))


def save(family: Family, folder: str) -> None:
    import transformers

    torch.manual_seed(0)
    with quiet():
        config = getattr(transformers, family.config)(**family.sizes)
        getattr(transformers, family.model)(config).save_pretrained(folder)


def graphs_of(folder: str, *, cache: bool) -> Iterable[tuple[str, View]]:
    fx = load(folder, cache=cache)
    assert isinstance(fx, FxView)
    for kind, view in (("FX", fx), ("ONNX", translated(fx))):
        canonicalize(view)
        yield kind, view


def _slots(view: View, layers: Sequence[int]) -> tuple[bool, ...]:
    sites = recognize(view).attentions
    return tuple(site.cache is not None for site in sites[-sum(layers) :])


COLUMNS = ("family", "blocks", "heads / kv x size", "linears of a block", "outside", "images",
           "cache", "FX = ONNX")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row's text, column by column."""
    facts = row.facts
    if facts is None:
        return row.name, "not recognised", *[""] * (len(COLUMNS) - 3), "no"
    first = sum(facts.blocks[:-1])
    roles = [role or "?" for _, role, block in facts.linears if block == first]
    free = [(name, role) for name, role, block in facts.linears if block is None]
    outside = [role or name.rpartition(".")[2] for name, role in free]
    sites = dict.fromkeys(f"{h} / {kv} x {d}" for h, kv, d in facts.attention)
    slots = f"{sum(facts.slots)} of {len(facts.slots)}" if facts.slots else "-"
    same = "no" if any("differ" in text for text in row.problems) else "yes"
    return (
        row.name, " + ".join(map(str, facts.blocks)), ", ".join(sites), " ".join(roles),
        ", ".join(outside) or "-", facts.images or "-", slots, same,
    )  # fmt: skip


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console, *, markdown: bool
) -> None:
    """For a terminal, or as Markdown, row by row as they come."""
    if markdown:
        for line in itertools.chain((columns, ["---"] * len(columns)), rows):
            console.print(Text("| " + " | ".join(line) + " |"), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def printed(rows: Sequence[Row], console: Console, *, markdown: bool) -> None:
    """Print the table, then what is wrong."""
    print_table(COLUMNS, list(map(cells, rows)), console, markdown=markdown)
    for row in rows:
        for text in row.problems:
            console.print(Text(f"{row.name}: {text}"), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where something is not recognised, 2 for a family that is not known."""
    parser = argparse.ArgumentParser(prog="structure_table", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    names = asked.families or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            print(f"error: no family {name!r}; {near_misses(name, FAMILIES)}", file=sys.stderr)
            return 2
    rows = []
    for name in names:
        print(f"reading {name}", file=sys.stderr)
        rows.append(examine(name))
    printed(rows, Console(width=None if sys.stdout.isatty() else 150), markdown=asked.markdown)
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

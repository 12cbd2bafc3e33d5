"""Blocks left out, halved and run again in each family that writes, in steps with its cache.

``python -m graphwright.tools.bench.family_depths [--only GLOB ...] [--markdown]`` makes a small
model of every family with random weights and four layers or more, edits its graph with the cache,
and reads and writes 16 tokens by ours, as a graph and in ONNX Runtime. The judge is the library's
own model with a cache of its own: a layer that is left out gives back what it takes, the modules of
a half give zeros, a layer that is run again has a copy behind it that keeps a cache of its own. A
cell says ``equal`` where all logits are, what was refused, or how far they are.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path as Folder
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch.utils import _pytree as pytree

from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MODEL_FILE, write_model
from ...backends.registry import compile as compile_model
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, GraphwrightError, Refusal, first_line, near_misses
from ...ir.core.quiet import quiet
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.tracing.original import ModuleOriginal
from ...ir.load.tracing.plain_call import cache_argument
from ...ir.moves import Path, follow
from ...ir.moves.bypass_blocks import bodies
from ...ir.run.sweep import sweep
from ...ir.structure.cache_slots import answers, past_of, past_slot
from ...ir.structure.layers import Block
from ...ir.structure.recognize import last_tower, recognize
from ...ir.structure.units import Part, in_halves, whole
from .families import save
from .family_models import FAMILIES
from .family_table import LAYERS, Family
from .structure_table import print_table

STEPS = 16
BOUND = 1e-4
"""Of the largest difference of two logits, by the largest logit."""
COLUMNS = ("family", "layers", "none", "a block", "attention", "feed-forward", "a block twice")
Tensors = dict[str, torch.Tensor]
Call = Callable[[Tensors], Mapping[str, torch.Tensor]]


def names() -> list[str]:
    """The families that continue a text by a decoder alone, and those of them that see images whose
    layers keep a state."""
    seeing = ("lfm2-vl", "qwen3.5-vl", "qwen3.5-moe-vl")
    return [name for name, family in FAMILIES.items()
            if name in seeing or (family.cache and len(family.blocks) == 1)]  # fmt: skip


def deeper(family: Family) -> Family:
    """The family with twice the layers of its text, where there are few of a kind."""
    sizes = family.sizes
    if "text_config" in sizes:
        return replace(family, sizes={**sizes, "text_config": _doubled(sizes["text_config"])})
    return replace(family, sizes=_doubled(sizes))


def _doubled(sizes: Mapping[str, Any]) -> dict[str, Any]:
    counts = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers = next(int(sizes[name]) for name in counts if name in sizes)
    if layers > LAYERS and "layer_types" in sizes and not sizes.get("num_kv_shared_layers", 1):
        return dict(sizes)  # two layers of each kind
    more: dict[str, Any] = {}
    for name, value in sizes.items():
        if name in counts:
            more[name] = 2 * layers
        elif name in ("attn_layer_indices", "moe_layers"):
            more[name] = [*value, *(i + layers for i in value)]
        elif name == "attention_types":
            more[name] = [[kinds, 2 * count] for kinds, count in value]
        elif name != "vocab_size" and isinstance(value, list) and len(value) == layers:
            more[name] = value * 2
    return {**sizes, **more}


# --- the library's own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """The model of a family, its layers, and for each block of the graph its layer's module."""

    model: Any
    layers: torch.nn.ModuleList
    config: Any

    @classmethod
    def of(cls, view: View, count: int) -> Library:
        original = view.source.original
        assert isinstance(original, ModuleOriginal)
        with quiet():
            model: Any = original.make().eval()
        config = model.config.get_text_config(decoder=True)
        part = model.get_decoder() if hasattr(model, "get_decoder") else model
        lists = [m for m in part.modules() if isinstance(m, torch.nn.ModuleList)]
        layers = next((m for m in lists if len(m) == config.num_hidden_layers), None)
        if layers is None or len(layers) != count:
            raise BadInput(
                f"{count} blocks, and the library has {config.num_hidden_layers} layers")
        return cls(model, layers, config)

    @contextmanager
    def through(self, path: Path, halves: Mapping[str, Sequence[str]]) -> Iterator[Any]:
        """Meanwhile its layers are those of a path. ``halves`` are the linears of each half by its
        name. Gives the config of a cache."""
        config, before = copy.deepcopy(self.config), list(self.layers)
        steps = Counter(path.steps)
        try:
            for i, layer in enumerate(before):
                parts = {part for block, part in steps if block == i}
                if not parts:
                    _patch(layer, _gives_back)
                elif parts in ({"attn"}, {"mlp"}):
                    (kept,) = parts
                    lost = "mlp" if kept == "attn" else "attn"
                    for child in _children(layer, i, halves[f"block {i}.{lost}"]):
                        _patch(child, _gives_zeros)
                elif steps[i, ""] == 2:
                    again = copy.deepcopy(layer)
                    _grow(config, i)
                    for module in again.modules():
                        for name in {"layer_idx", "layer_id"} & vars(module).keys():
                            setattr(module, name, config.num_hidden_layers - 1)
                    _patch(layer, _twice(again))
            yield config
        finally:
            for module in self.layers.modules():
                vars(module).pop("forward", None)


def _grow(config: Any, index: int) -> None:
    """One layer more, of the kind of another: in whatever a config says layer by layer."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [*value, value[index]])
    for name in ("num_hidden_layers", *config.attribute_map.values()):
        if getattr(config, name, None) == count and "layer" in name:
            setattr(config, name, count + 1)
    if getattr(config, "num_kv_shared_layers", 0):
        config.num_kv_shared_layers = 0  # those that keep nothing are no longer the last ones
    indices = getattr(config, "attn_layer_indices", None)
    if indices is not None and index in indices:
        config.attn_layer_indices = [*indices, count]


Patch = Callable[[Callable[..., Any]], Callable[..., Any]]


def _patch(module: torch.nn.Module, by: Patch) -> None:
    module.forward = by(module.forward)


def _gives_back(forward: Callable[..., Any]) -> Callable[..., Any]:
    def passed(*args: Any, **kwargs: Any) -> Any:
        stream = _stream(args, kwargs)
        return _instead(forward(*args, **kwargs), stream)

    return passed


def _gives_zeros(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What a module adds to ``residual`` itself (BLOOM, MPT) is that alone."""
    signature = inspect.signature(forward)

    def silent(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        added_to = signature.bind(*args, **kwargs).arguments.get("residual")
        return _instead(output, torch.zeros_like(_first(output)) if added_to is None else added_to)

    return silent


def _twice(again: torch.nn.Module) -> Patch:
    def patch(forward: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if args:
                return again(_first(output), *args[1:], **kwargs)
            return again(**{**kwargs, "hidden_states": _first(output)})

        return both

    return patch


def _stream(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    stream: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return stream


def _first(output: Any) -> torch.Tensor:
    return next(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))


def _instead(output: Any, stream: torch.Tensor) -> Any:
    """An output with another tensor in the place of its first one."""
    first = _first(output)
    return pytree.tree_map(lambda leaf: stream if leaf is first else leaf, output)


def _children(
    layer: torch.nn.Module, index: int, linears: Sequence[str]
) -> list[torch.nn.Module]:
    """The modules of a layer that hold these linears."""
    words = [name.split(f".{index}.", 1)[1].split(".")[0] for name in linears
             if f".{index}." in name]  # fmt: skip
    found = dict(layer.named_children())
    children = [found[word] for word in dict.fromkeys(words) if word in found]
    if not children:
        raise BadInput(f"no module of the library's is named that holds {', '.join(linears[:2])}")
    return children


def judged_by(library: Library, config: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits ``[rows, steps, words]`` of the library's model behind a prompt and behind each of the
    tokens after it, by its own cache."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=config)
    name, mask = cache_argument(library.model), torch.ones_like(ids)
    placed = "position_ids" in inspect.signature(library.model.forward).parameters
    logits, held = [], 0
    for end in range(prompt, ids.shape[1]):
        # Left alone, some models count what their first layer keeps, which may be no token.
        places = torch.arange(held, end).expand(len(ids), -1)
        more = {"position_ids": places} if placed else {}
        with torch.no_grad(), quiet():
            output = library.model(
                input_ids=ids[:, held:end], attention_mask=mask[:, :end], use_cache=True,
                **{name: cache}, **more,
            )  # fmt: skip
        logits.append(output.logits[:, -1])
        held = end
    return torch.stack(logits, 1)


# --- ours -----------------------------------------------------------------------------------------


def in_steps(
    call: Call, given: Sequence[str], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, and the logits ``[rows, steps, words]``; ``given`` are the inputs' names."""
    keyed = any(past_slot(name) is not None for name in given)
    state: Tensors = {}
    last, logits = ids, []
    for _ in range(STEPS):
        shown = torch.ones_like(ids if keyed else last)
        outputs = call({"input_ids": last, "attention_mask": shown, **state})
        logits.append(outputs["logits"][:, -1])
        last = logits[-1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, last], 1)
        state = {past_of(n): t for n, t in outputs.items() if n not in answers(dict(outputs))}
    return ids, torch.stack(logits, 1)


def eager(view: View) -> Call:
    return lambda feeds: sweep(view, _taken(feeds, view))


def in_onnx_runtime(view: View, folder: Folder) -> Call:
    write_model(lowered(view).model, folder)
    run = compile_model(folder / MODEL_FILE, optimize=False)
    return lambda feeds: run(**_taken(feeds, view))


def _taken(feeds: Tensors, view: View) -> Tensors:
    taken = {name: t for name, t in feeds.items() if name in view.input_names()}
    types = view.input_types()
    if "pixel_values" in types:
        shape = (types["pixel_values"].shape or ())[1:]
        taken["pixel_values"] = torch.zeros(0, *(int(size) for size in shape))
    return taken


# --- both -----------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str
    cells: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    wrong: bool = False


def edits(view: View, blocks: Sequence[Block]) -> list[list[Path | None]]:
    """By column the paths to try, of each kind of block one, and the last; ``None`` where it has no
    halves. A kind is the ops of a block's nodes."""
    units = whole(blocks)
    kinds = [str(sorted(Counter(view.op(n) or "" for n in body).items()))
             for body in bodies(view, units)]  # fmt: skip
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    halved = {unit.block for unit in in_halves(blocks) if unit.part}
    every = range(len(blocks))

    def only(i: int, kept: Part) -> Path | None:
        """All blocks, and of one a half."""
        return Path(tuple((b, kept if b == i else "") for b in every)) if i in halved else None

    return [
        [Path.of(b for b in every if b != i) for i in sorted({*firsts, len(blocks) - 1})],
        [only(i, "mlp") for i in firsts],
        [only(i, "attn") for i in firsts],
        [Path.of(sorted([*every, i])) for i in firsts],
    ]


def judge(name: str, family: Family) -> Row:
    row = Row(name)
    with tempfile.TemporaryDirectory(prefix="graphwright-depths-") as scratch:
        folder = Folder(scratch) / "model"
        try:
            save(deeper(family), folder)
            view = load(folder, cache=True)
            canonicalize(view)
            blocks = last_tower(recognize(view))
            row.cells.append(str(len(blocks)))
            library = Library.of(view, len(blocks))
            row.cells.append(_tried(row, view, library, [Path.of(range(len(blocks)))], folder))
            for paths in edits(view, blocks):
                row.cells.append(_tried(row, view, library, paths, folder))
        except GraphwrightError as error:
            row.words.append(first_line(error).replace(f"{folder}", "the folder"))
        except Exception as error:
            row.words.append(f"{type(error).__name__}: {first_line(error)}")
    return row


def _tried(
    row: Row, view: View, library: Library, paths: Sequence[Path | None], folder: Folder
) -> str:
    """A cell: what comes of these paths."""
    found: Counter[str] = Counter()
    for path in paths:
        if path is None:
            found["no halves"] += 1
            continue
        try:
            verdict = _compared(view, library, path, folder.parent)
        except Refusal as refusal:
            verdict = "refused"
            row.words.append(f"path {path}: {refusal.reason}")
        except Exception as error:
            # The library's own code may not run so: that row is not judged, the others are.
            verdict = "not judged"
            row.words.append(f"path {path}: {first_line(error)}")
        if verdict.startswith("off"):
            row.wrong = True
            row.words.append(f"path {path}: {verdict}")
            verdict = "DIFFERENT"
        found[verdict] += 1
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{count} {verdict}" for verdict, count in found.items())


def _compared(view: View, library: Library, path: Path, folder: Folder) -> str:
    edited = view.copy()
    blocks = last_tower(recognize(edited))
    halves = {
        f"block {i}.{part}": [name for sub in subs for name in sub.linears]
        for i, block in enumerate(blocks)
        for part, subs in (("attn", block.sub_blocks[:1]), ("mlp", block.sub_blocks[1:]))
    }  # fmt: skip
    follow(edited, blocks, path, rule="path")
    rng = torch.Generator().manual_seed(3)
    prompt = torch.randint(5, 90, (2, 6), generator=rng)
    place = Folder(tempfile.mkdtemp(dir=folder))
    gaps = []
    for call in (eager(edited), in_onnx_runtime(edited, place)):
        ids, logits = in_steps(call, edited.input_names(), prompt)
        with library.through(path, halves) as config:
            expected = judged_by(library, config, ids, prompt.shape[1])
        gaps.append(float((logits - expected).abs().max() / expected.abs().max()))
    if max(gaps) <= BOUND:
        return "equal"
    return f"off by {gaps[0]:.1e} as a graph, {gaps[1]:.1e} in ONNX Runtime"


def printed(rows: Sequence[Row], console: Console, *, markdown: bool) -> None:
    cells = [(row.name, *row.cells, *[""] * (len(COLUMNS) - 1 - len(row.cells))) for row in rows]
    print_table(COLUMNS, cells, console, markdown=markdown)
    console.print(Text(""))
    for row in rows:
        for text in row.words:
            console.print(Text(f"* {row.name}: {text}"), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a path writes something else, 2 for a glob that fits nothing."""
    parser = argparse.ArgumentParser(prog="family_depths", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB",
                        help="families of these names")  # fmt: skip
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    known = names()
    for glob in asked.only:
        if not any(fnmatchcase(name, glob) for name in known):
            print(f"error: no family {glob!r}; {near_misses(glob, known)}", file=sys.stderr)
            return 2
    rows = []
    for name in known:
        if not any(fnmatchcase(name, glob) for glob in asked.only):
            continue
        rows.append(judge(name, FAMILIES[name]))
        # A run that is stopped has shown what it came to.
        print(" | ".join((name, *rows[-1].cells, *rows[-1].words)), file=sys.stderr, flush=True)
    printed(rows, Console(width=None if sys.stdout.isatty() else 150), markdown=asked.markdown)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

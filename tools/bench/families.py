"""What holds for which family of models, as a table: loaded, counted, quantized, exact.

``python -m graphwright.tools.bench.families [--only GLOB ...] [--markdown]`` makes a small model of
each of over 250 families with random weights, without a download, saves it as a folder, loads that
folder as ``gw.load`` does, and holds what ONNX Runtime makes of the graph against the library's own
model: on a sample, on inputs of other sizes and, with a cache, on a chunk and a step after them;
with the last block left out, whose module in the library's model then gives what it takes; and, of
what writes text, in the tokens of greedy decoding. About ten seconds a family on one core. It ends
with 1 where a graph gives other numbers than the library, which nothing may do in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MODEL_FILE, write_model
from ...backends.registry import compile as compile_model
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, GraphwrightError, InvalidGraph, first_line, near_misses
from ...ir.core.quiet import quiet
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.tracing.original import ModuleOriginal
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Seen, ask_source
from ...ir.run.verify import RUNTIME_REL_L2, Difference, difference
from ...ir.structure.cache_slots import answers
from ...ir.structure.recognize import recognize
from ...passes.manager import optimize
from ...passes.report import versions
from .family_models import FAMILIES
from .family_table import Family
from .family_uses import left_out, without_block, written, written_by_pair
from .structure_table import print_table

SECONDS = 150
"""Time that one family may take."""
BOUND = RUNTIME_REL_L2[torch.float32]
QUANTIZE = "quantize{bits=8 group=32}"


@dataclass
class Row:
    """One family, and what holds for it. What was not come to is empty."""

    name: str
    loads: bool = False
    blocks: str = ""
    """``2 + 2``; where there should be others, ``4, not 2 + 2``."""
    attention: str = ""
    """Attention sites, in the same words."""
    linears: str = ""
    """Linears of the graph, of those that the library's model runs."""
    quantized: str = ""
    """Linears that ``quantize`` stored, of the same; a head that is tied to a table may stay with
    it."""
    exact: Difference | None = None
    """The worst output on a sample and on other sizes, ONNX Runtime's against the library's."""
    cache: Difference | None = None
    """The same on a chunk and a step behind them."""
    depth: Difference | None = None
    """The same with the last block left out, against the library's without that block."""
    generate: str = ""
    """``equal`` where greedy decoding writes the library's tokens."""
    words: tuple[str, ...] = ()
    """What was refused, or is wrong."""
    wrong: bool = False
    """Whether the artifact gives other numbers, and nothing refused it."""

    @property
    def counted(self) -> bool:
        return bool(self.blocks) and "not" not in self.blocks + self.attention

    @property
    def whole(self) -> bool:
        count, _, ran = self.quantized.partition(" of ")
        return bool(ran) and int(count) >= int(ran)


def save(family: Family, folder: Path) -> None:
    """Write a family's model with random weights: biases and norms too, that a lost one shows."""
    with quiet():
        library = importlib.import_module(family.library)
        torch.manual_seed(0)
        sizes = family.sizes
        if family.config:
            config = getattr(library, family.config)(**sizes)
            model = getattr(library, family.model)(config)
        else:
            model = getattr(library, family.model)(**sizes)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
        model.save_pretrained(folder)


def judge(name: str, family: Family) -> Row:
    """Make a family's model and try what people do with it."""
    row = Row(name)
    with tempfile.TemporaryDirectory(prefix="graphwright-family-") as scratch:
        folder = Path(scratch) / "model"
        steps: tuple[Callable[[Family, Path], None], ...] = (
            save, partial(_load_and_compare, row), partial(_quantize, row), partial(_use, row),
        )  # fmt: skip
        for step in steps:
            try:
                with _at_most(SECONDS):
                    step(family, folder)
            except Exception as error:
                # A row says what went wrong, whatever it is: the other families go on.
                kind = "" if isinstance(error, GraphwrightError) else f"{type(error).__name__}: "
                row.words += (kind + first_line(error).replace(f"{folder}", "the folder"),)
                if not row.loads:
                    break
    return row


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _load_and_compare(row: Row, family: Family, folder: Path) -> None:
    view = load(folder)
    row.loads = True
    read = view.copy()
    canonicalize(read)
    _count(row, family, read)
    plain, cached = _held(row, view, folder.parent / "whole")
    row.exact = _worst(plain) if len(plain) > 1 else None
    row.cache = _worst(cached)
    if "decoder_input_ids" in view.input_names() and family.cache:
        parts = ("encoder", "decoder", "decoder_with_past")
        by_part = [_held(row, load(folder, part=part), folder.parent / part)[0] for part in parts]
        row.cache = _worst([gap for gaps in by_part for gap in gaps])


def _held(row: Row, view: View, folder: Path) -> tuple[list[Difference], list[Difference]]:
    """ONNX Runtime's outputs against the library's: on a sample and on other sizes, and with a
    cache on what follows."""
    truth = ask_source(view, [sample_inputs(view)])
    if truth.unheard:
        row.words += (truth.unheard,)
    folder.mkdir()
    write_model(lowered(view).model, folder)
    run = compile_model(folder / MODEL_FILE, optimize=False)
    gaps: list[Difference] = []
    for seen in (*truth.samples, *truth.probes):
        gap = _furthest(seen, run(**seen.inputs))
        row.words += (f"{seen.what}: {gap}",) if isinstance(gap, str) else ()
        gaps.append(_NONE if isinstance(gap, str) else gap)
    row.wrong |= not all(gap.within(BOUND) for gap in gaps)
    return gaps[:2], gaps[2:]


def _worst(gaps: Sequence[Difference]) -> Difference | None:
    return max(gaps, key=lambda gap: gap.rel_l2, default=None)


_NONE = Difference(float("inf"), 0.0, float("inf"))


def _furthest(seen: Seen, outputs: Any) -> Difference | str:
    """The output that is furthest from the library's, or why that cannot be told."""
    lost = sorted(set(seen.outputs) - set(outputs))
    if lost:
        return f"no output {', '.join(lost)}"
    try:
        gaps = [difference(tensor, outputs[name]) for name, tensor in seen.outputs.items()]
    except InvalidGraph as error:
        return str(error)
    return max(gaps, key=lambda gap: 0.0 if gap.within(BOUND) else gap.rel_l2)


def _count(row: Row, family: Family, read: View) -> None:
    structure = recognize(read)
    towers = Counter(block.tower for block in structure.blocks)
    blocks = tuple(towers[tower] for tower in sorted(towers))
    row.blocks = _beside(_sum(blocks), _sum(family.blocks))
    sites = sum(family.blocks) if family.sites is None else family.sites
    row.attention = _beside(str(len(structure.attentions)), str(sites))
    row.linears = f"{len(structure.linears)} of {_linears_run(read)}"


def _beside(actual: str, expected: str) -> str:
    return actual if actual == expected else f"{actual}, not {expected}"


def _sum(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts)) or "0"


def _linears_run(view: View) -> int:
    """How many linears of the library's own model have a part in its outputs; experts and
    convolutions of a kernel of 1 are such, and one whose input is a constant is none."""
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    with quiet():
        module = original.make().eval()
    module.requires_grad_(True)
    calls: list[tuple[Any, float]] = []
    hooks = [
        part.register_forward_hook(lambda part, x, _: calls.append((part, float(x[0].sum()))))
        for part in module.modules() if _is_linear(part)
    ]  # fmt: skip
    for seed in (1, 0):
        first, calls = calls, []
        module.train().eval()  # which forgets what a call left: LeViT keeps biases with their graph
        _run_backwards(original, module, sample_inputs(view, seed=seed))
    for hook in hooks:
        hook.remove()
    moved = [part for (part, x), (_, y) in zip(calls, first, strict=True) if x != y]
    stacks = [
        (1 + ("gate_up" in name and not part.is_transposed)) * stack.shape[0]
        for part in module.modules() for name, stack in part.named_parameters(recurse=False)
        if hasattr(part, "is_transposed") and stack.dim() == 3
    ]  # fmt: skip
    return sum(stacks) + sum(part.weight.grad is not None for part in moved)


def _run_backwards(original: ModuleOriginal, module: Any, inputs: Any) -> None:
    with quiet(), torch.enable_grad():
        outputs = original.call(module, inputs)
        total = torch.stack([t.sum() for t in outputs.values() if t.requires_grad]).sum()
        total.backward()  # type: ignore[no-untyped-call]


def _is_linear(part: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(part, torch.nn.Conv1d | torch.nn.Conv2d):
        return part.groups == 1 and set(part.kernel_size) == {1}
    return isinstance(part, torch.nn.Linear | Conv1D)


def _quantize(row: Row, family: Family, folder: Path) -> None:
    done = optimize(load(folder), QUANTIZE).report.passes[-1].result
    tied = sum("tied to an embedding" in reason for _, reason in done.refused)
    row.quantized = f"{len(done.sites) + tied} of {row.linears.partition(' of ')[2]}"
    others = [(site, reason) for site, reason in done.refused
              if not re.search("tied to an embedding|the kernel is", reason)]  # fmt: skip
    row.words += tuple(f"{site}: {reason}" for site, reason in others[:2])


def _use(row: Row, family: Family, folder: Path) -> None:
    """Let it write, and leave a block out."""
    view = load(folder)
    if family.cache:
        _write(row, view, folder)
    inputs = sample_inputs(view)
    read = view.copy()
    canonicalize(read)
    try:
        path = left_out(read)
        expected = without_block(read, inputs)
    except BadInput as error:
        row.words += (f"depth: {error}",)
        return
    place = folder.parent / "shorter"
    place.mkdir()
    write_model(lowered(optimize(view, path, samples=[inputs]).graph).model, place)
    outputs = compile_model(place / MODEL_FILE, optimize=False)(**inputs)
    gap = _furthest(Seen("a sample", inputs, answers(expected)), outputs)
    row.words += (f"depth: {gap}",) if isinstance(gap, str) else ()
    row.depth = _NONE if isinstance(gap, str) else gap
    row.wrong |= not row.depth.within(BOUND)


def _write(row: Row, view: View, folder: Path) -> None:
    if "decoder_input_ids" in view.input_names():
        ours, theirs = written_by_pair(view, folder, folder.parent / "pair")
    else:
        ours, theirs = written(view, folder.parent / "whole" / MODEL_FILE)
    equal = ours == theirs
    row.generate, row.wrong = "equal" if equal else "WRONG", row.wrong or not equal
    row.words += () if equal else (f"it writes {ours}, not {theirs}",)
    if len({token for text in ours for token in text}) == 1:
        row.words += ("all that it writes is one word, which proves little",)


COLUMNS = ("family", "loads", "blocks", "attention", "linears", "quantized", "exact", "cache",
           "depth", "generate")  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row's text, column by column."""
    return (
        row.name, "yes" if row.loads else "no", row.blocks, row.attention, row.linears,
        row.quantized, _distance(row.exact), _distance(row.cache), _distance(row.depth),
        row.generate,
    )  # fmt: skip


def _distance(gap: Difference | None) -> str:
    return "" if gap is None else f"{gap.rel_l2:.1e}" + ("" if gap.within(BOUND) else " WRONG")


def summary(rows: Sequence[Row]) -> str:
    """How many of the families each thing holds for."""
    caches = [row for row in rows if FAMILIES[row.name].cache]
    facts = {
        "load": [row.loads for row in rows],
        "counted right": [row.counted for row in rows],
        "every linear quantized": [row.whole for row in rows],
        "exact on other shapes": [_holds(row.exact) for row in rows],
        "cache exact": [_holds(row.cache) for row in caches],
        "right without a block": [_holds(row.depth) for row in rows],
        "the library's text": [row.generate == "equal" for row in caches],
        "wrong in silence": [row.wrong for row in rows],
    }
    return ", ".join(f"{what} {sum(held)} of {len(held)}" for what, held in facts.items())


def _holds(gap: Difference | None) -> bool:
    return gap is not None and gap.within(BOUND)


def printed(rows: Sequence[Row], console: Console, *, markdown: bool) -> None:
    """Print the table, the counts, and what was refused."""
    print_table(COLUMNS, list(map(cells, rows)), console, markdown=markdown)
    console.print(Text(f"\n{len(rows)} families: {summary(rows)}.\n"), soft_wrap=True)
    for row in rows:
        for text in row.words:
            console.print(Text(f"* {row.name}: {text}"), soft_wrap=True)


def _when() -> str:
    """The day and what was installed."""
    known = versions() | {"diffusers": _version("diffusers")}
    names = ("torch", "transformers", "diffusers", "onnxruntime", "onnxruntime-gpu", "onnx")
    installed = ", ".join(f"{name} {known[name]}" for name in names if known.get(name))
    return f"{date.today()}, {installed}\n"


def _version(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where an artifact is wrong in silence, 2 for a glob that fits nothing."""
    parser = argparse.ArgumentParser(prog="families", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB",
                        help="families of these names")  # fmt: skip
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args(arguments)
    for glob in asked.only:
        if not any(fnmatchcase(name, glob) for name in FAMILIES):
            print(f"error: no family {glob!r}; {near_misses(glob, FAMILIES)}", file=sys.stderr)
            return 2
    names = [name for name in FAMILIES if any(fnmatchcase(name, glob) for glob in asked.only)]
    rows = []
    for name in names:
        print(f"judging {name}", file=sys.stderr, flush=True)
        rows.append(judge(name, FAMILIES[name]))
        # A run that is stopped has shown what it came to.
        print(" | ".join((*cells(rows[-1]), *rows[-1].words)), file=sys.stderr, flush=True)
    print(_when())
    printed(rows, Console(width=None if sys.stdout.isatty() else 150), markdown=asked.markdown)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m graphwright.tools.bench.hostile``: commands on files that were damaged on purpose.

Valid ONNX, safetensors, configs, manifests, recipes, ``.npz`` and ``.pt2`` are mutated; runs are
killed at every operation on files and started again; artifacts are read while they are replaced.
All of it follows from seeds. Each command has a bound on time and memory. *Handled* is exit 0 with
the source's own result, or exit 1, 2 or 3 with words that are not "internal error".
``--case onnx/17`` repeats one case and keeps its files. Linux alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import hostile_mutations as mutate
from . import hostile_sources as sources
from .hostile_kills import kills, readers
from .hostile_worker import MEMORY, SECONDS, Ended, command, forked

Case = Callable[[Random, Path, Path], str]
"""Make a case in the second folder out of the valid files in the first, and run it: what was not
handled, or nothing."""
RECIPES = ("clean{optional=true}", "quantize{bits=8 group=32}")
WRONG = "wrong: "
MIXED = (
    "quantize{bits=4 group=32 symmetric=true include=[*]},eora{rank=2}",
    "hqq{bits=3 group=32},drop-blocks{count=1}", "magnitude{share=0.5},bitstack{blocks=2 rank=2}",
)  # fmt: skip


def fault(ended: Ended) -> str:
    """What was not handled of a command, whatever it was given; empty where all was."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    last = next((line for line in lines if "internal error" in line), lines[-1] if lines else "")
    if ended.status < 0:
        why = f"more than {SECONDS:g} s" if ended.late else "a crash"
        return f"signal {-ended.status}: {why}: {last}"
    if "internal error" in ended.output or "Traceback" in ended.output:
        return last
    if ended.status not in (0, 1, 2, 3) or (ended.status and not lines):
        return f"exit {ended.status}: {last}"
    if "\x1b" in ended.output:
        return "an escape sequence was printed"
    return ""


def _judged(case: Path, ended: Ended, source: Path, recipe: str) -> str:
    """``fault``, or what is wrong of a result that was taken for right."""
    problem, out = fault(ended), case / "work" / "out" / "model.onnx"
    if problem or ended.status or not out.is_file():
        return problem
    bound = next(b for name, b in sources.WRONG.items() if recipe.startswith(name))

    def judge() -> int:
        print(f"\n{WRONG}{sources.wrong(source, out, bound)}")
        return 0

    child = forked(case, judge)
    return child.output.rpartition(WRONG)[2].strip() if child.status == 0 else ""


def _onnx(rng: Random, valid: Path, case: Path) -> str:
    import onnx

    name = rng.choice(("m.onnx", "outside.onnx", "attention.onnx"))
    work = case / "work"
    shutil.copy(valid / "outside.data", work)
    path = work / name
    if rng.random() < 0.3:
        path.write_bytes(mutate.of_bytes(rng, (valid / name).read_bytes()))
    else:
        model = onnx.load(valid / name, load_external_data=False)
        mutate.message(rng, model)
        path.write_bytes(model.SerializeToString())
    if name == "outside.onnx" and rng.random() < 0.3:
        data = work / "outside.data"
        data.write_bytes(mutate.of_bytes(rng, data.read_bytes()))
    if rng.random() < 0.2:
        return fault(command(case, ["inspect", name, "--text"]))
    recipe = rng.choice(RECIPES)
    return _judged(case, command(case, [name, "-p", recipe, "-o", "out"]), path, recipe)


def _llama(
    file: str, change: Callable[[Random, bytes], bytes], rng: Random, valid: Path, case: Path
) -> str:
    folder = case / "work" / "llama"
    shutil.copytree(valid / "llama", folder)
    (folder / file).write_bytes(change(rng, (folder / file).read_bytes()))
    recipe = rng.choice(RECIPES)
    return _judged(case, command(case, ["llama", "-p", recipe, "-o", "out"]), folder, recipe)


def _pt2(rng: Random, valid: Path, case: Path) -> str:
    path = case / "work" / "m.pt2"
    path.write_bytes(mutate.archive(rng, (valid / "m.pt2").read_bytes()))
    recipe = rng.choice(RECIPES)
    return _judged(case, command(case, ["m.pt2", "-p", recipe, "-o", "out"]), path, recipe)


def _npz(rng: Random, valid: Path, case: Path) -> str:
    data = mutate.archive(rng, (valid / "data.npz").read_bytes())
    (case / "work" / "data.npz").write_bytes(data)
    recipe = "quantize{bits=3 group=32},eora{rank=2}"
    return fault(command(case, [str(valid / "m.onnx"), "-p", recipe, "--calib", "data.npz"]))


def _manifest(rng: Random, valid: Path, case: Path) -> str:
    folder = case / "work" / "made"
    shutil.copytree(valid / "made", folder)
    path = folder / "graphwright.json"
    path.write_bytes(mutate.json_text(rng, path.read_bytes()))
    verb = rng.choice((
        ["diff", "made", str(valid / "made")], ["replay", "made"], ["replay", "made", "-o", "out"],
        ["inspect", "made"], ["resize", "made", "--max-bytes", "9000", "-o", "out"],
        ["eval", "made", "--tasks", "latency", "--rounds", "1"],
    ))  # fmt: skip
    return fault(command(case, verb))


def _recipe(rng: Random, valid: Path, case: Path) -> str:
    passes = mutate.text(rng, rng.choice(MIXED))
    model, data = str(valid / "m.onnx"), str(valid / "data.npz")
    if rng.random() < 0.5:
        return fault(command(case, [model, "-p", passes, "--calib", data]))
    known = 'summary = "s"\n[[passes]]\nname = "quantize"\nbits = 4\ngroup = 32\ninclude = ["*"]\n'
    (case / "work" / "mine.toml").write_text(mutate.text(rng, known))
    return fault(command(case, [model, "-r", "mine.toml"]))


KINDS: dict[str, Case] = {
    "onnx": _onnx,
    "safetensors": partial(_llama, "model.safetensors", mutate.safetensors),
    "config": partial(_llama, "config.json", mutate.json_text),
    "manifest": _manifest,
    "recipe": _recipe,
    "npz": _npz,
    "pt2": _pt2,
    "kill": kills,
    "read": readers,
}
HEAVY = {"kill": 6, "read": 40}
"""Rounds of which one runs a kind that takes longer."""


@dataclass(frozen=True)
class Found:
    """One case: what was not handled of it, or nothing."""

    kind: str
    seed: int
    fault: str


def prepare(folder: Path) -> None:
    """The valid files, an artifact among them, and all imports that commands make."""
    sources.write_all(folder)
    model, data = str(folder / "m.onnx"), str(folder / "data.npz")
    recipe = "bitstack{blocks=3 rank=2}"
    ended = command(folder, [model, "-p", recipe, "--calib", data, "-o", "made"])
    if ended.status:
        raise SystemExit(f"{ended.output}\nended with {ended.status}")
    (folder / "work" / "made").rename(folder / "made")
    for name in ("tools.run.pipeline", "tools.run.replay", "tools.run.resize",
                 "tools.run.evaluation", "tools.cli.terminal", "ir.load.hf.folder",
                 "ir.load.pt2_file", "backends.runtimes.onnxruntime",
                 "backends.runtimes.triton"):  # fmt: skip
        __import__(f"{__package__.partition('.')[0]}.{name}")
    for name in ("onnxruntime", "onnx", "transformers", "transformers.models.llama.modeling_llama"):
        __import__(name)


def run_case(kind: str, seed: int, valid: Path, folder: Path) -> Found:
    """One case in a folder of its own."""
    (folder / "work").mkdir(parents=True)
    return Found(kind, seed, KINDS[kind](Random(f"{kind}/{seed}"), valid, folder))


def campaign(kinds: Sequence[str], minutes: float, seed: int, valid: Path) -> Iterator[Found]:
    """Cases of all kinds in turns until the time is over."""
    until = time.monotonic() + 60 * minutes
    round_ = 0
    while time.monotonic() < until:
        for kind in kinds:
            if round_ % HEAVY.get(kind, 1) or time.monotonic() > until:
                continue
            with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
                yield run_case(kind, seed + round_, valid, Path(folder) / "case")
        round_ += 1


def table(cases: Sequence[Found]) -> Table:
    """Handled of tried, by kind."""
    tried = Counter(case.kind for case in cases)
    handled = Counter(case.kind for case in cases if not case.fault)
    table = Table("kind", "handled", "tried")
    for kind, count in tried.items():
        table.add_row(kind, str(handled[kind]), str(count))
    table.add_row("all", str(handled.total()), str(tried.total()))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the status is 1 where something was not handled."""
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--case", help="KIND/SEED: this one alone; its files are kept")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="hostile-valid-") as valid:
        prepare(Path(valid))
        if options.case:
            kind, _, seed = options.case.partition("/")
            place = Path(tempfile.mkdtemp(prefix="hostile-")) / "case"
            console.print(Text(f"{run_case(kind, int(seed), Path(valid), place)}\n{place}"))
            return 0
        cases: list[Found] = []
        kinds = options.kinds.split(",")
        for case in campaign(kinds, options.minutes, options.seed, Path(valid)):
            cases.append(case)
            if case.fault:
                console.print(Text(f"{case.kind}/{case.seed}: {ascii(case.fault)[:300]}"))
    console.print(table(cases))
    bounds = f"{SECONDS:g} s of the processor and {MEMORY >> 20} MiB"
    console.print(f"within {bounds} each, seeds from {options.seed}")
    return int(any(case.fault for case in cases))


if __name__ == "__main__":
    sys.exit(main())

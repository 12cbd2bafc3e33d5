"""``python -m graphwright.tools.bench.int4 DIR... --peer-python PYTHON``: the cost of an int4 run.

``optimize-model DIR -p 'quantize{bits=4 group=32}' -o OUT``, every check on, beside
onnxruntime-genai's model builder, which checks nothing, on the same Hugging Face folders in turns.
The builder wants other versions of what we need, so it gets an environment of its own::

    python -m venv PEER
    PEER/bin/pip install onnxruntime-genai "torch>=2.11,<2.14" transformers onnx onnx-ir onnxruntime
    python -m graphwright.tools.bench.int4 DIR --peer-python PEER/bin/python

Folders come from ``graphwright.tools.bench.checkpoints``. ``--threads 1`` sets OpenMP's number for
both; ``default`` leaves the choice to each library. ONNX Runtime's own threads are not bound by it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...ir.core.errors import GraphwrightError, Missing
from . import phases
from .processes import OPTIMIZE_MODEL, Usage, environment, measure

PASSES = "quantize{bits=4 group=32}"
OURS, PEER = "optimize-model", "genai builder"


@dataclass(frozen=True)
class Run:
    """One command on one checkpoint."""

    checkpoint: str
    source_bytes: int
    threads: int | None
    tool: str
    usage: Usage
    artifact_bytes: int


def measured(
    folders: Sequence[Path],
    peer: str,
    threads: Sequence[int | None],
    scratch: Path | None,
    passes: str,
) -> list[Run]:
    """Both tools on each folder with each number of threads; ``peer=""`` leaves the other out.

    Raises ``CommandFailed`` where one of them fails.
    """
    runs = []
    for count in threads:
        for folder in folders:
            for tool in (OURS, PEER) if peer else (OURS,):
                runs.append(_run(tool, folder, peer, count, scratch, passes))
    return runs


def _run(
    tool: str, folder: Path, peer: str, threads: int | None, scratch: Path | None, passes: str
) -> Run:
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        out = Path(place) / "out"
        if tool == OURS:
            command = [*OPTIMIZE_MODEL, "run", str(folder), "-p", passes, "-o", str(out)]
            extra = {}
        else:
            command = [
                peer, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out),
                "-p", "int4", "-e", "cpu", "-c", str(Path(place) / "cache"),
            ]  # fmt: skip
            extra = {"PYTHONPATH": ""}  # its packages are its own
        usage = measure(command, environment(threads, extra))
        return Run(folder.name, _weights(folder), threads, tool, usage, _models(out))


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _models(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def table(runs: Sequence[Run], passes: str = PASSES) -> Table:
    """A row a run; our rows end with our part of the other's seconds and memory."""
    title = f"{passes}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    result = Table(title=title, title_justify="left")
    result.add_column("checkpoint")
    for name in (
        "MB", "threads", "tool", "user+system s", "s / GB", "wall s", "peak RSS MB",
        "peak anonymous MB", "artifact MB", "seconds / peer", "RSS / peer", "anonymous / peer",
    ):  # fmt: skip
        result.add_column(name, justify="left" if name == "tool" else "right")
    peers = {(r.checkpoint, r.threads): r.usage for r in runs if r.tool == PEER}
    for run in runs:
        other = peers.get((run.checkpoint, run.threads)) if run.tool == OURS else None
        result.add_row(
            run.checkpoint, _mb(run.source_bytes), str(run.threads or "default"), run.tool,
            f"{run.usage.seconds:.1f}", f"{run.usage.seconds / run.source_bytes * 1e9:.1f}",
            f"{run.usage.wall:.1f}", _mb(run.usage.peak_rss),
            _mb(run.usage.peak_anonymous), _mb(run.artifact_bytes), *_ratios(run.usage, other),
        )  # fmt: skip
    return result


def _ratios(ours: Usage, other: Usage | None) -> tuple[str, str, str]:
    if other is None:
        return "", "", ""
    pairs = (
        (ours.seconds, other.seconds), (ours.peak_rss, other.peak_rss),
        (ours.peak_anonymous, other.peak_anonymous),
    )  # fmt: skip
    one, two, three = (f"{mine / theirs:.2f}" for mine, theirs in pairs)
    return one, two, three


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def thread_counts(text: str) -> list[int | None]:
    """``1,default`` as ``[1, None]``. Raises ``ValueError`` for what is not a count."""
    counts = [None if part == "default" else int(part) for part in text.split(",")]
    if any(count is not None and count < 1 for count in counts):
        raise ValueError(f"{text}: give 1 or more threads, or default")
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; with ``--phases``, where our seconds go, too."""
    parser = argparse.ArgumentParser(
        prog="int4", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--peer-python", default="", help="of the builder's environment")
    parser.add_argument("--threads", type=thread_counts, default=thread_counts("1,default"))
    parser.add_argument("--scratch", type=Path, help="where artifacts lie until they are counted")
    parser.add_argument("-p", "--passes", default=PASSES)
    parser.add_argument("--phases", action="store_true", help="where our seconds go, too")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        for folder in options.folders:
            if not (folder / "config.json").is_file():
                raise Missing(f"{folder}: no config.json; make one with bench.checkpoints")
        runs = measured(
            options.folders, options.peer_python, options.threads, options.scratch, options.passes
        )
        console.print(table(runs, options.passes))
        for folder in options.folders if options.phases else ():
            console.print(_phases(folder, options.threads[0], options.scratch, options.passes))
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _phases(folder: Path, threads: int | None, scratch: Path | None, passes: str) -> str:
    """The table of ``phases``, from a process of its own, which imports anew."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        arguments = ["run", str(folder), "-p", passes, "-o", f"{place}/out"]
        command = [sys.executable, "-m", phases.__name__, *arguments]
        return measure(command, environment(threads)).output


if __name__ == "__main__":
    raise SystemExit(main())

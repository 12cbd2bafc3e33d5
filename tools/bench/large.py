"""``python -m graphwright.tools.bench.large DIR``: a 7B model, killed half way and resumed.

Makes a random checkpoint of Llama-2-7B's shape in ``DIR`` (13.5 GB, deleted in the end), forecasts
an int4 run (``--dry-run``), starts it, kills it when half of its matrices are done, and goes on
with ``--resume``. ``--twice`` makes the artifact without a kill, too, and compares the bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...backends.artifacts.claim import partial_folder
from ...ir.core.errors import BadInput, DiskFull, GraphwrightError
from ..run.resume import SUFFIX
from .checkpoints import SHAPES, Shape, write
from .int4 import PASSES
from .processes import OPTIMIZE_MODEL, Usage, environment, measure

DISK = 3
"""Times the checkpoint's bytes that the disk must have: two artifacts and a run's state beside it
take less than it does each."""


@dataclass(frozen=True)
class Outcome:
    """What the runs took, and what they made."""

    forecast: dict[str, float]
    """``seconds``, ``peak_rss_bytes`` and ``artifact_bytes``."""
    killed: Usage
    resumed: Usage
    unkilled: Usage | None
    artifact_bytes: int
    same_bytes: bool | None
    """``None`` where there is no unkilled run to compare with."""


def measured(folder: Path, shape: Shape, passes: str, threads: int | None, twice: bool) -> Outcome:
    """Checkpoint and artifacts lie in ``folder`` while it runs, and are deleted in the end.

    Raises ``DiskFull`` before anything is written, ``CommandFailed`` where a run fails, and
    ``BadInput`` where it ended before it could be killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < DISK * shape.nbytes:
        raise DiskFull(f"{folder}: the disk must have {DISK * shape.nbytes:,} free bytes")
    with tempfile.TemporaryDirectory(prefix="large-", dir=folder) as place:
        source, out, other = (Path(place) / name for name in ("model", "out", "unkilled"))
        write(shape, source)
        env = environment(threads)
        command = [*OPTIMIZE_MODEL, "run", str(source), "-p", passes]
        plan = json.loads(measure([*command, "--dry-run", "--json"], env).output)
        killed = measure(
            [*command, "-o", str(out)], env, _half_done(out, plan), check=False
        )  # fmt: skip
        if killed.status != -9:
            raise BadInput(f"the run ended with {killed.status} before it was killed")
        resumed = measure([*command, "-o", str(out), "--resume"], env)
        unkilled = measure([*command, "-o", str(other)], env) if twice else None
        files = _models(out)
        same = _digests(out) == _digests(other) if twice else None
        size = sum(path.stat().st_size for path in files)
        return Outcome(plan["predicted"], killed, resumed, unkilled, size, same)


def _half_done(out: Path, plan: dict[str, Any]) -> Callable[[], bool]:
    """Whether the run's state holds as many results as half of the sites that were forecast."""
    half = sum(len(step["sites"]) for step in plan["passes"]) // 2
    state = partial_folder(out)
    return lambda: state.is_dir() and len(list(state.glob(f"*{SUFFIX}"))) >= half


def _models(folder: Path) -> list[Path]:
    return sorted(folder.glob("model.onnx*"))


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in _models(folder):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def table(outcome: Outcome, shape: Shape) -> Table:
    """A row a run; the last compares the forecast with what the whole took."""
    title = f"{shape.parameters / 1e9:.2f}B parameters, {shape.nbytes / 1e9:.1f} GB"
    result = Table(title=title, title_justify="left")
    for name in ("", "user+system s", "wall s", "peak RSS GB", "peak anonymous GB", "artifact GB"):
        result.add_column(name, justify="right" if name else "left")
    predicted, whole = outcome.forecast, outcome.unkilled or _joined(outcome)
    result.add_row(
        "forecast", "", f"{predicted['seconds']:.0f}", _gb(predicted["peak_rss_bytes"]), "",
        _gb(predicted["artifact_bytes"]),
    )  # fmt: skip
    result.add_row("killed half way", *_usage(outcome.killed), "")
    result.add_row("resumed", *_usage(outcome.resumed), _gb(outcome.artifact_bytes))
    if outcome.unkilled is not None:
        result.add_row("not killed", *_usage(outcome.unkilled), _gb(outcome.artifact_bytes))
    result.add_row(
        "forecast / run", f"{predicted['seconds'] / whole.seconds:.2f}",
        f"{predicted['seconds'] / whole.wall:.2f}",
        f"{predicted['peak_rss_bytes'] / whole.peak_rss:.2f}",
        f"{predicted['peak_rss_bytes'] / whole.peak_anonymous:.2f}",
        f"{predicted['artifact_bytes'] / outcome.artifact_bytes:.2f}",
    )  # fmt: skip
    return result


def _joined(outcome: Outcome) -> Usage:
    """Both parts of a killed run: what was loaded twice counts twice."""
    one, two = outcome.killed, outcome.resumed
    return Usage(
        one.seconds + two.seconds, one.wall + two.wall, max(one.peak_rss, two.peak_rss),
        max(one.peak_anonymous, two.peak_anonymous), two.status, two.output,
    )  # fmt: skip


def _usage(usage: Usage) -> tuple[str, str, str, str]:
    return (
        f"{usage.seconds:.1f}", f"{usage.wall:.0f}", _gb(usage.peak_rss),
        _gb(usage.peak_anonymous),
    )  # fmt: skip


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the status is 1 where the resumed run made other bytes."""
    parser = argparse.ArgumentParser(
        prog="large", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=SHAPES, default="l7")
    parser.add_argument("-p", "--passes", default=PASSES)
    parser.add_argument("--threads", type=int, help="of OpenMP; as libraries choose")
    parser.add_argument("--twice", action="store_true", help="compare with a run not killed")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    try:
        outcome = measured(options.folder, shape, options.passes, options.threads, options.twice)
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    Console(width=None if sys.stdout.isatty() else 120).print(table(outcome, shape))
    if outcome.same_bytes is None:
        return 0
    verb = "the same bytes as" if outcome.same_bytes else "OTHER BYTES than"
    sys.stdout.write(f"The resumed run made {verb} the one that was not killed.\n")
    return 0 if outcome.same_bytes else 1


if __name__ == "__main__":
    raise SystemExit(main())

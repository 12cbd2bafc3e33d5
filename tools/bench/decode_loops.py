"""``python -m graphwright.tools.bench.decode_loops DIR --peer-python PYTHON``: ours and genai's.

Both loops run one folder, an artifact with its ``genai_config.json``, each in a process of its own
that loads it once. They take turns at a few tokens: what else the machine does meets both. A cell
holds the median over the turns, tokens a second by the clock, and by the processor's time where
there is one thread. The tokens that both write are compared. onnxruntime-genai needs plain
``onnxruntime``, so it gets an environment of its own::

    python -m venv PEER && PEER/bin/pip install onnxruntime-genai numpy

Our loop runs in this environment, or by ``--python`` in another one: the two should have the same
release of ONNX Runtime, which the table names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...ir.core.errors import GraphwrightError, Missing
from . import decode_ours, decode_worker
from .processes import CommandFailed, environment

OURS, PEER = "ours", "genai"
PROMPTS, TURNS, TOKENS = (16, 256, 1024), 8, 8


@dataclass
class Times:
    """What one loop took in one cell: seconds by the clock and of the processor."""

    read: list[tuple[float, float]] = field(default_factory=list)
    written: list[tuple[float, float]] = field(default_factory=list)


class Worker:
    """A loop in a process of its own."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        self.name = name
        ours = name == OURS
        module = ["-m", decode_ours.__name__] if ours else ["-P", decode_worker.__file__]
        extra = {} if ours else {"PYTHONPATH": ""}  # a peer's packages are its own
        self._process = subprocess.Popen(
            [python, *module, str(folder), str(threads)], env=environment(threads, extra),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.library = self._heard()

    def ask(self, *words: object) -> Any:
        """What it answers. Raises ``CommandFailed`` where it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CommandFailed(f"the loop {self.name} ended: see its message above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def cell(workers: Sequence[Worker], prompt: int, rounds: int) -> tuple[dict[str, Times], bool]:
    """Times of all loops at one length of prompt, and whether they wrote the same tokens."""
    times = {worker.name: Times() for worker in workers}
    texts = {}
    for _ in range(rounds):
        for worker in workers:
            times[worker.name].read.append(worker.ask("read", prompt, TURNS * TOKENS + 1))
        for _ in range(TURNS):
            for worker in workers:
                times[worker.name].written.append(worker.ask("write", TOKENS))
        texts = {worker.name: tuple(worker.ask("text")) for worker in workers}
    return times, len(set(texts.values())) == 1


def measured(
    folder: Path, pythons: dict[str, str], threads: Sequence[int], prompts: Sequence[int],
    rounds: int,
) -> Table:  # fmt: skip
    """A row for each number of threads, prompt and loop."""
    table = Table(title=f"{folder.name}; load {os.getloadavg()[0]:.1f}", title_justify="left")
    for name in (
        "threads", "prompt", "loop", "reading tok/s", "writing tok/s", "best", "by processor",
        "tokens",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "loop" else "right")
    for count in threads:
        workers = [Worker(name, python, folder, count) for name, python in pythons.items()]
        for prompt in prompts:
            times, same = cell(workers, prompt, rounds)
            for worker in workers:
                found = times[worker.name]
                clock, used = zip(*found.written, strict=True)
                by_processor = _rate(TOKENS, used) if count == 1 else ""
                table.add_row(
                    str(count), str(prompt), f"{worker.name} ({worker.library})",
                    _rate(prompt, [wall for wall, _ in found.read]), _rate(TOKENS, clock),
                    f"{TOKENS / min(clock):.1f}", by_processor, "equal" if same else "differ",
                )  # fmt: skip
        for worker in workers:
            worker.close()
    return table


def _rate(tokens: int, seconds: Sequence[float]) -> str:
    return f"{tokens / statistics.median(seconds):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="decode_loops", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--peer-python", default="", help="of onnxruntime-genai's environment")
    parser.add_argument("--python", default=sys.executable, help="of our loop")
    parser.add_argument("--threads", type=_numbers, default=(1, 2))
    parser.add_argument("--prompts", type=_numbers, default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        if not (options.folder / "genai_config.json").is_file():
            raise Missing(f"{options.folder}: no genai_config.json; give an artifact with a cache")
        pythons = {OURS: options.python}
        pythons |= {PEER: options.peer_python} if options.peer_python else {}
        found = measured(options.folder, pythons, options.threads, options.prompts, options.rounds)
        Console(width=None if sys.stdout.isatty() else 160).print(found)
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())

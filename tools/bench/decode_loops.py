r"""``python -m graphwright.tools.bench.decode_loops DIR... --peer-python PYTHON``: ours and peers'.

Loops run one folder, an artifact with its ``genai_config.json``, each in a process of its own that
loads it once. They take turns at a few tokens, behind as many that nobody times, in which threads
wake and caches fill: what else the machine does meets all. A cell holds the median over the turns,
tokens a second by the clock, and by the processor's time where there is one thread. The tokens that
they write are compared with the first loop's. Of several folders ours runs all, a peer the first.
onnxruntime-genai needs plain ``onnxruntime``, so it gets an environment of its own::

    python -m venv PEER && PEER/bin/pip install onnxruntime-genai numpy

Our loop runs in this environment, or by ``--python`` in another one: the two should have the same
release of ONNX Runtime, which the table names. ``--peer-folder`` is the peer's own model of the
same checkpoint (``onnxruntime_genai.models.builder``), which it then runs beside ours: other
roundings write other tokens. ``--gguf FILE --gguf-python PYTHON`` is llama.cpp (``pip install
xllamacpp``) with the file that ``optimize-model convert DIR --to gguf`` writes: the same codes
where ``DIR`` has 4 symmetric bits in groups of 32. ``--openvino FILE.xml --openvino-python PYTHON``
is the model that OpenVINO GenAI runs, in a loop as short as ours::

    python -m venv OV && OV/bin/pip install "optimum-intel[openvino]"
    OV/bin/optimum-cli export openvino -m q05 --task text-generation-with-past \
        --weight-format int4 --sym --group-size 32 --ratio 1.0 ov

Processes are started anew in each round, in turned order in every second: where the memory of one
lies has moved its times by a fifth.
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

OURS, PEER, OWN = "ours", "genai", "genai, its own model"
LLAMA, OPENVINO = "llama.cpp", "OpenVINO"
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
        ours = name.startswith(OURS)
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


def cell(workers: Sequence[Worker], prompt: int, times: dict[str, Times]) -> dict[str, list[int]]:
    """One round of all loops at one length of prompt, added to ``times``; what they wrote."""
    for worker in workers:
        times[worker.name].read.append(worker.ask("read", prompt, 2 * TURNS * TOKENS + 1))
    for _ in range(TURNS):
        for worker in workers:
            times[worker.name].written.append(worker.ask("write", TOKENS))
    return {worker.name: worker.ask("text") for worker in workers}


def measured(
    loops: dict[str, tuple[str, Path]], threads: Sequence[int], prompts: Sequence[int], rounds: int,
) -> Table:  # fmt: skip
    """A row for each number of threads, prompt and loop; ``loops`` by name, python and folder."""
    title = f"load {os.getloadavg()[0]:.1f}"
    table = Table(title=title, title_justify="left")
    for name in (
        "threads", "prompt", "loop", "reading tok/s", "writing tok/s", "best", "by processor",
        "best", "tokens",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "loop" else "right")
    for count in threads:
        times = {prompt: {name: Times() for name in loops} for prompt in prompts}
        texts: dict[int, dict[str, list[int]]] = {}
        libraries: dict[str, str] = {}
        for turn in range(rounds):
            names = list(loops)[:: -1 if turn % 2 else 1]
            workers = [Worker(name, *loops[name], count) for name in names]
            libraries |= {worker.name: worker.library for worker in workers}
            for prompt in prompts:
                texts[prompt] = cell(workers, prompt, times[prompt])
            for worker in workers:
                worker.close()
        for prompt in prompts:
            for name, timing in times[prompt].items():
                text, first = (texts[prompt][key] for key in (name, next(iter(loops))))
                same = "equal" if text == first else "differ" if text else ""
                label = f"{name} ({libraries[name]})"
                table.add_row(*_row(count, prompt, label, timing), same)
    return table


def _row(threads: int, prompt: int, loop: str, times: Times) -> list[str]:
    clock, used = zip(*times.written, strict=True)
    read = [wall for wall, _ in times.read]
    alone = (_rate(TOKENS, used), f"{TOKENS / min(used):.1f}") if threads == 1 else ("", "")
    rates = (_rate(prompt, read), _rate(TOKENS, clock), f"{TOKENS / min(clock):.1f}")
    return [str(threads), str(prompt), loop, *rates, *alone]


def _rate(tokens: int, seconds: Sequence[float]) -> str:
    return f"{tokens / statistics.median(seconds):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="decode_loops", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--peer-python", default="", help="of onnxruntime-genai's environment")
    parser.add_argument("--peer-folder", type=Path, help="the model of onnxruntime-genai's builder")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model as llama.cpp has it")
    parser.add_argument("--gguf-python", default="", help="of xllamacpp's environment")
    parser.add_argument("--openvino", type=Path, metavar="FILE", help="the model in OpenVINO")
    parser.add_argument("--openvino-python", default="", help="of OpenVINO's environment")
    parser.add_argument("--python", default=sys.executable, help="of our loop")
    parser.add_argument("--threads", type=_numbers, default=(1, 2))
    parser.add_argument("--prompts", type=_numbers, default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        for folder in options.folders:
            if not (folder / "genai_config.json").is_file():
                raise Missing(f"{folder}: no genai_config.json; give an artifact with a cache")
        first = options.folders[0]
        loops = {f"{OURS}, {folder.name}": (options.python, folder) for folder in options.folders}
        if options.peer_python:
            loops[f"{PEER}, {first.name}"] = options.peer_python, first
        if options.peer_python and options.peer_folder:
            loops[OWN] = options.peer_python, options.peer_folder
        if options.gguf and options.gguf_python:
            loops[LLAMA] = options.gguf_python, options.gguf
        if options.openvino and options.openvino_python:
            loops[OPENVINO] = options.openvino_python, options.openvino
        table = measured(loops, options.threads, options.prompts, options.rounds)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())

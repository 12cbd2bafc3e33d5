"""``python -m graphwright.tools.bench.decode FOLDER...``: what a token costs, in ms.

Each folder holds the ``model.onnx`` of a decoder with a key-value cache: ours, or one of
onnxruntime-genai's builder. One step of one token is timed in ONNX Runtime at several lengths of
the cache, all folders in turns within a round, so that what else the machine does meets them all;
the least of the rounds counts. With ``--peer-python`` (an environment that holds
onnxruntime-genai, see ``bench.int4``) that runtime also writes text with each folder that has a
``genai_config.json``: prompt and decoding in tokens a second, and whether all write the same.

    python -m graphwright.tools.bench.checkpoints q05 q05
    optimize-model q05 -p 'quantize{bits=4 group=32}' -o ours
    PEER/bin/python -m onnxruntime_genai.models.builder -i q05 -o genai -p int4 -e cpu
    python -m graphwright.tools.bench.decode ours genai --peer-python PEER/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...ir.core.errors import Missing
from .processes import CommandFailed
from .showing import ended

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


class Step:
    """One step of a decoder in ONNX Runtime: a token behind a cache of random numbers."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        path = folder / "model.onnx"
        if not path.is_file():
            raise Missing(f"{path} is not there: give folders that hold a model.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._ort, self._threads = ort, threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._feeds: dict[str, Any] = {}
        self._head = _head_size(folder)

    def prepare(self, past: int) -> None:
        """Make the inputs of a step that follows ``past`` tokens."""
        rng = np.random.default_rng(past)
        self._feeds = {}
        for entry in self._session.get_inputs():
            array = self._array(entry.name, entry.shape, past, rng).astype(_DTYPES[entry.type])
            self._feeds[entry.name] = self._ort.OrtValue.ortvalue_from_numpy(array)

    def _array(
        self, name: str, shape: Sequence[int | str], past: int, rng: np.random.Generator
    ) -> Any:
        if name.startswith("past"):
            open_ = (1, 0, past, self._head)
            sizes = [s if isinstance(s, int) else open_[i] for i, s in enumerate(shape)]
            return rng.standard_normal(sizes)
        if "mask" in name:
            return np.ones((1, past + 1))
        return np.full([1] * len(shape), past if "position" in name else 7)

    def run(self) -> float:
        """Seconds of one step: of the processor where one thread does it all."""
        clock = time.thread_time if self._threads == 1 else time.perf_counter
        began = clock()
        self._session.run_with_ort_values(self._outputs, self._feeds)
        return clock() - began


def _head_size(folder: Path) -> int:
    """Of a cache whose graph leaves it open, as that of onnxruntime-genai's builder does."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return 0
    return int(json.loads(config.read_text())["model"]["decoder"]["head_size"])


def steps(
    folders: Sequence[Path], pasts: Sequence[int], *, threads: int, rounds: int, repeats: int
) -> dict[Path, dict[int, float]]:
    """Milliseconds of a step by folder and length of the cache, the least of all rounds."""
    sessions = {folder: Step(folder, threads) for folder in folders}
    times: dict[Path, dict[int, float]] = {folder: {} for folder in folders}
    for past in pasts:
        for step in sessions.values():
            step.prepare(past)
            step.run()
        for _ in range(rounds):
            for folder, step in sessions.items():
                least = min(step.run() for _ in range(repeats)) * 1e3
                times[folder][past] = min(least, times[folder].get(past, least))
    return times


_WORKER = """
import json, sys, time, numpy as np, onnxruntime_genai as og
config = og.Config(sys.argv[1])
threads = {"intra_op_num_threads": int(sys.argv[2])}
config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
model = og.Model(config)
for line in sys.stdin:
    prompt, tokens, vocab = map(int, line.split())
    ids = np.random.default_rng(prompt).integers(5, vocab, (1, prompt)).astype(np.int32)
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=prompt + tokens + 1, min_length=prompt + tokens + 1,
                                do_sample=False)
    writer = og.Generator(model, settings)
    began = time.perf_counter()
    writer.append_tokens(ids)
    writer.generate_next_token()
    read = time.perf_counter()
    for _ in range(tokens):
        writer.generate_next_token()
    done = time.perf_counter()
    written = [int(i) for i in writer.get_sequence(0)[prompt:]]
    print(json.dumps([prompt / (read - began), tokens / (done - read), written]), flush=True)
"""
"""Answers each line ``prompt tokens vocabulary`` by tokens a second and what was written."""


class Writer:
    """onnxruntime-genai on one folder, in a process of its own environment."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": ""}  # its packages are its own
        self._process = subprocess.Popen(
            [python, "-c", _WORKER, str(folder), str(threads)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._folder = folder
        self._vocab = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]

    def write(self, prompt: int, tokens: int) -> tuple[float, float, list[int]]:
        """Tokens a second of the prompt and of what follows, and what follows."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{prompt} {tokens} {self._vocab}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise CommandFailed(f"onnxruntime-genai ended on {self._folder}: see its message above")
        read, written, ids = json.loads(answer)
        return read, written, ids

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def texts(
    folders: Sequence[Path], prompts: Sequence[int], *, python: str, threads: int, rounds: int,
    tokens: int,
) -> dict[Path, dict[int, tuple[float, float, list[int]]]]:  # fmt: skip
    """What ``Writer.write`` gives, the most of all rounds, by folder and length of the prompt."""
    best: dict[Path, dict[int, tuple[float, float, list[int]]]] = {f: {} for f in folders}
    with _writers(folders, python, threads) as writers:
        for prompt in prompts:
            for folder, writer in [*writers.items()] * rounds:
                read, written, ids = writer.write(prompt, tokens)
                before = best[folder].get(prompt, (0.0, 0.0, ids))
                best[folder][prompt] = (max(read, before[0]), max(written, before[1]), ids)
    return best


@contextlib.contextmanager
def _writers(folders: Sequence[Path], python: str, threads: int) -> Iterator[dict[Path, Writer]]:
    writers: dict[Path, Writer] = {}
    try:
        for folder in folders:
            writers[folder] = Writer(python, folder, threads)
        yield writers
    finally:
        for writer in writers.values():
            writer.close()


def _step_table(times: dict[Path, dict[int, float]], threads: int) -> Table:
    import onnxruntime as ort

    title = f"ms a token, ONNX Runtime {ort.__version__}, threads: {threads}"
    result = Table(title=title, title_justify="left")
    result.add_column("folder")
    for past in next(iter(times.values())):
        result.add_column(f"past {past}", justify="right")
    for folder, row in times.items():
        result.add_row(str(folder), *(f"{ms:.2f}" for ms in row.values()))
    return result


def _text_table(best: dict[Path, dict[int, tuple[float, float, list[int]]]], tokens: int) -> Table:
    title = f"onnxruntime-genai, tokens a second (prompt / {tokens} tokens after it)"
    result = Table(title=title, title_justify="left")
    result.add_column("folder")
    first = next(iter(best.values()))
    for prompt in first:
        result.add_column(f"prompt {prompt}", justify="right")
    result.add_column("same text as the first")
    for folder, row in best.items():
        same = [_common(ids, first[prompt][2]) for prompt, (_, _, ids) in row.items()]
        speeds = (f"{read:.0f} / {written:.1f}" for read, written, _ in row.values())
        result.add_row(str(folder), *speeds, ", ".join(f"{n} of {tokens + 1}" for n in same))
    return result


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens agree before the first that differ."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        prog="decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--past", type=_numbers, default=[256, 1024, 3000], help="lengths of the cache; '' for none"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5, help="steps in a row of one folder")
    parser.add_argument("--peer-python", default="", help="of onnxruntime-genai's environment")
    parser.add_argument("--prompts", type=_numbers, default=[16, 256, 1024])
    parser.add_argument("--tokens", type=int, default=10, help="written after each prompt")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        times = steps(
            options.folders, options.past, threads=options.threads, rounds=options.rounds,
            repeats=options.repeats,
        ) if options.past else {}  # fmt: skip
        if times:
            console.print(_step_table(times, options.threads))
        if options.peer_python:
            written = texts(
                options.folders, options.prompts, python=options.peer_python,
                threads=options.threads, rounds=options.rounds, tokens=options.tokens,
            )  # fmt: skip
            console.print(_text_table(written, options.tokens))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

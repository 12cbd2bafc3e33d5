"""A decode loop as a process, for ``decode_loops.py``: ``serve`` answers what stdin asks by JSON.

Run by its path, ``decode_worker.py FOLDER THREADS``, it is onnxruntime-genai's loop: a peer's
environment does not hold the package, so nothing of it is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol

import numpy as np


class Loop(Protocol):
    """A loop over one model."""

    library: str

    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        """Begin a text with a prompt and write its first token; at most so many will follow."""

    def write(self, count: int) -> None:
        """Write so many tokens more."""

    def text(self) -> list[int]:
        """The tokens that were written."""


class Genai:
    """onnxruntime-genai's generator, greedy."""

    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime
        import onnxruntime_genai as genai

        self._genai = genai
        self.library = f"{genai.__version__}, onnxruntime {onnxruntime.__version__}"
        config = genai.Config(folder)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = genai.Model(config)

    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(max_length=len(ids) + most, do_sample=False)
        self._generator = self._genai.Generator(self._model, options)
        self._generator.append_tokens(ids[None].astype(np.int32))
        self._prompt = len(ids)
        self.write(1)

    def write(self, count: int) -> None:
        for _ in range(count):
            self._generator.generate_next_token()

    def text(self) -> list[int]:
        return [int(token) for token in self._generator.get_sequence(0)[self._prompt :]]


def serve(loop: Loop) -> None:
    """Answer ``read LENGTH MOST`` and ``write COUNT`` by seconds, of the clock and of the
    processor, and ``text`` by tokens, until stdin ends."""
    _tell(loop.library)
    for line in sys.stdin:
        ask, *numbers = line.split()
        if ask == "text":
            _tell(loop.text())
            continue
        began, used = time.perf_counter(), time.process_time()
        if ask == "read":
            length, most = map(int, numbers)
            loop.read(np.random.default_rng(length).integers(5, 2000, length), most)
        else:
            loop.write(int(numbers[0]))
        _tell([time.perf_counter() - began, time.process_time() - used])


def _tell(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Genai(sys.argv[1], int(sys.argv[2])))

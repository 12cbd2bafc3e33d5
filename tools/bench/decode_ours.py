"""``decode_ours.py FOLDER THREADS``: our decode loop as a process, for ``decode_loops.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ...backends import compile
from ...backends.generation.decode import Decoder
from . import decode_worker


class Ours(decode_worker.Loop):
    """``Decoder`` over the artifact in ONNX Runtime, greedy."""

    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime

        self.library = f"onnxruntime {onnxruntime.__version__}"
        self._decoder = Decoder(compile(Path(folder), threads=threads))

    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        self._steps = self._decoder.decode([ids.tolist()], max_new_tokens=most)
        self._text: list[int | None] = []
        self.write(1)

    def write(self, count: int) -> None:
        for _ in range(count):
            self._text += next(self._steps)

    def text(self) -> list[int]:
        return [token for token in self._text if token is not None]


if __name__ == "__main__":
    decode_worker.serve(Ours(sys.argv[1], int(sys.argv[2])))

"""A decode loop as a process, for ``decode_loops.py``: ``serve`` answers what stdin asks by JSON.

Run by its path, ``decode_worker.py FOLDER THREADS``, it is onnxruntime-genai's loop, for a
``FILE.gguf`` llama.cpp's, and for a ``FILE.xml`` one over OpenVINO's model: a peer's environment
does not hold the package, so nothing of it is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Loop(ABC):
    """A loop over one model."""

    library: str

    @abstractmethod
    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        """Begin a text with a prompt and write its first token; at most so many will follow."""

    def ready(self, count: int) -> None:
        """Write so many tokens, which nobody times: threads wake, and caches hold the model."""
        self.write(count)

    @abstractmethod
    def write(self, count: int) -> None:
        """Write so many tokens more."""

    @abstractmethod
    def text(self) -> list[int]:
        """The tokens that were written; none where they are not told."""


class Genai(Loop):
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


class LlamaCpp(Loop):
    """llama.cpp's server as xllamacpp has it, without the network.

    It does not tell which tokens it wrote, so what was written is other tokens, read anew. Of a
    prompt that is in the cache it reads the last one again, which is the first of ``count`` steps.
    """

    def __init__(self, path: str, threads: int) -> None:
        from importlib.metadata import version

        import xllamacpp as lib

        self.library = f"xllamacpp {version('xllamacpp')}"
        settings = lib.CommonParams()
        settings.model.path = path
        settings.n_ctx = settings.n_batch = 2048
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup = False
        self._server = lib.Server(settings)
        self._ids: list[int] = []

    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        self._ids = ids.tolist()
        self._complete(1, cached=False)

    def ready(self, count: int) -> None:
        self._ids += [7 + len(self._ids) % 1000 for _ in range(2 * count)]
        self._complete(count)

    def write(self, count: int) -> None:
        self._complete(count)

    def text(self) -> list[int]:
        return []

    def _complete(self, count: int, *, cached: bool = True) -> None:
        ask = {"prompt": self._ids, "n_predict": count, "temperature": 0, "cache_prompt": cached,
               "ignore_eos": True}  # fmt: skip
        written = self._server.handle_completions(ask)["usage"]["completion_tokens"]
        if written != count:
            raise RuntimeError(f"asked for {count} tokens, llama.cpp wrote {written}")


class OpenVino(Loop):
    """The model that OpenVINO GenAI runs, whose keys and values are its state, greedy."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino

        self.library = f"openvino {openvino.__version__.split('-')[0]}"
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        model = openvino.Core().compile_model(path, "CPU", settings)
        self._inputs = {name for entry in model.inputs for name in entry.names}
        self._request, self._length, self._text = model.create_infer_request(), 0, [0]

    def read(self, ids: np.ndarray[Any, Any], most: int) -> None:
        self._request.reset_state()
        self._length, self._text = 0, []
        self._step(ids)

    def write(self, count: int) -> None:
        for _ in range(count):
            self._step(np.array(self._text[-1:]))

    def text(self) -> list[int]:
        return self._text

    def _step(self, ids: np.ndarray[Any, Any]) -> None:
        before, self._length = self._length, self._length + len(ids)
        known = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(before, self._length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        fed = {name: value for name, value in known.items() if name in self._inputs}
        logits = self._request.infer(fed)["logits"]
        self._text.append(int(logits[0, -1].argmax()))


def serve(loop: Loop) -> None:
    """Answer ``read LENGTH MOST`` and ``write COUNT`` by seconds, of the clock and of the
    processor, and ``text`` by tokens, until stdin ends."""
    _tell(loop.library)
    for line in sys.stdin:
        ask, *numbers = line.split()
        if ask == "text":
            _tell(loop.text())
            continue
        if ask == "write":
            loop.ready(int(numbers[0]))
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
    kinds: dict[str, Callable[[str, int], Loop]] = {".gguf": LlamaCpp, ".xml": OpenVino}
    kind = kinds.get(Path(sys.argv[1]).suffix, Genai)
    serve(kind(sys.argv[1], int(sys.argv[2])))

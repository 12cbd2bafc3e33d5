"""``python -m graphwright.tools.bench.encoder_int8 DIR``: MiniLM in 8 bits: speed, cosine, bytes.

``zoo:minilm`` in each form below, in stock ONNX Runtime, beside float32 there. With
``--peer-python`` (an environment that holds ``openvino`` and ``nncf``) OpenVINO runs the float32
artifact with its weights in 8 bits (``nncf.compress_weights``) in a process of its own. Each time
is that of a processor, one thread, 128 tokens a row; all take turns within a round, a round gives
one ratio to float32 in ONNX Runtime, and their median counts. The cosine is to float32's vectors,
the mean over English sentences and the least of them. Artifacts stay in ``DIR`` and are not made
again. Passes learn from the first 64 sentences; the cosine is that of the last 32, on which nothing
was chosen: settings were chosen on the third and fourth batch of 32.

Measured on two cores at a load of 8 (ONNX Runtime 1.31.1, OpenVINO 2026.4.1):

==============================  =============  ======  ======  ====
form                            batch 1 / 32   cosine  least   MB
==============================  =============  ======  ======  ====
8-bit weights                   1.22 / 1.32    .99966  .99942  24.8
w8a8, table                     2.25 / 2.24    .99755  .99500  23.1
asymmetric w8a8, table          2.10 / 2.08    .99895  .99844  23.3
static w8a8, table              2.59 / 2.71    .99156  .98277  23.1
smooth, asymmetric              2.07 / 2.13    .99958  .99928  23.3
smooth, asymmetric, static o    2.17 / 2.21    .99954  .99915  23.2
OpenVINO, 8-bit weights         1.96 / 2.40    .99949  .99917  23.2
==============================  =============  ======  ======  ====

Of three runs that day the last of ours was 2.31, 2.29 and 2.17 for a row, OpenVINO 2.01, 1.97 and
1.96; for 32 rows 2.26, 2.53 and 2.21, OpenVINO 2.47, 2.45 and 2.40: ahead with a row, behind with
32 in two of three. Before attention was opset 23's node, 2.11 / 1.97, of a slower float32. Of 32
rows attention, in float32, takes 23 % of the time, products of integers 54 %, what scales and
shifts their results 10 %: the runtime has no node that does all three for a scale a token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ...backends.artifacts.exporting import export
from ...backends.runtimes.original import load
from ..run.named_model import optimize
from .showing import ended

Array = NDArray[Any]
TABLE = "quantize{bits=8 group=128 embeddings=8 min_size=1000000}"
"""The table of words and that of places in 8 bits, and no linear."""
SMOOTH = "smooth{kinds=[q k v fc1] divide=true}"
"""What norms give is divided; what a gelu gives, smoothed, would have fewer codes."""
BETWEEN = "w8a8{kinds=[q k v fc2] symmetric=false feedback=true}"
FIXED = "w8a8{kinds=[o] activations=static feedback=true}"
REST = "w8a8{feedback=true}"
FORMS: Mapping[str, str] = {
    "float32": "clean",
    "8-bit weights": "quantize{bits=8 group=32 embeddings=8 accuracy_level=4}",
    "w8a8, table": f"{TABLE},w8a8",
    "asymmetric w8a8, table": f"{TABLE},w8a8{{symmetric=false}}",
    "static w8a8, table": f"{TABLE},w8a8{{activations=static}}",
    "smooth, asymmetric": f"{SMOOTH},{TABLE},{BETWEEN},{REST}",
    "smooth, asymmetric, static o": f"{SMOOTH},{TABLE},{FIXED},{BETWEEN},{REST}",
}
"""By name, the recipe; the first is what the others are held to."""
OUTPUT, TOKENS = "sentence_embedding", 128
PEER = "OpenVINO, 8-bit weights"
_WORKER = """
import sys, time, json, numpy as np, openvino as ov, nncf
core = ov.Core()
model = nncf.compress_weights(core.read_model(sys.argv[1]), mode=nncf.CompressWeightsMode.INT8_ASYM)
ov.save_model(model, sys.argv[2] + ".xml", compress_to_fp16=False)
run = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1})
request = run.create_infer_request()
print(json.dumps(ov.__version__), flush=True)
for line in sys.stdin:
    inputs = dict(np.load(line.strip()))
    began = time.process_time()
    request.infer(inputs)
    took = time.process_time() - began
    np.save(sys.argv[2] + ".npy", request.get_tensor("sentence_embedding").data)
    print(json.dumps(took), flush=True)
"""
"""Answers each line, a file of inputs, by seconds; the vectors are in a file."""
Run = Callable[[Path], tuple[float, Array]]
"""Of a file of inputs: seconds and vectors."""


def artifacts(folder: Path) -> dict[str, Path]:
    """An artifact of each form, made where it is missing."""
    folders = {}
    for name, recipe in FORMS.items():
        folders[name] = folder / name.replace(", ", "-").replace(" ", "-")
        if not folders[name].exists():
            source = load("zoo:minilm")
            data = source.source.samples[:2]
            result = optimize(source, recipe, target="cpu", calibration=data)
            export(result.graph, folders[name], report=result.report, target="cpu")
    return folders


def _session(folder: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = str(folder / "model.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(file: Path) -> tuple[float, Array]:
        inputs = dict(np.load(file))
        began = time.process_time()
        (vectors,) = session.run([OUTPUT], inputs)
        return time.process_time() - began, vectors

    return run


@contextlib.contextmanager
def _peer(python: str, model: Path, place: Path) -> Iterator[tuple[str, Run]]:
    """OpenVINO's version, and how it runs."""
    environment = {**os.environ, "PYTHONPATH": ""}  # its packages are its own
    process = subprocess.Popen(
        [python, "-c", _WORKER, str(model), str(place)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    lines = (line for line in process.stdout if line.startswith(('"', *"0123456789")))
    stdin = process.stdin

    def run(file: Path) -> tuple[float, Array]:
        stdin.write(f"{file}\n")
        stdin.flush()
        seconds = float(json.loads(next(lines)))
        return seconds, np.load(f"{place}.npy")

    try:
        yield json.loads(next(lines)), run
    finally:
        stdin.close()
        process.wait()


def _inputs(folder: Path) -> tuple[dict[int, Path], Path]:
    """Files of inputs: random words by batch, for time, and sentences, for the cosine."""
    rng = np.random.default_rng(0)
    files = {rows: folder / f"inputs-{rows}.npz" for rows in (1, 32)}
    for rows, file in files.items():
        ids = rng.integers(1000, 20000, (rows, TOKENS))
        np.savez(file, input_ids=ids, attention_mask=np.ones_like(ids))
    sentences = folder / "sentences.npz"
    batch = load("zoo:minilm").source.samples[-1]
    np.savez(sentences, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return files, sentences


def measured(runs: Mapping[str, Run], files: Mapping[int, Path], rounds: int) -> dict[str, Any]:
    """By name, the median ratio to the first for each batch."""
    speeds: dict[str, dict[int, float]] = {name: {} for name in runs}
    for rows, file in files.items():
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(min(run(file)[0] for _ in range(3 if rows == 1 else 1)))
        first = next(iter(times.values()))
        for name, row in times.items():
            speeds[name][rows] = statistics.median(a / b for a, b in zip(first, row, strict=True))
    return speeds


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the artifacts, measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="encoder_int8", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--peer-python", default="", help="of an environment with openvino, nncf")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        folders = artifacts(options.folder)
        with contextlib.ExitStack() as stack:
            runs = {name: _session(path) for name, path in folders.items()}
            sizes = {name: _nbytes(path.glob("model.onnx*")) for name, path in folders.items()}
            if options.peer_python:
                place = options.folder / "openvino"
                model = next(iter(folders.values())) / "model.onnx"
                version, run = stack.enter_context(_peer(options.peer_python, model, place))
                runs[f"{PEER} ({version[:8]})"] = run
                sizes[f"{PEER} ({version[:8]})"] = _nbytes(options.folder.glob("openvino.[xb]*"))
            console.print(_table(runs, sizes, *_inputs(options.folder), options.rounds))

    return ended(show)


def _table(
    runs: Mapping[str, Run], sizes: Mapping[str, int], files: Mapping[int, Path], sentences: Path,
    rounds: int,
) -> Table:  # fmt: skip
    import onnxruntime as ort

    speeds = measured(runs, files, rounds)
    vectors = {name: run(sentences)[1] for name, run in runs.items()}
    exact = next(iter(vectors.values()))
    title = f"MiniLM, {TOKENS} tokens a row, ONNX Runtime {ort.__version__}, one thread"
    result = Table(title=title, title_justify="left")
    for column in ("form", "batch 1", "batch 32", "cosine", "least", "MB"):
        result.add_column(column, justify="left" if column == "form" else "right")
    for name in runs:
        cosines = (vectors[name] * exact).sum(-1)
        ratios = (f"{ratio:.2f}" for ratio in speeds[name].values())
        result.add_row(
            name, *ratios, f"{cosines.mean():.5f}", f"{cosines.min():.5f}",
            f"{sizes[name] / 1e6:.1f}",
        )  # fmt: skip
    return result


def _nbytes(files: Iterator[Path]) -> int:
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    raise SystemExit(main())

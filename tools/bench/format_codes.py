"""``python -m graphwright.tools.bench.format_codes --peer-python PYTHON``: codes that are kept.

zoo:tiny-llama in NF4 and float8 as their libraries write it: bytes of its tensors and of the
artifact's, the perplexity of the numbers, computed by torch, and of the artifact in ONNX Runtime,
and what 4 bits anew make of them. The libraries' environment is that of ``formats.py``.

``... --costs [--size 2048]``: a linear of that size in each form of the targets, on one thread.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console

from ...backends import compile, export
from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import write_model
from ...ir.core.errors import BadInput
from ...ir.core.weights import MemoryWeight, Weight
from ...ir.load.sources import load
from ...ir.load.zoo.text import SHIPPED, read_tokenizer, shipped_text
from ...ir.onnx.view import OnnxView
from ...ir.ops.coded_weight import CodedWeight
from ...ir.vocab.targets import CPU, PORTABLE
from ...passes.manager import optimize
from . import format_writer
from .format_session import Session
from .processes import CommandFailed
from .showing import ended
from .structure_table import print_table

KINDS = ("bnb-nf4", "bnb-nf4-nested", "ct-fp8")
ANEW = "quantize{bits=4 group=32 embeddings=keep}"
TEXTS, WORDS = 12, 128
ENDS = (".safetensors", ".data")


def rows(peer: Session, kinds: Sequence[str]) -> Iterator[list[str]]:
    """A row a form."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            source, place = Path(scratch) / kind, Path(scratch)
            failure = peer.run(format_writer.__file__, SHIPPED, source, kind)
            if failure:
                raise CommandFailed(failure)
            view = load(source, dtype=torch.float32, cache=False)
            values = [perplexity(compile(view, backend="eager"))]
            sizes, errors = [_bytes(source)], [0.0]
            stored = load(source, cache=False)  # its other weights in the dtype that they have
            for name, recipe in (("as it is", "clean"), ("anew", ANEW)):
                result = optimize(stored, recipe)
                out = export(result.graph, place / name, report=result.report)
                errors = [x.rel_l2 or 0.0 for p in result.report.passes for x in p.result.sites]
                sizes.append(_bytes(out))
                values.append(perplexity(compile(out)))
            error = sum(errors) / len(errors)
            texts = [f"{value:.4f}" for value in values]
            yield [kind, *map(str, sizes[:2]), *texts[:2], f"{error:.3f}", texts[2]]


COLUMNS = ("form", "bytes of its tensors", "of the artifact's", "perplexity of the numbers",
           "of the artifact", "mean error of 4 bits anew", "their perplexity")  # fmt: skip


def perplexity(run: Any) -> float:
    """Of texts that the model has not seen."""
    reader, total, count = read_tokenizer(SHIPPED), 0.0, 0
    for text in [t for t in shipped_text("test") if len(t) > 800][:TEXTS]:
        ids = torch.tensor([reader.encode(text).ids[:WORDS]])
        logits = run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"].float()
        likely = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        total, count = total - float(likely.sum()), count + ids.shape[1] - 1
    return math.exp(total / count)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(ENDS))


# --- what a linear costs --------------------------------------------------------------------------


def costs(size: int) -> Iterator[list[str]]:
    """A row a form: KiB of the file, ms to load, and for 1 and 16 rows."""
    sizes = {"in_features": size, "out_features": size}
    blocks = size * size // 64
    nf4 = CodedWeight("linear_bnb4", {
        "codes": MemoryWeight(torch.randint(0, 256, (size * size // 2,), dtype=torch.uint8)),
        "absmax": MemoryWeight(torch.rand(blocks)),
    }, {"quant_type": 1, "block": 64, **sizes})  # fmt: skip
    float8 = CodedWeight("linear_float8", {
        "codes": MemoryWeight(torch.randn(size, size).to(torch.float8_e4m3fn)),
        "scales": MemoryWeight(torch.rand(size, 1)),
    }, {"block_rows": 1, "block_columns": size, **sizes})  # fmt: skip
    forms: dict[str, tuple[Weight, Any]] = {
        f"{name}, {target.name}": (weight, target)
        for name, weight in (("NF4", nf4), ("float8", float8)) for target in (CPU, PORTABLE)
    }  # fmt: skip
    forms["float32"] = (MemoryWeight(nf4.read()), CPU)
    for name, (weight, target) in forms.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_model(lowered(_linear(weight), target).model, Path(scratch))
            kib = sum(path.stat().st_size for path in Path(scratch).iterdir()) // 1024
            seconds, run = _timed(partial(compile, Path(scratch) / "model.onnx", threads=1))
            each = [min(_timed(partial(run, x=x))[0] for _ in range(9))
                    for x in (torch.randn(1, size), torch.randn(16, size))]  # fmt: skip
            yield [name, str(kib), *(f"{1e3 * s:.3g}" for s in (seconds, *each))]


def _linear(weight: Weight) -> OnnxView:
    """``linear(x, w)`` alone."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT),
                 shape=ir.Shape(["rows", weight.shape[1]]))  # fmt: skip
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="linear")
    view = OnnxView(ir.Model(graph, ir_version=10))
    end = ir.Node("", "Identity", [x], name="end")
    graph.append(end)
    y = view.build("linear", [x, view.add_weight("fc.weight", weight)], {}, before=end)
    view.erase(end)
    view.set_outputs({"y": y})
    return view


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the forms, run them and print the table."""
    parser = argparse.ArgumentParser(
        prog="format_codes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", help="of the libraries' environment")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--size", type=int, default=2048)
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        if options.costs:
            columns = ("form", "file, KiB", "load, ms", "1 row, ms", "16 rows, ms")
            print_table(columns, costs(options.size), console, markdown=True)
            return
        if options.peer_python is None:
            raise BadInput("--peer-python names the libraries' environment, or give --costs")
        with closing(Session(options.peer_python)) as peer:
            print_table(COLUMNS, rows(peer, options.kinds.split(",")), console, markdown=True)

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m graphwright.tools.bench.artifact_bytes FOLDER...``: where artifacts' bytes are.

The initializers of each folder's ``model.onnx``, of all layers together, by what they belong to and
by what they hold: codes, scales, zero points, or floats. A row for each kind that takes one percent
of an artifact or more; what is less is one row. Folders of ours and of onnxruntime-genai's builder
are read alike::

    python -m graphwright.tools.bench.checkpoints q05 q05
    optimize-model q05 -r w4 -o ours
    PEER/bin/python -m onnxruntime_genai.models.builder -i q05 -o genai -p int4 -e cpu \\
        --extra_options is_symmetric=false algo_config=rtn matmul_mixed_precision=last_matmul:int8
    python -m graphwright.tools.bench.artifact_bytes ours genai
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
from rich.console import Console

from ...ir.core.errors import BadInput
from .showing import ended
from .structure_table import print_table

SHARE = 0.01
"""Of an artifact, from which on a kind gets a row."""
_PLACES = {
    "table and head": ("embed_tokens", "lm_head"), "gate and up": ("gate_proj", "up_proj"),
    "down": ("down_proj",), "queries, keys, values": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "attention's output": ("o_proj",),
}  # fmt: skip
"""By what a name holds, in the words of transformers and of the builder."""
_HALVED = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
_REST = "the rest"
Kind = tuple[str, str]


def kinds(model: Path) -> Counter[Kind]:
    """Bytes by place and content. Raises ``BadInput`` where there is no such file."""
    if not model.is_file():
        raise BadInput(f"{model} is no file")
    graph = onnx.load(model, load_external_data=False).graph
    counts: Counter[Kind] = Counter()
    for tensor in graph.initializer:
        counts[_place(tensor.name), _content(tensor)] += nbytes(tensor)
    return counts


def nbytes(tensor: onnx.TensorProto) -> int:
    """Of the numbers that an initializer holds."""
    count = 1
    for size in tensor.dims:
        count *= size
    if tensor.data_type in _HALVED:
        return -(-count // 2)
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _place(name: str) -> str:
    return next((k for k, words in _PLACES.items() if any(w in name for w in words)), _REST)


def _content(tensor: onnx.TensorProto) -> str:
    """By the end of its name and its dtype."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    if "scale" in tensor.name:
        return f"scales, {dtype}"
    if "zero" in tensor.name or tensor.name.endswith("_zp"):
        return f"zero points, {dtype}"
    return "codes" if "int" in dtype else dtype


def rows(counts: Sequence[Counter[Kind]]) -> list[tuple[str, ...]]:
    """A row for each kind, megabytes and share of each artifact; the largest first."""
    totals = [count.total() for count in counts]
    shown = {
        kind for count, total in zip(counts, totals, strict=True)
        for kind, size in count.items() if kind[0] != _REST and size >= SHARE * total
    }  # fmt: skip
    order = sorted(shown, key=lambda kind: -max(count[kind] for count in counts))
    lines = [
        (", ".join(kind), *(_cell(c[kind], t) for c, t in zip(counts, totals, strict=True)))
        for kind in order
    ]
    less = [t - sum(c[kind] for kind in shown) for c, t in zip(counts, totals, strict=True)]
    cells = (_cell(size, total) for size, total in zip(less, totals, strict=True))
    return [*lines, ("less than 1 % each", *cells), ("all", *(f"{t / 1e6:.1f}" for t in totals))]


def _cell(size: int, total: int) -> str:
    return f"{size / 1e6:.1f} ({size / total:.1%})" if size else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the folders and print the table."""
    parser = argparse.ArgumentParser(
        prog="artifact_bytes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--markdown", action="store_true", help="the table as DECODE.md has it")
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        counts = [kinds(folder / "model.onnx") for folder in options.folders]
        names = ["MB", *(folder.name for folder in options.folders)]
        print_table(names, rows(counts), console, markdown=options.markdown)

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

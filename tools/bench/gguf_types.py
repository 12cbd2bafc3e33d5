"""``python -m graphwright.tools.bench.gguf_types IN.gguf OUT.gguf TYPE``: matrices in another type.

``F32`` gives the same numbers to llama.cpp, which rounds inputs to 8 bits for matrices of blocks,
and to 16 for those of F16 and BF16: that rounding is then gone. Where xllamacpp is installed its
llama.cpp makes the blocks, as its tool does without an importance matrix. Else ``gguf`` does, which
has no K types, and ``Q2_K`` are nearest codes between each group's least and greatest value. A type
that a row does not fit is Q4_0, as llama.cpp falls back. Runs by its path too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def transcode(source: str, target: str, kind: str) -> None:
    """Write ``source`` with its matrices as ``kind``; keys and vectors stay."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if entry.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, entry.contents())
        else:
            writer.add_key_value(name, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        rows = plain.astype(np.float32).reshape(-1, shape[-1])  # of experts, one behind the other
        whole = len(shape) < 2 or tensor.name.endswith(".bias")  # those of experts lie together
        matrix, type_ = packed(rows, "F32" if whole else kind)
        matrix = matrix.reshape(*shape[:-1], -1)
        blocks = None if type_ in ("F32", "F16") else gguf.GGMLQuantizationType[type_]
        writer.add_tensor(tensor.name, matrix, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(matrix: Array, kind: str) -> tuple[Array, str]:
    """The matrix in a type, and which that is."""
    import gguf

    if kind in ("F32", "F16"):
        return matrix.astype(np.float32 if kind == "F32" else np.float16), kind
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    kind = kind if matrix.shape[1] % block == 0 else "Q4_0"
    library = importlib.util.find_spec("xllamacpp")
    if library is not None and library.origin is not None:
        return _by_llama_cpp(matrix, kind, Path(library.origin).parent), kind
    if kind == "Q2_K":
        return q2_k(matrix), kind
    return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind]), kind


def _by_llama_cpp(matrix: Array, kind: str, folder: Path) -> Array:
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rows, columns = matrix.shape
    source, blocks = np.ascontiguousarray(matrix), np.zeros((rows, columns // block * size), "u1")
    quantize = ctypes.CDLL(str(next(folder.glob("*.so")))).ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3,
                         ctypes.c_void_p]  # fmt: skip
    quantize.restype = ctypes.c_size_t
    written = quantize(int(type_), source.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    if written != blocks.nbytes:
        raise ValueError(f"llama.cpp wrote {written} bytes of {kind}, and {blocks.nbytes} fit")
    return blocks


def q2_k(matrix: Array) -> Array:
    """Blocks of 256: ``W = d sc q - dmin m``, q of 2 bits, sc and m of 4 for each 16 columns."""
    groups = matrix.reshape(-1, 16, 16)
    low = np.minimum(groups.min(-1), 0)
    scale = (np.maximum(groups.max(-1), 0) - low) / 3
    wide = (scale.max(1, keepdims=True) / 15).astype(np.float16)
    down = (-low.min(1, keepdims=True) / 15).astype(np.float16)
    d, dmin = wide.astype(np.float32), down.astype(np.float32)
    sc = np.rint(scale / np.where(d > 0, d, 1)).clip(0, 15).astype(np.uint8)
    m = np.rint(-low / np.where(dmin > 0, dmin, 1)).clip(0, 15).astype(np.uint8)
    step, start = (d * sc)[..., None], (dmin * m)[..., None]
    codes = np.rint((groups + start) / np.where(step > 0, step, 1)).clip(0, 3).astype(np.uint8)
    parts = codes.reshape(-1, 2, 4, 32)
    bits = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    blocks = np.concatenate(
        [sc | m << 4, bits.reshape(-1, 64), wide.view(np.uint8), down.view(np.uint8)], 1
    )
    return blocks.reshape(len(matrix), -1)


if __name__ == "__main__":
    transcode(*sys.argv[1:])

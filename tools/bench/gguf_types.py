"""``python -m graphwright.tools.bench.gguf_types IN.gguf OUT.gguf TYPE``: matrices in another type.

``F32`` gives the same numbers to llama.cpp, which rounds inputs to 8 bits for matrices of blocks,
and to 16 for those of F16 and BF16: that rounding is then gone. ``Q2_K`` is what llama.cpp's own
tool makes without an importance matrix, but for its search of scales: nearest codes between each
group's least and greatest value. A type that a row does not fit is Q4_0, as llama.cpp falls back.
Runs by its path too, in an environment with no package but ``gguf``.
"""

from __future__ import annotations

import sys
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
        matrix, type_ = packed(plain.astype(np.float32), kind if len(shape) == 2 else "F32")
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
    if kind == "Q2_K":
        return q2_k(matrix), kind
    return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind]), kind


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

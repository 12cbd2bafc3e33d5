"""torchao's tensors as transformers saves them, ``_weight_qdata`` and ``_weight_scale``.

What they are is JSON in the header of their safetensors file, by the name of the weight: the class,
the bits that int8 codes are of, and the columns of a group. ``W = (q - zero) * scale``, ``zero`` as
signed as the codes are. Read from torchao 0.18 (``prototype/safetensors``).

``Int4Tensor`` holds two signed codes a byte, the earlier one in the low nibble, and stands for ``W
= q scale + zero``, ``scale`` and ``zero`` ``[groups, N]``. Read from MSLK (``quantize/shuffle.py``)
which makes it; torchao multiplies by it on GPUs alone. Layouts of one kind of GPU
(``Int4TilePackedTo4dTensor``, ``Int4PlainInt32Tensor``) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import BadInput
from ...core.weights import Weight
from ...ops.pack import BITS
from .dense import Dense, read_float8
from .stored_linear import Parts, needed
from .tensor_kinds import FLOATS, NUMBER

MARK = "_weight_qdata"
PRE_SCALE = "_weight_act_pre_scale"
TENSORS = {
    MARK: None, "_weight_scale": FLOATS, "_weight_zero_point": NUMBER, PRE_SCALE: None,
    "_weight_act_quant_scale": None, "_weight_act_quant_zero_point": None,
}  # fmt: skip
WIDTHS = {"Int8Tensor": 8, "IntxUnpackedToInt8Tensor": None, "Float8Tensor": None, "Int4Tensor": 4}
"""Bits of each class that is read, where the class alone says them."""
ACTIVATIONS = ("act_quant_kwargs", "activation_quantization")
"""Where a class says how activations are rounded."""


def states(files: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    """What the headers say, by the names of linears. Raises ``BadInput`` where one is no JSON."""
    from safetensors import safe_open

    by_name: dict[str, Mapping[str, Any]] = {}
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
        for key, text in texts.items():
            if key.endswith(".weight") and text.startswith("{"):
                by_name[key.removesuffix(".weight")] = _state(path, key, text)
    return by_name


def _state(path: Path, key: str, text: str) -> Mapping[str, Any]:
    try:
        state = json.loads(text)
        return {"class": state["_type"], **(state.get("_data") or {})}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: the header's {key} is no state of torchao: {error}") from None


def rounds_activations(state: Mapping[str, Any]) -> bool:
    """Whether a linear's activations would be rounded there."""
    return any(state.get(key) is not None for key in ACTIVATIONS)


def read_linear(name: str, own: Mapping[str, Weight], state: Mapping[str, Any]) -> Parts | Dense:
    """One linear from its tensors and its state. Raises ``BadInput`` where they contradict each
    other, and for classes that are not read."""
    kind, block = state.get("class"), state.get("block_size")
    if not isinstance(kind, str) or kind not in WIDTHS:
        what = "has no state in the file's header" if kind is None else f"is of torchao's {kind}"
        raise BadInput(f"{name}.{MARK} {what}; {', '.join(WIDTHS)} are read")
    qdata, scale = needed(name, own, MARK), needed(name, own, "_weight_scale")
    if PRE_SCALE in own:
        raise BadInput(f"{name}.{PRE_SCALE} scales the linear's input, which is not read")
    if kind == "Int4Tensor":
        return _int4(name, own, block)
    if kind == "Float8Tensor":
        parts = {"weight": qdata, "weight_scale": scale}
        return read_float8(name, parts, {"weight_block_size": block})
    rows, group = qdata.shape[0], _columns(block)
    if qdata.dtype != torch.int8 or len(qdata.shape) != 2 or not 0 < group <= qdata.shape[1]:
        raise BadInput(f"{name}.{MARK} is {qdata.type}, in blocks of {block}; int8 is read")
    columns, bits = qdata.shape[1], WIDTHS[kind] or _bits(name, state)
    groups = -(-columns // group)
    zeros = own.get("_weight_zero_point")
    for part, tensor in (("_weight_scale", scale), ("_weight_zero_point", zeros)):
        if tensor is not None and tensor.numel != rows * groups:
            raise BadInput(
                f"{name}.{part} is {list(tensor.shape)}; groups of {group} of {rows} x {columns} "
                f"make {[rows, groups]}"
            )
    width = min(width for width in BITS if width >= bits)
    middle = 1 << (width - 1)

    def shifted(tensor: Weight) -> Tensor:
        codes = tensor.read().to(torch.int16) + middle
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2 * middle:
            raise BadInput(f"{name}: numbers of {MARK} or its zero point are beyond {bits} bits")
        return codes.to(torch.uint8)

    is_real = zeros is not None and zeros.dtype.is_floating_point
    dtype = torch.float32 if is_real else scale.dtype
    is_even = zeros is None or not bool(zeros.read().any())

    def moved() -> Tensor:
        assert zeros is not None
        stored = zeros.read().float() + middle if is_real else shifted(zeros)
        return stored.reshape(rows, groups)

    return Parts(
        name, rows, columns, width, 0 if groups == 1 else group, lambda: shifted(qdata),
        lambda: scale.read().to(dtype).reshape(rows, groups), dtype, None if is_even else moved,
        None, (qdata.key, scale.key), real_zeros=is_real and not is_even,
    )  # fmt: skip


def _int4(name: str, own: Mapping[str, Weight], block: object) -> Parts:
    """``W = q scale + zero`` as ``(q + 8 - (8 - zero / scale)) scale``."""
    qdata, scale, zero = (
        needed(name, own, part) for part in (MARK, "_weight_scale", "_weight_zero_point")
    )
    group = _columns(block)
    rows, columns = (*qdata.shape, 0, 0)[:2]
    columns *= 2
    if qdata.dtype not in (torch.int8, torch.uint8) or len(qdata.shape) != 2 or group < 1:
        raise BadInput(f"{name}.{MARK} is {qdata.type}, in blocks of {block}; two codes of 4 bits "
                       "a byte, int8, are read")  # fmt: skip
    groups = -(-columns // group)
    for part, tensor in (("_weight_scale", scale), ("_weight_zero_point", zero)):
        if tensor.shape != (groups, rows):
            raise BadInput(
                f"{name}.{part} is {list(tensor.shape)}; groups of {group} of {rows} x {columns} "
                f"make {[groups, rows]}"
            )

    def codes() -> Tensor:
        raw = qdata.read().view(torch.uint8)
        return torch.stack((raw & 15, raw >> 4), -1).flatten(1) ^ 8  # signed to unsigned

    def scales() -> Tensor:
        stored = scale.read().float().T
        if not bool(stored.all()):
            raise BadInput(f"{name}._weight_scale holds a 0")
        return stored

    return Parts(
        name, rows, columns, 4, 0 if groups == 1 else group, codes, scales, torch.float32,
        lambda: 8 - zero.read().float().T / scales(), None, (qdata.key, scale.key, zero.key),
        real_zeros=True,
    )  # fmt: skip


def _columns(block: object) -> int:
    """Of a group in a row; 0 for another block."""
    fits = isinstance(block, list) and [type(size) for size in block] == [int, int]
    return block[1] if fits and isinstance(block, list) and block[0] == 1 else 0


def _bits(name: str, state: Mapping[str, Any]) -> int:
    """The width that ``target_dtype`` says, ``int4`` as 4."""
    stated = state.get("target_dtype")
    word = str(stated.get("_data") if isinstance(stated, dict) else stated)
    digits = word.removeprefix("int")
    if not digits.isdigit() or not 1 <= int(digits) <= 8:
        raise BadInput(f"{name}: target_dtype {word!r} of torchao; int1 to int8 are read")
    return int(digits)

"""What a quantized linear's tensors and settings have to be: another kind would be read as noise.

Of a tensor the dtypes and the number of dimensions, by which its file's header is held; of a
setting that it is a whole number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import BadInput
from ...core.weights import Weight

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Kind:
    """A kind of tensor, in words too."""

    words: str
    dtypes: tuple[torch.dtype, ...]
    rank: int | None = None
    """Dimensions; ``None`` where the reader itself knows what fits."""


FLOATS = Kind("floats", (torch.float32, torch.float16, torch.bfloat16))
WORDS = Kind("a matrix of int32", (torch.int32,), 2)
BYTES = Kind("uint8", (torch.uint8,))
PACKED = Kind("a matrix of uint8", (torch.uint8,), 2)
INT8 = Kind("a matrix of int8", (torch.int8,), 2)
WHOLE = Kind("whole numbers", _INTEGERS)
NUMBER = Kind("a number", (*_INTEGERS, *FLOATS.dtypes, torch.bool))
FLOAT8 = Kind("a matrix of float8", (torch.float8_e4m3fn, torch.float8_e5m2), 2)
SCALES8 = Kind("float8 or exponents", (torch.float8_e4m3fn, torch.uint8), 2)
SCALES = Kind("floats or exponents", (*FLOATS.dtypes, torch.uint8, torch.float8_e8m0fnu))


def check_kinds(name: str, own: Mapping[str, Weight], kinds: Mapping[str, Kind | None]) -> None:
    """Raises ``BadInput`` for a tensor of the linear ``name`` that is not of its kind."""
    for part, tensor in own.items():
        kind = kinds.get(part)
        if kind is None:
            continue
        if tensor.dtype not in kind.dtypes or kind.rank not in (None, len(tensor.shape)):
            raise BadInput(f"{name}.{part} is {tensor.type}, expected {kind.words}")


def whole_number(name: str, settings: Mapping[str, Any], key: str, default: int) -> int:
    """A setting of the config, ``default`` where it is absent. Raises ``BadInput`` for what is no
    whole number."""
    number = settings.get(key)
    if number is None:
        return default
    if type(number) is not int:
        raise BadInput(f"{name}: {key} of quantization_config is {number!r}, no whole number")
    return number

"""Parameters as lazy handles: shape and dtype at once, bytes only when read, one at a time.

A handle never caches what it read. Replacing a weight means replacing its handle, so that a model
larger than memory passes through one tensor at a time, from its files into the artifact.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import FULL, BadInput, DiskFull, Missing
from .files import Stamp, changed, gone, open_regular
from .scratch import Scratch
from .types import DTYPE_NAMES, Type

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


_PIECE = 1 << 22
"""Numbers in one of ``pieces``: 16 MB of float32."""


class Weight(ABC):
    """A parameter or constant that is read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The tensor, freshly read, contiguous, on CPU. The caller must not write to it."""

    def pieces(self) -> Iterator[torch.Tensor]:
        """The numbers in order, a part after the other, for a writer that needs no more at once."""
        yield self.read()

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Identity of the stored bytes: weights with equal keys hold the same numbers."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """What an artifact takes for it where no pass changes it."""
        return self.nbytes

    @property
    def type(self) -> Type:
        return Type(self.dtype, self.shape)

    def transposed(self) -> Weight:
        """The matrix transposed; transposing twice gives back the same handle."""
        return TransposedWeight(self)

    def reshaped(self, shape: tuple[int, ...]) -> Weight:
        """The same numbers in another shape of as many elements."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"{list(self.shape)} cannot be seen as {list(shape)}")
        base = self
        return ComputedWeight(
            lambda: base.read().reshape(shape), shape, self.dtype, ("reshaped", shape, base.key)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({DTYPE_NAMES.get(self.dtype)}{list(self.shape)})"


class MemoryWeight(Weight):
    """A tensor held in memory. ``ValueError`` for a meta or fake tensor, which holds no numbers."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
            raise ValueError(f"a {list(tensor.shape)} tensor without data is not a weight")
        self._tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read(self) -> torch.Tensor:
        return self._tensor.cpu().contiguous()

    @property
    def key(self) -> Hashable:
        t = self._tensor
        # Tensors without elements share the address 0.
        return ("memory", t.data_ptr() or id(t), self.shape, t.stride(), self.dtype)


class FileWeight(Weight):
    """``nbytes`` raw little-endian bytes at ``offset`` of a safetensors or external data file.

    The file must stay as it is while there are handles of it: where it is another than that of
    ``stamp``, by default the one that is there now, reading is refused. A temporary file, which has
    an ``owner``, may grow.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        owner: object = None,
        stamp: Stamp | None = None,
    ) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self._owner = owner  # a temporary file goes with its owner: the handle keeps it alive
        if owner is None and stamp is None and path.is_file():
            stamp = Stamp.of(path.stat())
        self._stamp = stamp

    def read(self) -> torch.Tensor:
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            raise gone(self.path) from None
        with file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            raw = map_bytes(file.fileno(), self.offset, self.nbytes)
        if raw is None:
            raise BadInput(
                f"{self.path}: truncated: a tensor of {self.nbytes} bytes at offset "
                f"{self.offset} reaches past the end of the file"
            )
        if self._stamp not in (None, stamp):
            raise changed(self.path)
        if self.offset % self.dtype.itemsize:
            raw = memoryview(bytearray(raw))
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.shape)

    def part(self, start: int, shape: tuple[int, ...]) -> FileWeight:
        """Numbers of it from number ``start`` on, in a shape of their own."""
        offset = self.offset + start * self.dtype.itemsize
        return FileWeight(self.path, offset, shape, self.dtype, self._owner, self._stamp)

    @property
    def key(self) -> Hashable:
        return ("file", str(self.path), self.offset, self.shape, self.dtype)


class CastWeight(Weight):
    """A weight in another dtype; the numbers are converted when they are read."""

    def __init__(self, base: Weight, dtype: torch.dtype) -> None:
        self.base, self.shape, self.dtype = base, base.shape, dtype

    def read(self) -> torch.Tensor:
        return self.base.read().to(self.dtype)

    def pieces(self) -> Iterator[torch.Tensor]:
        for whole in self.base.pieces():
            for part in torch.split(whole.reshape(-1), _PIECE):
                yield part.to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        stored = self.base.stored_bytes
        return stored if stored < self.base.nbytes else self.nbytes

    def transposed(self) -> Weight:
        # The numbers in few bytes are turned, not those in many.
        return CastWeight(self.base.transposed(), self.dtype)

    @property
    def key(self) -> Hashable:
        return ("cast", self.base.key, self.dtype)


class AbsentWeight(Weight):
    """A weight of known shape and dtype whose file is not there: good for a dry run only."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
        self.name, self.shape, self.dtype, self.reason = name, shape, dtype, reason

    def read(self) -> torch.Tensor:
        raise Missing(f"the weight {self.name!r} cannot be read: {self.reason}")

    @property
    def key(self) -> Hashable:
        return ("absent", self.name, self.shape, self.dtype)


class TransposedWeight(Weight):
    """A matrix seen transposed, without moving a byte until it is read."""

    def __init__(self, base: Weight) -> None:
        if len(base.shape) != 2:
            raise ValueError(f"only matrices are transposed, not {list(base.shape)}")
        self.base = base
        self.shape = base.shape[::-1]
        self.dtype = base.dtype

    def read(self) -> torch.Tensor:
        return self.base.read().t().contiguous()

    def pieces(self) -> Iterator[torch.Tensor]:
        whole, rows = self.base.read(), max(1, _PIECE // max(1, self.shape[1]))
        for part in torch.split(whole, rows, 1):
            yield part.t().contiguous()

    @property
    def key(self) -> Hashable:
        return ("transposed", self.base.key)

    def transposed(self) -> Weight:
        return self.base


class ComputedWeight(Weight):
    """A weight that a function of no arguments makes each time it is read."""

    def __init__(
        self,
        make: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        key: Hashable,
    ) -> None:
        self._make, self.shape, self.dtype, self._key = make, shape, dtype, key

    def read(self) -> torch.Tensor:
        tensor = self._make()
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"computed {tensor.dtype} {list(tensor.shape)}, declared {self.dtype} {self.shape}"
            )
        return tensor.contiguous()

    @property
    def key(self) -> Hashable:
        return ("computed", self._key)


SPOOLED_BYTES = 1 << 28
"""New weights that a spool holds in memory."""
_files: MutableMapping[torch.Tensor, Weight] = WeakTensorKeyDictionary()
"""Where the tensors that ``mapped`` gave lie."""


def mapped(weight: FileWeight) -> torch.Tensor:
    """The tensor of a file, which a spool then knows: it stores no copy of it."""
    tensor = weight.read()
    _files[tensor] = weight
    return tensor


class Spool:
    """New weights: in memory up to ``budget_bytes`` altogether, on disk beyond that.

    What ``mapped`` gave stays in the file where it is.

    The file lies in the system's temporary folder and goes with the spool: see ``Scratch``.
    """

    def __init__(self, budget_bytes: int = SPOOLED_BYTES) -> None:
        self._budget = budget_bytes
        self._scratch: Scratch | None = None
        self._file: BinaryIO | None = None

    def store(self, tensor: torch.Tensor) -> Weight:
        """The tensor as a handle. Raises ``DiskFull`` where there is no room for it."""
        known = _files.get(tensor)
        if known is not None:
            return known
        tensor = tensor.detach().contiguous().cpu()
        size = tensor.numel() * tensor.element_size()
        if size <= self._budget:
            self._budget -= size
            # A slice would keep the whole tensor that it was cut from alive.
            whole = tensor.untyped_storage().nbytes() == size
            return MemoryWeight(tensor if whole else tensor.clone())
        try:
            if self._file is None:
                self._scratch = Scratch("spool")
                self._file = (self._scratch.path / "weights").open("wb")
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(tensor_bytes(tensor))
            self._file.flush()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull(
                f"the disk of {tempfile.gettempdir()} ran full: new weights lie there until the "
                "artifact is written. Free some space, or set TMPDIR to a folder on a larger disk"
            ) from None
        return FileWeight(Path(self._file.name), offset, tuple(tensor.shape), tensor.dtype, self)


def map_bytes(descriptor: int, offset: int, size: int) -> memoryview | None:
    """``size`` bytes of an open file, from ``offset`` on, mapped into memory; ``None`` where the
    file ends before.

    A page is read when it is touched and leaves when memory is short: nothing is copied. What is
    written to it stays with this mapping and never reaches the file.
    """
    if os.fstat(descriptor).st_size < offset + size:
        return None
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(
        descriptor, offset + size - start, offset=start, access=mmap.ACCESS_COPY
    )
    return memoryview(mapped)[offset - start :]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw.cast("B")


def read_safetensors_header(path: Path) -> Iterator[tuple[str, FileWeight]]:
    """Names and handles of the tensors in a safetensors file; no tensor is read.

    Raises ``BadInput`` where the file is not a regular one, not a safetensors file or cut short,
    where a tensor's extent contradicts its shape, and where safetensors' own reader refuses it
    (tensors that overlap or leave holes, fields that are given twice).
    """
    with open_regular(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(stamp.size - 8, 100 << 20):
            raise BadInput(f"{path}: not a safetensors file (its header length makes no sense)")
        try:
            header = json.loads(file.read(length))
        # A number of thousands of digits is a plain ValueError.
        except (ValueError, RecursionError) as error:
            reason = f"header is not JSON: {error}"
            raise BadInput(f"{path}: not a safetensors file ({reason})") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: not a safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    weights = {n: _safetensors_entry(path, n, e, 8 + length, stamp) for n, e in header.items()}
    _refuse_as_the_library(path)
    yield from weights.items()


def _safetensors_entry(
    path: Path, name: str, entry: object, start: int, stamp: Stamp
) -> FileWeight:
    if not isinstance(entry, dict):
        raise BadInput(f"{path}: tensor {name!r} has a malformed header entry: {entry}")
    try:
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        shape = tuple(int(d) for d in entry["shape"])
        begin, end = (int(x) for x in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadInput(f"{path}: tensor {name!r} has a malformed header entry: {entry}") from None
    if dtype is None:
        raise BadInput(f"{path}: tensor {name!r} is of dtype {entry['dtype']}, which is not read")
    if end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise BadInput(f"{path}: tensor {name!r}: {end - begin} bytes do not hold {shape} {dtype}")
    if start + end > stamp.size or begin < 0:
        raise BadInput(
            f"{path}: truncated: tensor {name!r} ends at byte {start + end} of {stamp.size}"
        )
    return FileWeight(path, start + begin, shape, dtype, stamp=stamp)


def _refuse_as_the_library(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        raise BadInput(f"{path}: safetensors does not take it: {error}") from None


def distinct_bytes(weights: Iterable[Weight]) -> int:
    """Bytes of weights as they are stored; of those that share their numbers once."""
    return sum({weight.key: weight.stored_bytes for weight in weights}.values())

"""An ONNX model as two files: the graph, and the data of its larger tensors."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path

import onnx_ir
from onnx_ir import external_data

from ...ir.core.tensors import refuse_changed
from ...ir.ops.bitstack_blocks import in_file_order, place_of

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
MODEL_FILES = (MODEL_FILE, DATA_FILE)
MANIFEST_FILE = "graphwright.json"
"""The file beside them by which a folder is known to be ours."""
INLINE_BYTES = 1024
"""Tensors up to this size stay inside the graph's file, but for blocks of stacked weights."""
PAGE_BYTES = 4096
PAGE_ALIGNED_BYTES = 1 << 16
"""Tensors above this size start on a page of the data file, so that they can be mapped in place."""


def write_model(
    model: onnx_ir.Model, folder: Path, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Write ``model.onnx`` and ``model.onnx.data``; each tensor is read, written and freed in turn.

    The bytes depend on the model alone. ``progress`` is called before each tensor with what is
    done, the tensor's index and their number.
    """

    def report(tensor: onnx_ir.TensorProtocol, info: external_data.CallbackInfo) -> None:
        if progress is not None:
            progress("writing weights", info.index, info.total)

    save(model, folder / MODEL_FILE, DATA_FILE, report)


def save(
    model: onnx_ir.Model, path: Path, data: str,
    callback: Callable[[onnx_ir.TensorProtocol, external_data.CallbackInfo], None],
) -> None:  # fmt: skip
    """Write ``path`` and, beside it, ``data``; each tensor is read, written and freed in turn.

    ``model`` stays as it is. The blocks of stacked weights come last in the data, in their order:
    a smaller size of the model is a beginning of it. Raises ``BadInput`` where a tensor's own data
    file is another than when the model was opened.
    """
    values = [v for g in model.graphs() for v in g.initializers.values() if _has_data(v)]
    outside = in_file_order(v for v in values if _is_outside(v))
    inside = [v for v in values if not _is_outside(v)]
    originals = [(v, v.const_value) for v in values]

    def checked(tensor: onnx_ir.TensorProtocol, info: external_data.CallbackInfo) -> None:
        refuse_changed(tensor)
        callback(tensor, info)

    tensors = [
        *external_data.convert_tensors_to_external(
            [v.const_value for v in outside if v.const_value is not None], path.parent, data,
            callback=checked, alignment=PAGE_BYTES, align_threshold=PAGE_ALIGNED_BYTES,
        ),
        *(_in_memory(v.const_value) for v in inside if v.const_value is not None),
    ]  # fmt: skip
    try:
        for value, tensor in zip([*outside, *inside], tensors, strict=True):
            value.const_value = tensor
        onnx_ir.save(model, path)
    finally:
        for value, before in originals:
            value.const_value = before


def save_beside(model: onnx_ir.Model, path: Path, other: Path, data: str) -> int:
    """Write ``path``, whose larger tensors lie in the data file of the model ``other`` beside it.

    What that one holds is read from there, under whatever name; the rest goes behind it. The bytes
    by which the data file has grown.
    """
    held = _Held(onnx_ir.load(other), path.parent / data)
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and _is_outside(value):
                value.const_value = held.place(str(value.name), tensor)
    onnx_ir.save(model, path)
    return held.added


class _Held:
    """The tensors of a data file: by name, and by their bytes where a name is not there."""

    def __init__(self, model: onnx_ir.Model, file: Path) -> None:
        self._file = file
        self.added = 0
        self._named = {
            value.name: value.const_value
            for graph in model.graphs() for value in graph.initializers.values()
            if isinstance(value.const_value, onnx_ir.ExternalTensor)
        }  # fmt: skip
        self._digests: dict[str | None, Hashable] = {}

    def _digest(self, name: str | None) -> Hashable:
        """Of a tensor of the file, which is read once for it."""
        if name not in self._digests:
            self._digests[name] = _hash(self._named[name])
        return self._digests[name]

    @functools.cached_property
    def _hashed(self) -> dict[Hashable, onnx_ir.ExternalTensor]:
        return {self._digest(name): tensor for name, tensor in self._named.items()}

    def place(self, name: str, tensor: onnx_ir.TensorProtocol) -> onnx_ir.ExternalTensor:
        """Where the file holds these bytes, from now on at the latest."""
        refuse_changed(tensor)
        digest, known = _hash(tensor), self._named.get(name)
        if known is not None and self._digest(name) == digest:
            return known
        if digest not in self._hashed:
            self._hashed[digest] = self._appended(tensor)
        return self._hashed[digest]

    def _appended(self, tensor: onnx_ir.TensorProtocol) -> onnx_ir.ExternalTensor:
        with self._file.open("ab") as sink:
            end = sink.tell()
            offset = -(-end // PAGE_BYTES) * PAGE_BYTES
            sink.write(bytes(offset - end))
            sink.write(tensor.tobytes())
            self.added += sink.tell() - end
        return onnx_ir.ExternalTensor(
            self._file.name, offset, tensor.nbytes, tensor.dtype,
            shape=onnx_ir.Shape(list(tensor.shape.numpy())), name=str(tensor.name),
            base_dir=self._file.parent,
        )  # fmt: skip


def _hash(tensor: onnx_ir.TensorProtocol) -> Hashable:
    digest = hashlib.sha256(tensor.tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape.numpy()), digest


def _has_data(value: onnx_ir.Value) -> bool:
    return value.const_value is not None


def _is_outside(value: onnx_ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and (tensor.nbytes > INLINE_BYTES or place_of(value.name) is not None)


def _in_memory(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return tensor
    refuse_changed(tensor)
    return external_data.convert_tensors_from_external([tensor])[0]

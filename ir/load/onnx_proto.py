"""The proto of an ONNX file, checked and put in order; external data unseen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir

from ..core.errors import BadInput, Missing, first_line
from ..core.quiet import quiet
from ..onnx.functions import inline_functions
from ..onnx.order import put_in_order
from ..onnx.validate import check_model, open_dims

MIN_OPSET = 18
"""The vocabulary reads axes as operands, as they are since opset 18."""
_STANDARD = "ai.onnx"
_DRAFTED = 8
"""The version of the format that opset 18, the oldest that is read, came with."""
_CONSTANTS_ARE_INPUTS = 3
"""Up to this version of the format every initializer had to be an input, and none could be given
other numbers by a caller."""


def read_model(path: Path) -> onnx_ir.Model:
    """The model as the file says it, external data unseen.

    Functions are inlined, nodes are in an order in which they can run. Raises ``Missing`` for an
    absent file, ``BadInput`` for one that is damaged, cut short, or makes no sense.
    """
    if not path.exists():
        raise Missing(f"{path}: no such file")
    if not path.is_file():
        raise BadInput(f"{path}: not a file, but a folder, a pipe or a device")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty")
    proto = _parse(path)
    try:
        _normalize(proto)
        if not proto.graph.output or "" not in {o.domain for o in proto.opset_import}:
            raise BadInput(f"{path}: not an ONNX model, or cut short (no outputs or no opset)")
        check_model(proto, str(path))
    except UnicodeDecodeError as error:  # a name, where it is compared
        raise BadInput(f"{path}: a name in it is not text: the file is damaged ({error})") from None
    _forget_maps((*proto.graph.output, *proto.graph.value_info))
    try:
        with quiet():
            model = onnx_ir.serde.deserialize_model(proto)
    except (onnx_ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: not an ONNX model, or cut short ({_reason(error)})") from error
    # External data is named from the file's folder.
    onnx_ir.external_data.set_base_dir(model.graph, path.parent)
    for function in model.functions.values():
        onnx_ir.external_data.set_base_dir(function.graph, path.parent)
    inline_functions(model, str(path))
    put_in_order(model.graph, str(path))
    if model.ir_version <= _CONSTANTS_ARE_INPUTS:
        names = model.graph.initializers
        inputs = [value for value in model.graph.inputs if value.name not in names]
        model.graph.inputs.clear()
        model.graph.inputs.extend(inputs)
    model.ir_version = max(model.ir_version or 0, _DRAFTED)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise BadInput(f"{path}: not an ONNX model, or cut short ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The first line of what an error was caused by in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _forget_maps(infos: Iterable[onnx.ValueInfoProto]) -> None:
    """Maps go untyped, in place: onnx-ir has no type for them, and runtimes infer it."""
    for info in infos:
        inner = info.type
        while inner.HasField("sequence_type"):
            inner = inner.sequence_type.elem_type
        if inner.HasField("map_type"):
            info.ClearField("type")


def _normalize(proto: onnx.ModelProto) -> None:
    """Write what is the same in one way: the standard domain has an empty name, outputs that are
    left out at the end are not there, sizes of less than 0 are open ones, and domains of which the
    file says no version have the first. A file without nodes of the standard domain need not say
    its version."""
    for opsets in (proto.opset_import, *(f.opset_import for f in proto.functions)):
        for opset in opsets:
            opset.domain = "" if opset.domain == _STANDARD else opset.domain
    open_dims((*proto.graph.input, *proto.graph.output, *proto.graph.value_info))
    waiting = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    domains: set[str] = set()
    while waiting:
        node = waiting.pop()
        node.domain = "" if node.domain == _STANDARD else node.domain
        domains.add(node.domain)
        while node.output and not node.output[-1]:
            node.output.pop()
        for attribute in node.attribute:
            waiting += [n for graph in (attribute.g, *attribute.graphs) for n in graph.node]
    known = {o.domain for o in proto.opset_import}
    if known and "" not in known | domains:
        proto.opset_import.add(domain="", version=MIN_OPSET)
    for domain in sorted(domains - known - {""}):
        proto.opset_import.add(domain=domain, version=1)

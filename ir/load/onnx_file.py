"""ONNX files: the proto is read, external data stays on disk."""

from __future__ import annotations

import contextlib
import itertools
import logging
from pathlib import Path

import onnx_ir

from ..canonical.nbit import canonicalize_stored
from ..canonical.open_types import settle_types
from ..core.errors import BadInput, first_line
from ..core.quiet import quiet
from ..core.tensors import weight_of
from ..core.view import Source
from ..onnx.axes import open_sums
from ..onnx.foreign import forget_foreign_dims
from ..onnx.validate_types import check_types
from ..onnx.view import OnnxView
from ..structure.pictured import read_prompt
from ..structure.tree_input import TREE
from .bitstack_size import cut
from .onnx_proto import MIN_OPSET, read_model

logger = logging.getLogger(__name__)


def load_onnx(path: Path, max_bytes: int | None = None) -> OnnxView:
    """The graph of an ONNX file. Models older than opset 18 are converted to it, and linears stored
    in few bits are read as such (``canonical.nbit``).

    External data is checked (there, in the model's folder, long enough), never read. ``max_bytes``
    leaves blocks of stacked weights away (``bitstack_size.cut``); their data need not be there.

    Raises ``Missing`` for an absent file, ``BadInput`` for one that is damaged, cut short,
    reaches outside its folder, cannot be converted, or does not get as small as that.
    """
    # Without a folder in front, onnx-ir skips its own check that external data stays inside.
    path = path.absolute()
    model = read_model(path)
    if max_bytes is not None:
        cut(model, path, max_bytes)
    external = _check_external_data(model)
    _tell_of_defaults(model.graph, path)
    model = _modern(model, path)
    open_sums(model)
    forget_foreign_dims(model.graph)
    files = (path, *sorted(external))
    view = OnnxView(
        model,
        source=Source(
            kind="onnx",
            name=str(path),
            folder=str(path.parent),
            files=files,
            source_bytes=sum(f.stat().st_size for f in files),
            prompt=read_prompt(model.metadata_props),
        ),
    )
    with contextlib.suppress(ValueError):  # which is told next, with the node's name
        view.infer_types()
        settle_types(view)
    check_types(view, str(path))
    canonicalize_stored(view)
    view.count_anew()
    return view


def _tell_of_defaults(graph: onnx_ir.Graph, path: Path) -> None:
    names = [str(v.name) for v in graph.inputs if v.name in graph.initializers and v.name != TREE]
    if names:
        logger.warning(
            "%s: %d weights are inputs too (%s), whose numbers a caller may give: they stay as "
            "they are. If nobody does, take them off the inputs, as onnxruntime's tool "
            "remove_initializer_from_input.py does", path, len(names), ", ".join(names[:3]),
        )  # fmt: skip


def _check_external_data(model: onnx_ir.Model) -> set[Path]:
    """The data files that the model's tensors name, each tensor checked against its file.

    Tensors may share all their bytes, as tied weights do, and no part of them.
    """
    places: dict[Path, dict[tuple[int, int], str]] = {}
    for tensor in _tensors(model):
        if isinstance(tensor, onnx_ir.ExternalTensor):
            weight_of(tensor)
            start = tensor.offset or 0
            spans = places.setdefault(Path(tensor.path), {})
            spans[start, start + tensor.nbytes] = str(tensor.name)
    for path, spans in places.items():
        for (one, (_, end)), (other, (start, _)) in itertools.pairwise(
            (name, place) for place, name in sorted(spans.items()) if place[0] < place[1]
        ):
            if start < end:
                raise BadInput(f"{path}: the bytes of {one!r} and {other!r} overlap")
    return set(places)


def _tensors(model: onnx_ir.Model) -> list[onnx_ir.TensorProtocol]:
    graphs: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    tensors: list[onnx_ir.TensorProtocol] = []
    while graphs:
        graph = graphs.pop()
        if isinstance(graph, onnx_ir.Graph):
            values = graph.initializers.values()
            tensors += [v.const_value for v in values if v.const_value is not None]
        for attr in (a for node in graph for a in node.attributes.values() if not a.is_ref()):
            if attr.type == onnx_ir.AttributeType.TENSOR:
                tensors.append(attr.value)
            elif attr.type == onnx_ir.AttributeType.GRAPH:
                graphs.append(attr.value)
            elif attr.type == onnx_ir.AttributeType.GRAPHS:
                graphs.extend(attr.value)
    return tensors


_NORMALIZED = 17
"""The opset that has LayerNormalization, and no op that differs from opset 16's. ONNX Runtime takes
that node in older ones too, where its optimizer writes it and the converter knows of none."""


def _modern(model: onnx_ir.Model, path: Path) -> onnx_ir.Model:
    opset = model.opset_imports[""]
    if opset >= MIN_OPSET:
        return model
    if _means_the_same(model, opset):
        model.opset_imports[""] = MIN_OPSET
        return model
    from onnxscript import version_converter

    advice = (
        f"opset {opset} is older than {MIN_OPSET} and cannot be converted here; export the model "
        f"again with opset_version={MIN_OPSET} or later"
    )
    ranks = _ranks(model)
    with quiet():
        try:
            if opset < _NORMALIZED:
                version_converter.convert_version(model, target_version=16, fallback=True)
                if model.opset_imports[""] == 16:
                    model.opset_imports[""] = _NORMALIZED
            version_converter.convert_version(model, target_version=MIN_OPSET, fallback=True)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = first_line(error)
            raise BadInput(f"{path}: {advice} ({reason})") from error
    if model.opset_imports[""] != MIN_OPSET:
        raise BadInput(f"{path}: {advice}")
    new_ranks = _ranks(model)
    changed = [name for name, rank in ranks.items() if new_ranks.get(name, rank) != rank]
    if changed:  # as that of Scan before opset 9, which takes a batch
        raise BadInput(f"{path}: {advice} (it would change the shape of {changed[0]!r})")
    return model


def _means_the_same(model: onnx_ir.Model, opset: int) -> bool:
    """Whether no op of the model has changed from that opset to ``MIN_OPSET``: a conversion, which
    goes through the model twice and in C, would change no node."""
    from onnx import defs

    if model.functions:  # which have opsets of their own
        return False
    nodes = itertools.chain.from_iterable(model.graphs())
    ops = {node.op_type for node in nodes if node.domain == ""}
    try:
        return all(defs.get_schema(op, MIN_OPSET).since_version <= opset for op in ops)
    except defs.SchemaError:  # one that there is no more
        return False


def _ranks(model: onnx_ir.Model) -> dict[str, int]:
    """The known ranks of inputs and outputs."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return {str(v.name): len(v.shape) for v in values if v.shape is not None}

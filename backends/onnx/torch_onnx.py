"""From an exported torch program to an ONNX model by ``torch.onnx``, all of it at once.

The way for what ``fx_to_onnx`` has no form for: it decomposes every op and takes time that grows
faster than the graph (12 s of processor time for 16 small Llama layers).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common
from torch.export import ExportedProgram

from ...ir.core.errors import BadInput
from ...ir.core.quiet import quiet
from ...ir.core.tensors import tensor_of
from ...ir.core.weights import ComputedWeight, Weight

DOMAIN = "graphwright"
_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDABLE_NUMEL = 64
"""Constants of the program itself up to this size take part in the folding of shape arithmetic."""


def to_onnx(
    program: ExportedProgram,
    weights: Mapping[str, Weight],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dim_names: Mapping[str, str] | None = None,
    opset: int = 21,
) -> onnx_ir.Model:
    """Translate a functional program; its parameters may be fake tensors.

    ``weights`` gives the handle of every parameter, buffer and constant by its qualified name,
    which becomes the initializer's name. None of them is read: an initializer wraps its handle.
    ``dim_names`` maps the program's symbols to names (``{"s43": "batch"}``). Our own ops become
    nodes of the domain ``graphwright``, tensors as inputs (absent ones empty) and the rest as
    attributes: ``lower`` turns them into stock ops.

    Raises ``BadInput`` where an op has no ONNX form, naming it and its module, and where a fake
    parameter has no handle.
    """
    model = _translate(program, opset)
    constants = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    _detach(model, weights, {n for n in constants if n in weights})
    with quiet():
        _simplify(model)
    _rename(model, input_names, output_names, dim_names or {})
    _attach(model, weights)
    _strip_metadata(model)
    return model


def _translate(program: ExportedProgram, opset: int) -> onnx_ir.Model:
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.scaled_dot_product_attention.default: _sdpa,
        _RESHAPE: _reshape,
    }
    for node in program.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == DOMAIN:
            table[target] = _own_op(target)
    try:
        with quiet(), _without_views(program.graph):
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=table,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _explained(program, error) from error
    assert exported is not None
    return exported.model


_RESHAPE = torch.ops.aten._reshape_copy.default
_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
)


@contextlib.contextmanager
def _without_views(graph: torch.fx.Graph) -> Iterator[None]:
    """Let every reshape be one that does not depend on strides, for as long as the block runs.

    The exporter takes reshape for view by the strides of one fake run, and its next fake run, where
    attention gives other strides, fails on that view (torch 2.13, T5).
    """
    changed = [(node, node.target) for node in graph.nodes if node.target in _VIEWS]
    for node, _ in changed:
        node.target = _RESHAPE
    try:
        yield
    finally:
        for node, target in changed:
            node.target = target


# --- translations of our own ---------------------------------------------------------------------


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale q k' + mask) v, where a query that may see no key gives zeros, as in torch.

    The exporter's own form gives such a query (a left-padded prompt has them) the mean of v.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout {dropout_p}: trace the model in eval mode")
    op = _opset()
    rank, width = len(query.shape), query.shape[-1]
    zero, lowest = (_scalar(number, query.dtype) for number in (0.0, float("-inf")))
    if enable_gqa:
        key, value = (_repeat_heads(t, query.shape[1] // t.shape[1]) for t in (key, value))
    swapped = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    factor = width**-0.5 if scale is None else scale
    scores = op.MatMul(op.Mul(query, _scalar(factor, query.dtype)), swapped)
    if is_causal:
        attn_mask = _lower_triangle(query, key)
    boolean = is_causal or (attn_mask is not None and attn_mask.dtype == onnx_ir.DataType.BOOL)
    if boolean:
        scores = op.Where(attn_mask, scores, lowest)
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    weights = op.Softmax(scores, axis=-1)
    if boolean and not is_causal:
        weights = op.Where(op.IsNaN(weights), zero, weights)
    return op.MatMul(weights, value)


def _reshape(x: Any, shape: Sequence[Any]) -> Any:
    """reshape(x, shape) => Reshape(x, shape)"""
    op = _opset()
    one = onnx_ir.tensor([-1])
    sizes = [
        op.Constant(value=onnx_ir.tensor([size]))
        if isinstance(size, int)
        else op.Reshape(size, op.Constant(value=one))
        for size in shape
    ]
    empty = onnx_ir.tensor([], dtype=onnx_ir.DataType.INT64)
    target = op.Concat(*sizes, axis=0) if sizes else op.Constant(value=empty)
    return op.Reshape(x, target, allowzero=0 if -1 in shape else 1)


def _opset() -> Any:
    from onnxscript import opset21

    return opset21


def _scalar(number: float, dtype: onnx_ir.DataType) -> Any:
    return _opset().Constant(value=onnx_ir.tensor(number, dtype=dtype))


def _lower_triangle(query: Any, key: Any) -> Any:
    op = _opset()
    rows, columns = (op.Shape(t, start=-2, end=-1) for t in (query, key))
    one = op.Constant(value=onnx_ir.tensor(True))
    return op.Trilu(op.Expand(one, op.Concat(rows, columns, axis=0)), upper=0)


def _repeat_heads(x: Any, times: int) -> Any:
    """Every head of ``[batch, heads, tokens, width]`` ``times`` times in a row."""
    op = _opset()
    five = op.Unsqueeze(x, op.Constant(value_ints=[2]))
    wide = op.Expand(five, op.Constant(value_ints=[1, 1, times, 1, 1]))
    heads, width = x.shape[1] * times, x.shape[3]
    return op.Reshape(wide, op.Constant(value_ints=[0, heads, -1, width]))


def _own_op(target: torch._ops.OpOverload) -> Callable[..., Any]:
    """The translation of one of our ops: a node of the same name in our own domain."""
    arguments = target._schema.arguments
    is_tensor = {a.name: "Tensor" in str(a.type) for a in arguments}

    def translate(*args: Any, **kwargs: Any) -> Any:
        from onnxscript.values import Op, Opset

        arguments = dict(zip(is_tensor, args, strict=False)) | kwargs
        inputs = {name: arguments.get(name) for name, tensor in is_tensor.items() if tensor}
        attrs = {n: v for n, v in arguments.items() if not is_tensor[n] and v is not None}
        attrs = {n: int(v) if isinstance(v, bool) else v for n, v in attrs.items()}
        schema = _schema(target._opname, list(inputs), attrs, len(target._schema.returns))
        return Op(Opset(DOMAIN, 1), target._opname, schema)(*inputs.values(), **attrs)

    return translate


_ATTRIBUTE = {int: "INT", float: "FLOAT", str: "STRING"}
_TENSORS = [
    f"tensor({name})"
    for name in (
        "float", "double", "float16", "bfloat16", "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64", "bool", "float8e4m3fn", "float8e5m2",
    )
]  # fmt: skip


def _schema(
    name: str, inputs: Sequence[str], attrs: Mapping[str, Any], outputs: int
) -> onnx.defs.OpSchema:
    """A schema that lets the exporter record a call; types are checked where ops are declared."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    kinds = []
    for attr, value in attrs.items():
        sequence = isinstance(value, list | tuple)
        kind = _ATTRIBUTE[type(value[0] if sequence else value)] + "S" * sequence
        kinds.append(schema.Attribute(attr, getattr(schema.AttrType, kind), ""))
    return schema(
        name,
        DOMAIN,
        1,
        inputs=[
            schema.FormalParameter(n, f"T{i}", param_option=optional) for i, n in enumerate(inputs)
        ],
        outputs=[schema.FormalParameter(f"y{i}", "T") for i in range(outputs)],
        type_constraints=[
            (name, _TENSORS, "") for name in ("T", *(f"T{i}" for i in range(len(inputs))))
        ],
        attributes=kinds,
    )


# --- afterwards ----------------------------------------------------------------------------------


def _detach(model: onnx_ir.Model, weights: Mapping[str, Weight], constants: set[str]) -> None:
    """Take the tensors of the weights out, so that no later step can read, fold or merge them."""
    for name, value in model.graph.initializers.items():
        if name not in weights:
            if _is_fake(value.const_value):
                raise BadInput(f"the parameter {name} has no data: give its handle in `weights`")
            continue
        weight = weights[name]
        small = name in constants and weight.numel <= _FOLDABLE_NUMEL
        small = small and not weight.dtype.is_complex  # which `_attach` gives as pairs of numbers
        value.const_value = tensor_of(weight, name) if small else None


def _is_fake(tensor: onnx_ir.TensorProtocol | None) -> bool:
    raw = getattr(tensor, "raw", None)
    if not isinstance(raw, torch.Tensor):
        return False
    return isinstance(raw, torch._subclasses.FakeTensor) or raw.device.type == "meta"


def _simplify(model: onnx_ir.Model) -> None:
    """Fold shape arithmetic, drop dead code and repeated work; weights are opaque meanwhile."""
    from onnxscript import optimizer, rewriter

    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.OutputFixPass()(model)


def _rename(
    model: onnx_ir.Model,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dim_names: Mapping[str, str],
) -> None:
    for value, name in zip(model.graph.inputs, input_names, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, output_names, strict=True):
        value.name = name
    common.NameFixPass()(model)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in values:
        if value.shape is not None and dim_names:
            value.shape = onnx_ir.Shape([_dim(d, dim_names) for d in value.shape])


def _dim(dim: Any, dim_names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"[a-z]+\d+", lambda m: dim_names.get(m[0], m[0]), dim.value)


def _attach(model: onnx_ir.Model, weights: Mapping[str, Weight]) -> None:
    for name, value in model.graph.initializers.items():
        if name not in weights:
            continue
        weight = weights[name]
        if weight.dtype.is_complex:
            weight = _as_real(weight)
        declared = tuple(value.shape.numpy()) if value.shape is not None else weight.shape
        if declared != weight.shape:
            raise BadInput(f"weight {name}: the graph has {list(declared)}, its handle {weight}")
        value.const_value = tensor_of(weight, name)


def _as_real(weight: Weight) -> Weight:
    """A complex weight as the exporter sees it: real and imaginary part along a last axis."""
    dtype = torch.empty((), dtype=weight.dtype).real.dtype
    return ComputedWeight(
        lambda: torch.view_as_real(weight.read()),
        (*weight.shape, 2),
        dtype,
        ("real", weight.key),
    )


def _strip_metadata(model: onnx_ir.Model) -> None:
    """Keep the module path of each node; stack traces would name this machine's folders."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(_SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[_SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


# --- when it fails -------------------------------------------------------------------------------


class NoForm(BadInput):
    """An op has no ONNX form, here or in ``torch.onnx``."""


def _explained(program: ExportedProgram, error: BaseException) -> BadInput:
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(e) for e in chain)
    match = re.search(r"translating node %?_*(\w+)", text)
    # The exporter decomposes further (linalg_eigh => _linalg_eigh): names differ by underscores.
    node = next((n for n in program.graph.nodes if match and n.name.lstrip("_") == match[1]), None)
    where = "" if node is None else f" (node {node.name}{_module_of(node)})"
    target = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if target is None:
        what = str(chain[-1]).strip().partition("\n")[0]
        return BadInput(f"the model cannot be written as ONNX: {what}{where}. {_ADVICE}")
    namespace, _, op = target[1].partition(".")
    what = f"the op {namespace}::{op} has no ONNX form"
    missing = "" if namespace in ("aten", "prims") else (
        f": it is a custom op of {namespace!r}, and only that package knows what it computes"
    )
    advice = _ADVICE if not missing else (
        "Load the model with an implementation in torch's own ops (transformers: "
        'attn_implementation="sdpa", experts_implementation="eager"), trace it with a '
        f"decomposition of {namespace}::{op}, or keep the graph in torch with backend='eager'"
    )
    return NoForm(f"the model cannot be written as ONNX: {what}{where}{missing}. {advice}")


_ADVICE = (
    "Write that part of the model with other ops, or keep the graph in torch with backend='eager'"
)


def _module_of(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f", module {path or '<root>'} of class {name.rpartition('.')[2]}"

"""Own ops: tests generated from the declarations, and what the storage form promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from graphwright.ir.core.errors import BadInput, InvalidGraph
from graphwright.ir.core.types import Type
from graphwright.ir.ops import OWN_OPS, OwnOp, Sample, torch_op
from graphwright.ir.ops.linear_nbit import operand_types
from graphwright.ir.ops.matmul_nbits import HALF_FORM
from graphwright.ir.ops.pack import (
    BITS,
    GROUPS,
    block_of,
    dequantize,
    n_groups,
    pack,
    pack_zeros,
    unpack,
    unpack_zeros,
)
from graphwright.ir.ops.sdpa import sdpa
from graphwright.ir.run.verify import difference
from graphwright.ir.vocab import REQUIRED, spec
from graphwright.ir.vocab.targets import PORTABLE
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.tape import Tape
from onnx_ir.tensor_adapters import from_torch_dtype

CASES = [
    pytest.param(op, sample, id=f"{op.name}-{sample.label}")
    for op in OWN_OPS.values()
    for sample in op.samples()
]


OPCHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip


def types_of(operands: Sequence[torch.Tensor | None]) -> list[Type | None]:
    return [None if t is None else Type(t.dtype, tuple(t.shape)) for t in operands]


def has_float8(sample: Sample) -> bool:
    return any(t is not None and t.is_floating_point() and t.dtype.itemsize == 1
               for t in sample.operands)  # fmt: skip


def numpy_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return ir.tensor(tensor).numpy()


def emit(
    op: OwnOp, sample: Sample, attrs: dict[str, Any] | None = None, form: str = ""
) -> ir.Model:
    """A model whose only node is the op's ONNX form; all but activations are initializers."""
    tape, inputs, initializers, operands = Tape(), [], [], []
    all_free = op.name in ("rope", "sdpa")
    free = [name.rstrip("?") for name in op.operands] if all_free else [op.operands[0]]
    for name, tensor in zip(op.operands, sample.operands, strict=True):
        if tensor is None:
            operands.append(None)
            continue
        name = name.rstrip("?")
        dtype = from_torch_dtype(tensor.dtype)
        shape: list[int | str] = list(tensor.shape)
        if name == "x" and len(shape) > 1:
            shape[0] = "rows"
        const = None if name in free else ir.tensor(tensor, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=const
        )
        (inputs if name in free else initializers).append(value)
        operands.append(value)
    record = op.forms[form] if form else op.record
    result = record(tape, operands, {**op.attrs, **sample.attrs, **(attrs or {})})
    expected = op.reference(*sample.operands, **{**op.attrs, **sample.attrs, **(attrs or {})})
    opset = 21 if form or has_float8(sample) else 18
    result.name, result.type = "y", ir.TensorType(from_torch_dtype(expected.dtype))
    graph = ir.Graph(
        inputs,
        [result],
        nodes=list(tape.nodes),
        initializers=[*initializers, *tape.initializers],
        opset_imports={**dict.fromkeys({n.domain for n in tape.nodes}, 1), "": opset},
    )
    for value in list(graph.initializers.values()):
        if not value.uses():
            del graph.initializers[str(value.name)]
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, sample: Sample, optimize: bool = True, threads: int = 1) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    binary = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(binary, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for value, tensor in zip(model.graph.inputs, sample.operands, strict=False):
        assert tensor is not None
        array = numpy_of(tensor)
        element = int(from_torch_dtype(tensor.dtype))
        ort_value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16) if tensor.dtype == torch.bfloat16 else array, element
        )
        binding.bind_ortvalue_input(str(value.name), ort_value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0]
    first = sample.operands[0]
    assert first is not None
    if first.dtype == torch.bfloat16:
        return torch.from_dlpack(out._ortvalue.to_dlpack())
    return torch.from_numpy(out.numpy())


def rel_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.float().norm().item()
    return (actual.float() - expected.float()).norm().item() / (scale or 1.0)


@pytest.mark.parametrize(("op", "sample"), [c for c in CASES if c.values[0].stored_linear])
def test_a_linear_of_no_rows_gives_none(op: OwnOp, sample: Sample) -> None:
    """As where a step of a model of images and text reads no image."""
    x, *rest = sample.operands
    assert x is not None
    y = op.reference(x[:0].expand(0, *x.shape[1:]), *rest, **{**op.attrs, **sample.attrs})
    whole = op.reference(x, *rest, **{**op.attrs, **sample.attrs})
    assert y.shape == (0, *whole.shape[1:]) and y.dtype == whole.dtype


@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "as-is"])
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_onnx_form_agrees_with_the_reference(op: OwnOp, sample: Sample, optimize: bool) -> None:
    expected = op.reference(*sample.operands, **sample.attrs)
    actual = run(emit(op, sample), sample, optimize)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert rel_l2(actual, expected) <= op.tolerances[expected.dtype]


FORMS = [
    pytest.param(case.values[0], case.values[1], form, id=f"{case.id}-{form}")
    for case in CASES
    for form in case.values[0].forms
    if form != HALF_FORM
]
HALVES = [
    pytest.param(*case.values, id=case.id)
    for case in CASES
    if HALF_FORM in case.values[0].forms and case.values[1].operands[0].dtype != torch.float32
]  # fmt: skip


@pytest.mark.parametrize(("op", "sample"), HALVES)
def test_the_form_for_a_gpu_takes_half_floats_as_they_are(op: OwnOp, sample: Sample) -> None:
    """But where real zero points meet bfloat16; on a CPU that is run as float32."""
    model = emit(op, sample, form=HALF_FORM)
    (node,) = (n for n in model.graph if n.op_type == "MatMulNBits")
    expected = op.reference(*sample.operands, **sample.attrs)
    real = sample.operands[3] is not None and sample.operands[3].is_floating_point()
    coarse = real and expected.dtype == torch.bfloat16
    assert node.inputs[2].dtype == from_torch_dtype(torch.float32 if coarse else expected.dtype)
    assert rel_l2(run(model, sample), expected) <= op.tolerances[expected.dtype]


@pytest.mark.parametrize(("op", "sample", "form"), FORMS)
def test_other_forms_agree_with_the_reference(op: OwnOp, sample: Sample, form: str) -> None:
    """The portable one is of standard ops. The runtime joins them, and rounds activations where the
    level lets it."""
    model = emit(op, sample, form=form)
    standard = {node.domain for node in model.graph} == {""}
    assert standard or form != PORTABLE.form(op.name)
    plain = {**sample.attrs, "accuracy_level": 0} if "accuracy_level" in op.attrs else sample.attrs
    for optimize, attrs in ((True, sample.attrs), (False, plain)):
        expected = op.reference(*sample.operands, **attrs)
        actual = run(model, sample, optimize)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert rel_l2(actual, expected) <= op.tolerances[expected.dtype]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_torch_op(op: OwnOp, sample: Sample) -> None:
    overload = torch_op(op.name)
    assert torch.equal(
        overload(*sample.operands, **sample.attrs),
        op.reference(*sample.operands, **sample.attrs),
    )
    if sample.label not in {one.label for one in op.samples()[::4]}:
        return  # What torch looks for is the op's; it takes a tenth of a second.
    # torch compares no float8, by which it sees for a schema whether operands stay as they were.
    checks = OPCHECKS[1:] if has_float8(sample) else OPCHECKS
    torch.library.opcheck(overload, sample.operands, dict(sample.attrs), test_utils=checks)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_type_rule_agrees_with_the_reference(op: OwnOp, sample: Sample) -> None:
    attrs = {k: v for k, v in op.attrs.items() if v is not REQUIRED} | dict(sample.attrs)
    types = types_of(sample.operands)
    (result,) = op.infer(types, attrs)
    assert [result] == types_of([op.reference(*sample.operands, **sample.attrs)])
    if op.name == "rope":
        return
    x = types[0]
    assert x is not None
    assert x.shape is not None
    symbolic = x.with_shape(["batch", *x.shape[1:]])
    (result,) = op.infer([symbolic, *types[1:]], attrs)
    assert result.shape is not None
    if len(x.shape) > 1:
        assert result.shape[0] == "batch"
        assert isinstance(result.shape[-1], int)


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_bytes_read_are_those_of_the_constants(op: OwnOp, sample: Sample) -> None:
    actual = sum(t.numel() * t.element_size() for t in sample.operands[1:] if t is not None)
    assert op.bytes_read(types_of(sample.operands)) == actual


def test_bytes_read_needs_sizes() -> None:
    op = OWN_OPS["sparse_linear"]
    x, unknown = Type(torch.float32, (1, 4)), Type(torch.uint16, ("n",))
    with pytest.raises(ValueError, match=r"the size of rows is not known: u16\[n\]"):
        op.bytes_read([x, unknown, unknown, unknown])


def test_declarations_reach_the_vocabulary() -> None:
    entry = spec("linear_nbit")
    assert entry.operands == ("x", "codes", "scales", "zeros?", "bias?")
    assert entry.attrs["bits"] is REQUIRED
    assert entry.attrs["accuracy_level"] == 0
    with pytest.raises(KeyError, match="did you mean linear_nbit"):
        torch_op("linear_nbits")


def test_export_keeps_one_node_with_a_symbolic_batch() -> None:
    op = OWN_OPS["linear_nbit"]
    sample = next(s for s in op.samples() if s.operands[3] is None and s.operands[4] is None)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_op("linear_nbit")(x, *sample.operands[1:], **sample.attrs)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Layer(), (sample.operands[0],), dynamic_shapes=({0: batch},))
    called = [n for n in program.graph.nodes if n.target is torch_op("linear_nbit")]
    assert len(called) == 1
    wider = torch.randn(11, sample.attrs["in_features"])
    assert torch.equal(program.module()(wider), Layer()(wider))


@pytest.mark.parametrize(("op", "sample"), [c for c in CASES if c.values[0].dense])
def test_dense_is_what_x_is_multiplied_by(op: OwnOp, sample: Sample) -> None:
    x, *constants = sample.operands
    assert x is not None
    assert op.dense is not None
    attrs = {**op.attrs, **sample.attrs}
    rest = [None if i == op.bias else c for i, c in enumerate(constants, 1)]
    weight = op.dense(x.shape[-1], rest, attrs)
    assert weight.dtype == torch.float32
    # Without the rounding of x that accuracy_level asks for, or with one that rounds no 0 or 1.
    exact = {"accuracy_level": 0, "symmetric": True}
    plain = {**sample.attrs, **{name: exact[name] for name in exact if name in attrs}}
    eye = torch.eye(x.shape[-1])
    assert torch.equal(op.reference(eye, *rest, **plain).T, weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"out_features": 25}, r"shape of codes is \(24, 2, 16\), expected \(25, 2, 16\)"),
        ({"bits": 8}, r"shape of codes is \(24, 2, 16\), expected \(24, 2, 32\)"),
        ({"in_features": 63}, r"last dimension of x is 64, expected 63"),
        ({"group": 64}, r"shape of codes is \(24, 2, 16\), expected \(24, 1, 32\)"),
    ],
)
def test_contradicting_operands_are_refused(change: dict[str, int], reason: str) -> None:
    op = OWN_OPS["linear_nbit"]
    sample = op.samples()[0]
    with pytest.raises(ValueError, match=reason):
        op.infer(types_of(sample.operands), {**sample.attrs, **change})


def test_sparse_vectors_of_unequal_length_are_refused() -> None:
    op = OWN_OPS["sparse_linear"]
    x, three, two = (Type(torch.float32, s) for s in ((1, 4), (3,), (2,)))
    with pytest.raises(ValueError, match="must be vectors of one length"):
        op.infer([x, three, three, two], {"out_features": 5})


def test_sparse_form_needs_constants() -> None:
    op = OWN_OPS["sparse_linear"]
    free = ir.Value(name="v", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
    with pytest.raises(InvalidGraph, match="rows must be a constant of the graph"):
        op.record(Tape(), [free] * 4, {"out_features": 2})


def test_sparse_form_is_right_with_threads_and_long_rows() -> None:
    """ScatterND(add) races here: two rows of thousands of entries, many threads."""
    op, rng = OWN_OPS["sparse_linear"], torch.Generator().manual_seed(0)
    rows = torch.arange(2).repeat_interleave(6000)
    cols = torch.arange(6000).repeat(2)
    x = torch.ones(8, 6000)
    values = torch.randint(-3, 4, (12000,), generator=rng).float()
    operands = (x, rows.to(torch.uint16), cols.to(torch.uint16), values)
    sample = Sample(operands, {"out_features": 2}, "long rows")
    model, expected = emit(op, sample), op.reference(*sample.operands, **sample.attrs)
    for _ in range(10):
        assert torch.equal(run(model, sample, threads=8), expected)


def test_accuracy_level_rounds_activations_and_says_so() -> None:
    op = OWN_OPS["linear_nbit"]
    sample = op.samples()[0]
    expected = op.reference(*sample.operands, **sample.attrs)
    model = emit(op, sample, {"accuracy_level": 4})
    node = next(n for n in model.graph if n.op_type == "MatMulNBits")
    assert node.attributes["accuracy_level"].as_int() == 4
    assert 1e-4 < rel_l2(run(model, sample), expected) < 2e-2


def test_file_holds_the_packed_bytes() -> None:
    """2- and 3-bit codes are widened by the runtime, not in the file."""
    op = OWN_OPS["linear_nbit"]
    for sample in (s for s in op.samples() if not s.attrs["accuracy_level"]):
        model = emit(op, sample)
        stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
        assert stored == op.bytes_read(types_of(sample.operands))


def test_lazy_initializers_are_not_evaluated_by_the_lowering() -> None:
    op = OWN_OPS["sparse_linear"]
    sample = op.samples()[0]
    asked = []

    def lazily(name: str, tensor: torch.Tensor) -> ir.Value:
        def make() -> ir.TensorProtocol:
            asked.append(name)
            return ir.tensor(tensor, name=name)

        dtype, shape = from_torch_dtype(tensor.dtype), ir.Shape(tensor.shape)
        lazy = ir.LazyTensor(make, dtype, shape, name=name)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    names = ("rows", "cols", "values")
    operands = [lazily(n, t) for n, t in zip(names, sample.operands[1:], strict=True)]
    tape = Tape()
    op.record(tape, [x, *operands], sample.attrs)
    op.record(tape, [x, *operands], sample.attrs)
    assert asked == ["rows", "rows"]
    assert [v.name for v in tape.initializers] == ["cols.by_row_length", "values.by_row_length"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.integers(1, 7),
    st.sampled_from([1, 5, 15, 16, 17, 33, 123, 255, 257, 384]),
    st.integers(0, 2**31),
)
def test_pack_round_trip(bits: int, group: int, rows: int, columns: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=rng, dtype=torch.uint8)
    packed = pack(codes, bits, group)
    expected, _, _ = operand_types(columns, rows, bits=bits, group=group)
    assert Type(packed.dtype, tuple(packed.shape)) == expected
    assert torch.equal(unpack(packed, bits, group, columns), codes)
    groups = n_groups(group, columns)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=rng, dtype=torch.uint8)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits), bits, groups), zeros)


def test_layout_is_little_endian() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert pack(codes, 4, 16)[0, 0, :2].tolist() == [0x10, 0x32]
    assert pack(codes % 4, 2, 16)[0, 0].tolist() == [0b11100100] * 4
    three = pack(codes % 8, 3, 16)[0, 0].tolist()
    assert three == [0b11100100] * 4 + [0b11110000] * 2


def test_a_row_is_padded_by_less_than_sixteen_codes() -> None:
    for columns in range(1, 700):
        block = block_of(0, columns)
        assert 16 <= block <= 256
        assert math.log2(block).is_integer()
        assert -(-columns // block) * block - columns < 16


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 15, 8] + [8] * 13 + [9, 7]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]])
    actual = dequantize(pack(codes, 4, 16), scales, bits=4, group=16, in_features=18)
    assert actual.tolist() == [[-4.0, 3.5, 0.0, *[0.0] * 13, 2.0, -2.0]]
    real = torch.tensor([[7.5, 8.0]])
    actual = dequantize(pack(codes, 4, 16), scales, real, bits=4, group=16, in_features=18)
    assert actual[0, :3].tolist() == [-3.75, 3.75, 0.25]


@pytest.mark.parametrize(
    ("bits", "group", "reason"),
    [
        (5, 32, "bits=5: weights are stored in 2, 3, 4, 8 bits"),
        (4, 48, "group=48: a group is 16, 32, 64, 128, 256 columns, or 0"),
        (4, 512, "group=512"),
    ],
)
def test_formats_without_storage_are_refused(bits: int, group: int, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        pack(torch.zeros(1, 4, dtype=torch.uint8), bits, group)


def test_a_code_too_wide_is_refused() -> None:
    with pytest.raises(BadInput, match="a code of 16 does not fit in 4 bits"):
        pack(torch.full((1, 4), 16, dtype=torch.uint8), 4, 16)


def test_sample_labels_are_distinct() -> None:
    for op in OWN_OPS.values():
        labels = [s.label for s in op.samples()]
        assert all(a != b for a, b in itertools.combinations(labels, 2))


def test_a_row_of_half_floats_without_keys_is_uniform() -> None:
    """As in models that add the lowest number to the logits in their own dtype (Gemma 2)."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 3, 8, generator=rng).half() for _ in range(3))
    mask = torch.zeros(3, 3, dtype=torch.float16)
    mask[0] = torch.finfo(torch.float16).min
    out = sdpa(q, k, v, mask, scale=0.5, softcap=2.0)
    torch.testing.assert_close(out[..., 0, :], v.float().mean(-2).half())
    free = sdpa(q, k, v, None, scale=0.5, softcap=2.0)
    assert difference(free[..., 1:, :], out[..., 1:, :]).rel_l2 < 1e-3  # their last place

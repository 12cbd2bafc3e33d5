"""``MatMulNBits`` read back: every form that we write, and what other tools write."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.canonical.nbit import canonicalize_stored
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.tensors import tensor_of
from graphwright.ir.core.weights import MemoryWeight, Weight, tensor_bytes
from graphwright.ir.load.onnx_file import load_onnx
from graphwright.ir.onnx.lower import lower
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.ops import OWN_OPS, Sample
from graphwright.ir.ops.base import TOLERANCES
from graphwright.ir.ops.pack import block_of, n_blocks, pack, pack_zeros
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from onnx_ir.tensor_adapters import from_torch_dtype

EXACT = TOLERANCES[torch.float32]
OP = OWN_OPS["linear_nbit"]
SAMPLES = [pytest.param(s, id=s.label) for s in OP.samples()]


def ops(view: OnnxView) -> Counter[str]:
    return Counter(view.op(node) for node in view.nodes())


def only(view: OnnxView) -> Any:
    (node,) = [n for n in view.nodes() if view.op(n) == "linear_nbit"]
    return node


def rel(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def model_of(node: ir.Node, x: ir.Value, weights: list[ir.Value]) -> ir.Model:
    """A model that returns ``y``, the result of one node."""
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights,
                     opset_imports={"": 21, "com.microsoft": 1}, name="g")  # fmt: skip
    return ir.Model(graph, ir_version=10)


def value(name: str, held: torch.Tensor | Weight) -> ir.Value:
    weight = held if isinstance(held, Weight) else MemoryWeight(held)
    return ir.Value(
        name=name, type=ir.TensorType(from_torch_dtype(weight.dtype)),
        shape=ir.Shape(weight.shape), const_value=tensor_of(weight, name),
    )  # fmt: skip


def again(view: OnnxView) -> OnnxView:
    """The view as its file would give it."""
    return OnnxView(ir.from_proto(ir.to_proto(view.model)))


def runtime(view: OnnxView, x: torch.Tensor) -> torch.Tensor:
    binary = ir.to_proto(view.model).SerializeToString()
    session = ort.InferenceSession(binary, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# --- what we write -------------------------------------------------------------------------------


def drawn(sample: Sample) -> OnnxView:
    """A graph that is one ``linear_nbit``."""
    x, *constants = sample.operands
    assert x is not None
    shape: list[int | str] = ["rows", *x.shape[1:]] if x.dim() > 1 else list(x.shape)
    held = ir.Value(name="x", type=ir.TensorType(from_torch_dtype(x.dtype)), shape=ir.Shape(shape))
    graph = ir.Graph([held], [], nodes=[], opset_imports={"": 20}, name="g")
    view = OnnxView(ir.Model(graph, ir_version=10))
    end = ir.Node("", "Identity", [held], name="end")
    graph.append(end)
    names = ("codes", "scales", "zeros", "bias")
    operands = [
        None if t is None else view.add_weight(f"layer.fc.{name}", MemoryWeight(t))
        for name, t in zip(names, constants, strict=True)
    ]
    while operands[-1] is None:
        operands.pop()
    y = view.build("linear_nbit", [held, *operands], sample.attrs, before=end, name="fc")
    view.erase(end)
    view.set_outputs({"y": y})
    return view


@pytest.mark.parametrize("sample", SAMPLES)
def test_what_is_lowered_is_read_back(sample: Sample) -> None:
    view = drawn(sample)
    lower(view)
    opened = again(view)
    canonicalize_stored(opened)
    node = only(opened)
    x, *constants = sample.operands
    assert x is not None
    casts = 2 if x.dtype == torch.bfloat16 else 0
    assert ops(opened) == Counter({"linear_nbit": 1}) + Counter({"cast": casts})
    assert opened.name(node) in ("fc", "fc/linear_nbit")
    attrs, level = dict(sample.attrs), sample.attrs["accuracy_level"]
    group, fan_in = attrs["group"], attrs["in_features"]
    if group == 0 and (level or n_blocks(0, fan_in) == 1):
        attrs["group"] = block_of(0, fan_in)  # the file does not tell the two apart
    real = constants[2] is not None and constants[2].is_floating_point()
    if level and group == 0 and real:
        attrs["group"] = 0
    assert dict(opened.attrs(node)) == attrs
    operands = [*opened.operands(node)[1:], *[None] * 4][:4]
    for operand, tensor in zip(operands, constants, strict=True):
        handle = opened.weight(operand)
        assert (handle is None) == (tensor is None)
        written = level and tensor is not constants[0] and tensor is not constants[3] and not real
        if handle is not None and tensor is not None and not written:
            assert handle.dtype == tensor.dtype
            assert torch.equal(handle.read(), tensor)
    actual = sweep(opened, {"x": x})["y"]
    assert rel(actual, OP.reference(*sample.operands, **sample.attrs)) == 0.0


def stored(view: OnnxView) -> list[tuple[str, tuple[int, ...], bytes]]:
    """All weights but for small constants, names aside."""
    held = [w for w in view.weights().values() if w.numel > 2]
    return sorted((str(w.dtype), w.shape, bytes(tensor_bytes(w.read()))) for w in held)


@pytest.mark.parametrize("sample", SAMPLES)
def test_lowering_again_writes_the_same_bytes(sample: Sample) -> None:
    views = [drawn(sample)]
    for _ in range(2):
        canonicalize(views[-1])
        lower(views[-1])
        views.append(again(views[-1]))
    canonicalize(views[2])
    lower(views[2])
    first, second, third = (Counter(n.op_type for n in v.nodes()) for v in views)
    assert first == second == third
    assert stored(views[0]) == stored(views[1]) == stored(views[2])
    names = [[n.name for n in v.nodes() if n.op_type == "MatMulNBits"] for v in views]
    assert names[1] == names[2], "names do not grow from file to file"


# --- what others write ---------------------------------------------------------------------------


def fourths(points: torch.Tensor) -> torch.Tensor:
    """Zero points of 2 bits, four a byte, as the node has them: nibbles are ``linear_nbit``'s."""
    wide = torch.nn.functional.pad(points, (0, -points.shape[1] % 4)).unflatten(1, (-1, 4))
    return (wide << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def foreign(
    x: tuple[int, ...] = (3, 45), *, bits: int = 4, block: int = 16, outputs: int = 7,
    zeros: str = "none", flat: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32,
    index: torch.Tensor | None = None, level: int = 0, wrap: bool = False, **attrs: int,
) -> tuple[OnnxView, Sample]:  # fmt: skip
    """A ``MatMulNBits`` as its schema has it, and the ``linear_nbit`` that it stands for."""
    rng = torch.Generator().manual_seed(0)
    fan_in = x[-1]
    groups = -(-fan_in // block)
    drawn = torch.randint(0, 1 << bits, (outputs, fan_in), generator=rng, dtype=torch.uint8)
    codes = pack(drawn, bits, block)
    scales = (torch.rand(outputs, groups, generator=rng) * 0.1 + 0.01).to(dtype)
    points = None
    if zeros == "packed":
        whole = torch.randint(0, 1 << bits, (outputs, groups), generator=rng, dtype=torch.uint8)
        points = pack_zeros(whole, bits)
        lain = fourths(whole) if bits == 2 else points
    if zeros == "real":
        points = (torch.rand(outputs, groups, generator=rng) * (1 << bits)).to(dtype)
    added = torch.randn(outputs, generator=rng).to(dtype) if bias else None
    form = {"bits": bits, "group": block, "in_features": fan_in, "out_features": outputs,
            "accuracy_level": 4 if level == 4 else 0}  # fmt: skip
    inputs = torch.randn(*x, generator=rng).to(dtype)
    sample = Sample((inputs, codes, scales, points, added), form, "foreign")
    given_points = lain if zeros == "packed" else points
    shaped = [t.reshape(-1) if flat and t is not None else t for t in (codes, scales, given_points)]
    named = dict(zip(("w_Q4", "w_scales", "w_zp", "g", "b"), (*shaped, index, added), strict=True))
    held = {name: value(name, t) for name, t in named.items() if t is not None}
    source = ir.Value(name="x", type=ir.TensorType(from_torch_dtype(dtype)), shape=ir.Shape(x))
    operands: list[ir.Value | None] = [source, *(held.get(name) for name in named)]
    while operands[-1] is None:
        operands.pop()
    sizes = {"K": fan_in, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": level}
    node = ir.node("MatMulNBits", operands, {**sizes, **attrs}, domain="com.microsoft",
                   name="/layers.0/fc/MatMul_Q4")  # fmt: skip
    return OnnxView(model_of(node, source, list(held.values()))), sample


FOREIGN: dict[str, dict[str, Any]] = {
    "plain": {}, "bias": {"bias": True}, "packed": {"zeros": "packed"},
    "flat": {"zeros": "packed", "flat": True, "bias": True},
    "real": {"zeros": "real"}, "real flat": {"zeros": "real", "flat": True},
    "8 bits": {"bits": 8, "block": 64, "x": (2, 3, 123), "zeros": "packed"},
    "2 bits": {"bits": 2, "block": 32, "x": (2, 200), "zeros": "packed", "level": 4},
    "2 bits flat": {"bits": 2, "block": 32, "x": (2, 72), "zeros": "packed", "flat": True},
    "2 bits alone": {"bits": 2, "block": 32, "level": 4, "bias": True},
    "block 256": {"block": 256, "x": (5, 123), "outputs": 1},
    "one column": {"x": (1, 1), "outputs": 5, "bias": True},
    "half": {"dtype": torch.float16, "bias": True, "outputs": 16},
    "integers": {"level": 4, "zeros": "packed"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_write_is_read(name: str) -> None:
    view, sample = foreign(**FOREIGN[name])
    x, truth = sample.operands[0], OP.reference(*sample.operands, **sample.attrs)
    assert x is not None
    tolerance = OP.tolerances[truth.dtype]
    flat, real = FOREIGN[name].get("flat"), FOREIGN[name].get("zeros") == "real"
    if not flat and not (real and sample.attrs["bits"] == 8):
        assert rel(runtime(view, x), truth) <= tolerance  # the runtime wants its operands in rows
    canonicalize_stored(view)
    assert ops(view) == {"linear_nbit": 1}
    assert dict(view.attrs(only(view))) == dict(sample.attrs)
    assert torch.equal(sweep(view, {"x": x})["y"], truth)
    (site,) = recognize(view).linears
    assert (site.quantized, site.bias is not None) == (True, sample.operands[4] is not None)
    view.infer_types()
    lower(view)
    assert rel(runtime(view, x), truth) <= tolerance


@pytest.mark.parametrize("options", [
    {"bias": True}, {"zeros": "real"}, {"flat": True, "x": (2, 3, 64), "block": 32},
], ids=str)  # fmt: skip
def test_groups_in_an_order_of_their_own(options: dict[str, Any]) -> None:
    """Against the runtime, which takes each column's scale and zero point by ``g_idx``."""
    columns, block = options.get("x", (3, 45))[-1], options.get("block", 16)
    shuffled = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    index = (torch.arange(columns) // block)[shuffled].int()
    view, sample = foreign(**options, index=index)
    x, plain = sample.operands[0], OP.reference(*sample.operands, **sample.attrs)
    assert x is not None
    truth = runtime(foreign(**{**options, "flat": False}, index=index)[0], x)
    assert rel(truth, plain) > 0.1
    canonicalize_stored(view)
    assert ops(view) == {"index_select": 1, "linear_nbit": 1}
    assert rel(sweep(view, {"x": x})["y"], truth) <= EXACT
    view.infer_types()
    lower(view)
    assert rel(runtime(view, x), truth) <= EXACT
    ascending, _ = foreign(**options, index=(torch.arange(columns) // block).int())
    canonicalize_stored(ascending)
    assert ops(ascending) == {"linear_nbit": 1}


def test_levels_of_floats_become_none() -> None:
    view, _ = foreign(level=1)
    canonicalize_stored(view)
    assert view.attrs(only(view))["accuracy_level"] == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "uneven groups": (
        {"index": torch.zeros(45, dtype=torch.int32)},
        "its g_idx makes groups that are not of 16 columns each",
    ),
    "index and points": (
        {"index": torch.zeros(45, dtype=torch.int32), "zeros": "packed"},
        "it has g_idx, which is read of 4 bits without packed zero points",
    ),
    "index of 2 bits": (
        {"index": torch.zeros(45, dtype=torch.int32), "bits": 2},
        "it has g_idx, which is read of 4 bits without packed zero points",
    ),
    "short index": (
        {"index": torch.zeros(48, dtype=torch.int32)},
        "its g_idx is no constant with the group of each column",
    ),
    "3 bits": ({"bits": 3}, "bits=3: 2, 4 and 8 are read"),
    "prepacked": ({"weight_prepacked": 1}, "packed for one kind of GPU"),
    "N": ({"N": 9}, r"its codes are \[7, 3, 8\], expected \[9, 3, 8\]"),
    "no size": ({"K": 0}, "K, N and block_size must be given, each 1 or more"),
    "block": ({"block_size": 512}, "group=512: a group is 16, 32, 64, 128, 256 columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_stays_and_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    changed, reason = REFUSED[name]
    view, _ = foreign(**changed)
    refusal = canonicalize_stored(view).refusals["fuse-matmul-nbits"]
    assert isinstance(refusal, Refusal)
    assert ops(view) == {"native": 1}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal.reason)
    assert (
        f"1 MatMulNBits stay as they are (/layers.0/fc/MatMul_Q4): {refusal.reason}" in caplog.text
    )


def test_a_node_without_codes_is_refused() -> None:
    view, _ = foreign(zeros="packed")
    (node,) = view.nodes()
    node.replace_input_with(1, None)
    refusal = canonicalize_stored(view).refusals["fuse-matmul-nbits"]
    assert refusal.reason == "its input, its codes or its scales are absent"
    assert ops(view) == {"native": 1}


@pytest.mark.parametrize(
    ("place", "reason"), [(1, "its codes are computed"), (2, "its scales are computed"),
                          (3, "its zero points are computed"), (5, "its bias is not a constant")],
)  # fmt: skip
def test_computed_operands_are_refused(place: int, reason: str) -> None:
    view, _ = foreign(zeros="packed", bias=True)
    (node,) = view.nodes()
    operand = node.inputs[place]
    assert operand is not None
    view.at(node)
    twice = view.emit("Identity", [operand]).outputs[0]
    twice.type, twice.shape = operand.type, operand.shape
    node.replace_input_with(place, twice)
    assert canonicalize_stored(view).refusals["fuse-matmul-nbits"].reason == reason


def test_what_resembles_real_zeros_is_left_alone() -> None:
    sample = next(s for s in OP.samples() if s.label == "4bit-g32-5x123-real-float32-l0")
    view = drawn(sample)
    lower(view)
    (offset,) = [n for n in view.nodes() if n.op_type == "Sub"]
    seven = view.scalar(7.0, offset.inputs[0])
    offset.replace_input_with(0, seven)
    x = sample.operands[0]
    assert x is not None
    expected = runtime(view, x)
    opened = again(view)
    report = canonicalize_stored(opened)
    assert ops(opened)["sub"] == 1
    assert report.refusals["fuse-real-zeros"].reason == (
        "what is added is not what real zero points add"
    )
    assert rel(sweep(opened, {"x": x})["y"], expected) <= EXACT


def test_nothing_is_read_but_small_constants(tmp_path: Any, monkeypatch: Any) -> None:
    view, _ = foreign((2, 2048), block=32, outputs=64, zeros="packed", flat=True)
    ir.save(view.model, tmp_path / "model.onnx", external_data="model.onnx.data")

    def refuse(self: Weight) -> torch.Tensor:
        raise AssertionError(f"{self} was read")

    monkeypatch.setattr("graphwright.ir.core.weights.FileWeight.read", refuse)
    opened = load_onnx(tmp_path / "model.onnx")
    assert ops(opened) == {"linear_nbit": 1}

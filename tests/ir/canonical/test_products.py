"""Products with a constant matrix: those that become linears, and why the others do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.canonical.unread import unread_products
from graphwright.ir.core.view import View
from graphwright.ir.fx.view import FxView
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.recognize import recognize
from onnx import TensorProto, helper

from .written import in_runtime, rand, read, tensors, written

node = helper.make_node
W, B = rand(6, 4), rand(4)


def op(name: str, *inputs: str, **attrs: Any) -> Any:
    return node(name, list(inputs), ["y"], **attrs)


READ: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "gemm": ([op("Gemm", "x", "w", "b")], {"w": W, "b": B}),
    "transB": ([op("Gemm", "x", "w", "b", transB=1)], {"w": rand(4, 6), "b": B}),
    "alpha": ([op("Gemm", "x", "w", "b", alpha=0.5)], {"w": W, "b": B}),
    "beta": ([op("Gemm", "x", "w", "b", beta=2.0)], {"w": W, "b": B}),
    "no beta": ([op("Gemm", "x", "w", "b", beta=0.0)], {"w": W, "b": B}),
    "bias in a row": ([op("Gemm", "x", "w", "b")], {"w": W, "b": B[None]}),
    "bias in a column": ([op("Gemm", "x", "w", "b")], {"w": W, "b": rand(3, 1)}),
    "transA": (
        [node("Transpose", ["x"], ["t"], perm=[1, 0]), op("Gemm", "t", "w", transA=1)], {"w": W},
    ),
    "stored narrow": (
        [node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), op("MatMul", "x", "f")],
        {"w": W.astype(np.float16)},
    ),
    "reshaped": (
        [node("Reshape", ["w", "s"], ["f"]), op("MatMul", "x", "f")],
        {"w": W.reshape(-1), "s": np.array([6, 4])},
    ),
    "of three dimensions": (
        [node("Unsqueeze", ["x", "a"], ["t"]), op("MatMul", "t", "w")],
        {"w": W[None], "a": np.array([0])},
    ),
    "einsum": ([op("Einsum", "x", "w", equation="bk,kn->bn")], {"w": W}),
    "einsum, constant first": ([op("Einsum", "w", "x", equation="kn, bk -> nb")], {"w": W}),
    "einsum, implicit": ([op("Einsum", "x", "w", equation="ak,kn")], {"w": W}),
    "einsum, ellipsis": ([op("Einsum", "x", "w", equation="...k,kn->...n")], {"w": W}),
    "einsum into heads": (
        [op("Einsum", "x", "w", equation="bk,hkd->hbd")], {"w": rand(2, 6, 3)},
    ),
    "einsum out of heads": (
        [node("Reshape", ["x", "s"], ["t"]), op("Einsum", "t", "w", equation="bhd,hdk->kb")],
        {"w": rand(2, 3, 5), "s": np.array([-1, 2, 3])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_it_becomes_a_linear_and_a_site(name: str) -> None:
    nodes, constants = READ[name]
    feeds = {"x": rand(3, 6)}
    model = written(nodes, feeds, constants, ["y"], {"x": ("n", 6)})
    view = read(model)
    canonicalize(view)
    check_structure(view)
    structure = recognize(view)
    assert len(structure.linears) == 1
    assert not unread_products(view, {site.node for site in structure.linears})
    (expected,) = in_runtime(model, feeds)
    torch.testing.assert_close(sweep(view, tensors(feeds))["y"], expected, rtol=1e-5, atol=1e-5)
    view.canonical = None
    assert canonicalize(view).total == 0


QUANTIZED = {
    "w": (W * 50).astype(np.int8), "s": np.array(0.02, np.float32), "z": np.array(0, np.int8),
}  # fmt: skip
BRANCH = [
    helper.make_graph(
        [node("MatMul", ["x", "w"], ["r"])], "branch", [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
] * 2  # fmt: skip
UNREAD: dict[str, tuple[list[Any], dict[str, Any], str, str]] = {
    "computed": (
        [node("Mul", ["w", "w"], ["f"]), op("MatMul", "x", "f")],
        {"w": np.ones((6, 3000), np.float32)}, "y_node",
        "its matrix is computed from constants by `mul`",
    ),
    "integers": (
        [node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"]),
         node("MatMulInteger", ["q", "w", "qz"], ["i"]), op("Cast", "i", to=TensorProto.FLOAT)],
        QUANTIZED, "w", "`MatMulInteger` multiplies codes of 8 bits: the file is quantized already",
    ),
    "another domain's": (
        [op("DynamicQuantizeMatMul", "x", "w", "s", domain="com.microsoft")],
        QUANTIZED, "w", "`com.microsoft::DynamicQuantizeMatMul` is not read as a linear",
    ),
    "left": (
        [op("MatMul", "w", "x")], {"w": rand(5, 3)}, "w", "its constant is the left factor",
    ),
    "stack": (
        [op("MatMul", "x", "w")], {"w": rand(2, 6, 4)}, "w", "a stack of 2 matrices, [2, 6, 4]",
    ),
    "diagonal": (
        [op("Einsum", "x", "w", equation="bk,kk->bk")], {"w": rand(6, 6)}, "w",
        "names a dimension twice",
    ),
    "convolution": (
        [node("Unsqueeze", ["x", "a"], ["t"]), op("Conv", "t", "w")],
        {"w": rand(4, 3, 2), "a": np.array([0])}, "w", "the kernel is 2, not 1",
    ),
    "recurrent": (
        [node("Unsqueeze", ["x", "a"], ["t"]), op("GRU", "t", "w", "r", hidden_size=2)],
        {"w": rand(1, 6, 6), "r": rand(1, 6, 2), "a": np.array([0])}, "w",
        "`GRU` is not read as a linear",
    ),
    "inside of a branch": (
        [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["c"], to=9),
         op("If", "c", then_branch=BRANCH[0], else_branch=BRANCH[1])],
        {"w": W}, "w", "it stands in a graph inside of `If`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_linear_is_listed(name: str) -> None:
    nodes, constants, site, reason = UNREAD[name]
    for each in nodes:
        each.name = f"{each.output[0]}_node"
    view = read(written(nodes, {"x": rand(3, 6)}, constants, ["y"]))
    canonicalize(view)
    assert not recognize(view).linears
    for product in unread_products(view, ()):
        assert product.name == site
        assert reason in product.reason
    assert len(unread_products(view, ())) == (2 if name == "inside of a branch" else 1)


def test_a_vector_is_no_matrix_and_a_lookup_no_product() -> None:
    nodes = [node("Gather", ["t", "i"], ["g"], axis=1), node("Mul", ["x", "t"], ["p"]),
             node("MatMul", ["v", "x"], ["o"]), node("Concat", ["g", "p", "o"], ["y"], axis=0)]
    constants = {"t": rand(3, 6), "i": np.arange(6), "v": rand(1, 3)}
    view = read(written(nodes, {"x": rand(3, 6)}, constants, ["y"]))
    canonicalize(view)
    assert not unread_products(view, ())


class Products(torch.nn.Module):
    """Products as ATen spells them: a linear each, but the last."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 4, generator=draw))
        self.bias = torch.nn.Parameter(torch.randn(4, generator=draw))
        self.heads = torch.nn.Parameter(torch.randn(2, 6, 3, generator=draw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = torch.addmm(self.bias, x, self.weight)
        scaled = torch.addmm(self.bias, x, self.weight, alpha=2, beta=0.5)
        heads = torch.einsum("bk,hkd->bhd", x, self.heads)
        return torch.cat([plain, scaled, heads.flatten(1), (x @ self.heads).mean(0)], 1)


def test_products_of_aten() -> None:
    module, x = Products().eval(), torch.randn(3, 6)
    view = FxView.from_program(torch.export.export(module, (x,)))
    canonicalize(view)
    structure = recognize(view)
    assert ops(view)["linear"] == len(structure.linears) == 3
    (stack,) = unread_products(view, {site.node for site in structure.linears})
    assert stack.name == "heads" and stack.reason.startswith("w is a stack of 2 matrices")
    torch.testing.assert_close(*sweep(view, {"x": x}).values(), module(x))


class Scores(torch.nn.Module):
    """BLOOM's: positions are added within the product."""

    def forward(self, b: torch.Tensor, q: torch.Tensor, kt: torch.Tensor) -> torch.Tensor:
        plain, bare = torch.baddbmm(b, q, kt), torch.baddbmm(b, q, kt, beta=0)
        return plain + bare + torch.baddbmm(b, q, kt, alpha=0.25, beta=0.5)


def test_a_sum_within_a_product_is_taken_out_of_it() -> None:
    inputs = torch.randn(2, 1, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    view = FxView.from_program(torch.export.export(Scores(), inputs))
    canonicalize(view)
    assert "native" not in ops(view)
    (actual,) = sweep(view, dict(zip(("b", "q", "kt"), inputs, strict=True))).values()
    torch.testing.assert_close(actual, Scores()(*inputs))


def ops(view: View) -> Counter[str]:
    return Counter(view.op(each) for each in view.nodes())


@pytest.mark.parametrize("spelled", ["keys last", "keys first"])
def test_attention_in_einsums_is_attention(spelled: str) -> None:
    scores = "bqhd,bkhd->bhqk" if spelled == "keys last" else "bkhd,bqhd->bhqk"
    first = ["q", "k"] if spelled == "keys last" else ["k", "q"]
    nodes = [node("Einsum", first, ["s"], equation=scores), node("Softmax", ["s"], ["p"], axis=-1),
             node("Einsum", ["p", "v"], ["y"], equation="bhqk,bkhd->bqhd")]
    feeds = {name: rand(2, 5, 3, 4) for name in "qkv"}
    model = written(nodes, feeds, {}, ["y"], dict.fromkeys("qkv", ("b", "n", 3, 4)))
    view = read(model)
    canonicalize(view)
    assert ops(view)["sdpa"] == 1
    (expected,) = in_runtime(model, feeds)
    torch.testing.assert_close(sweep(view, tensors(feeds))["y"], expected, rtol=1e-5, atol=1e-5)

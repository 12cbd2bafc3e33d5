"""Each raise on both graph kinds: it fires, keeps the numbers, and says why it does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.view import View
from graphwright.ir.rewrite.cleanup import clean, fold_constants
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure

RNG = torch.Generator().manual_seed(0)
X = (2, 5, 6)


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG)


def ops(view: View) -> Counter[str]:
    return Counter(view.op(node) for node in view.nodes())


def norm(g: Any, x: Any, weight: Any) -> Any:
    mean = g.op("mean", g.op("pow", x, 2.0), dims=(-1,), keepdim=True)
    scale = g.op("reciprocal", g.op("sqrt", g.op("add", mean, 1e-6)))
    return g.op("mul", weight, g.op("mul", x, scale))


def layer_norm(g: Any, x: Any) -> Any:
    centred = g.op("sub", x, g.op("mean", x, dims=(-1,), keepdim=True))
    variance = g.op("mean", g.op("pow", centred, 2.0), dims=(-1,), keepdim=True)
    normed = g.op("div", centred, g.op("sqrt", g.op("add", variance, 1e-5)))
    scaled = g.op("mul", normed, g.weight("n.weight", tensor(6)))
    return g.op("add", scaled, g.weight("n.bias", tensor(6)))


def gelu(g: Any, x: Any) -> Any:
    gate = g.op("add", g.op("erf", g.op("div", x, math.sqrt(2))), 1.0)
    return g.op("mul", g.op("mul", x, gate), 0.5)


def tanh_gelu(g: Any, x: Any) -> Any:
    inner = g.op("add", x, g.op("mul", g.op("pow", x, 3.0), 0.044715))
    gate = g.op("add", g.op("tanh", g.op("mul", inner, math.sqrt(2 / math.pi))), 1.0)
    return g.op("mul", g.op("mul", x, 0.5), gate)


def rope(g: Any, x: Any) -> Any:
    high, low = g.op("slice", x, 3, 6, dim=2), g.op("slice", x, 0, 3, dim=2)
    turned = g.op("concat", g.op("neg", high), low, dim=2)
    cos, sin = g.weight("cos", tensor(1, 5, 6)), g.weight("sin", tensor(1, 5, 6))
    return g.op("add", g.op("mul", x, cos), g.op("mul", turned, sin))


def biased(g: Any, x: Any) -> Any:
    product = g.op("matmul", x, g.weight("w", tensor(6, 4)))
    return g.op("add", g.weight("b", tensor(4)), product)


def turned(g: Any, x: Any) -> Any:
    return g.op("matmul", x, g.op("transpose", g.weight("w", tensor(4, 6)), perm=(1, 0)))


def turned_narrow(g: Any, x: Any) -> Any:
    wide = g.op("cast", g.weight("w", tensor(4, 6).half()), dtype=torch.float32)
    return g.op("matmul", x, g.op("transpose", wide, perm=(1, 0)))


def attention(g: Any, x: Any, scale: float = 0.5, masked: bool = True) -> Any:
    kt = g.op("transpose", x, perm=(0, 2, 1))
    logits = g.op("mul", g.op("matmul", x, kt), scale)
    if masked:
        logits = g.op("add", logits, g.weight("mask", tensor(5, 5)))
    return g.op("matmul", g.op("softmax", logits, dim=2), x)


CASES: list[tuple[str, Callable[..., Any], str]] = [
    ("rms-norm", lambda g, x: norm(g, x, g.weight("n", tensor(6))), "rms_norm"),
    ("layer-norm", layer_norm, "layer_norm"),
    ("silu", lambda g, x: g.op("mul", g.op("sigmoid", x), x), "silu"),
    ("gelu", gelu, "gelu"),
    ("tanh-gelu", tanh_gelu, "gelu"),
    ("rope", rope, "rope"),
    ("linear-with-bias", biased, "linear"),
    ("transposed-weight", turned, "linear"),
    ("transposed-weight-stored-narrow", turned_narrow, "linear"),
    ("attention-masked", attention, "sdpa"),
    ("attention-plain", lambda g, x: attention(g, x, masked=False), "sdpa"),
]


@pytest.mark.parametrize(("make", "op"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_it_fires_and_keeps_the_numbers(draft: Any, make: Any, op: str) -> None:
    g = draft(x=X)
    view = g.finish(make(g, g.x))
    inputs = {"x": tensor(*X)}
    before = sweep(view, inputs)
    canonicalize(view)
    check_structure(view)
    assert ops(view)[op] == 1
    assert ops(view).total() <= 2, "nothing of the old form is left but a transposition"
    after = sweep(view, inputs)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)
    view.canonical = None
    assert canonicalize(view).total == 0


@pytest.mark.parametrize(
    ("make", "rule", "reason"),
    [
        (
            lambda g, x: norm(g, x, g.weight("n", tensor(5, 6))),
            "fuse-rms-norm",
            "not a vector of 6",
        ),
        (
            lambda g, x: g.op("matmul", x, g.weight("w", tensor(2, 6, 4))),
            "fuse-matmul",
            "w is a stack of 2 matrices",
        ),
        (
            lambda g, x: g.op("add", turned(g, x), g.weight("b", tensor(5, 4))),
            "fuse-bias",
            "is not a bias of 4",
        ),
    ],
)
def test_it_refuses_and_says_why(draft: Any, make: Any, rule: str, reason: str) -> None:
    g = draft(x=X)
    view = g.finish(make(g, g.x))
    report = canonicalize(view)
    assert report.applied[rule] == 0
    assert reason in str(report.refusals[rule])


def test_cleaning_is_exact_and_leaves_outputs_alone(draft: Any) -> None:
    g = draft(x=X)
    same = g.op("transpose", g.op("identity", g.op("mul", g.x, 1.0)), perm=(0, 1, 2))
    twins = g.op("add", g.op("exp", same), g.op("exp", same))
    g.op("sin", g.x)
    view = g.finish(g.op("mul", twins, 1.0))
    inputs = {"x": tensor(*X)}
    before, names = sweep(view, inputs), view.output_names()
    clean(view)
    check_structure(view)
    assert ops(view) == Counter({"exp": 1, "add": 1})
    assert view.output_names() == names
    after = sweep(view, inputs)
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert clean(view).total == 0


def test_constants_fold_up_to_the_limit(draft: Any) -> None:
    for limit, count in ((1 << 20, 1), (8, 2)):
        g = draft(x=(6,))
        weight = g.op("exp", g.weight("w", tensor(6)))
        view = g.finish(g.op("mul", g.x, weight))
        x = {"x": tensor(6)}
        before = sweep(view, x)
        fold_constants(view, max_bytes=limit)
        assert ops(view).total() == count
        after = sweep(view, x)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_folded_sizes_keep_their_dtype(draft: Any, dtype: torch.dtype) -> None:
    g = draft(x=(5, 6))
    size = g.op("cast", g.op("size", g.x, dim=0), dtype=dtype)
    number = g.op("cast", g.op("div", size, 2.0 if dtype.is_floating_point else 2), dtype=dtype)
    view = g.finish(g.op("mul", g.op("cast", g.x, dtype=dtype), number))
    x = {"x": tensor(5, 6) * 9}
    before = sweep(view, x)
    fold_constants(view)
    check_structure(view)
    if view.kind == "onnx":
        assert "div" not in ops(view)
        assert {w.dtype for w in view.weights().values()} == {dtype}
    after = sweep(view, x)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_pointwise_convolution_becomes_a_linear(draft: Any, kernel: int) -> None:
    g = draft(x=(2, 6, 5, 5))
    window = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    view = g.finish(g.op("conv", g.x, g.weight("c.weight", tensor(4, 6, kernel, kernel)), **window))
    inputs = {"x": tensor(2, 6, 5, 5)}
    before = sweep(view, inputs)
    report = canonicalize(view)
    assert ops(view)["linear"] == (kernel == 1)
    if kernel == 3:
        assert "the kernel is 3x3, not 1" in str(report.refusals["fuse-pointwise-conv"])
    for name, value in sweep(view, inputs).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)


def test_a_graph_whose_edits_are_counted_anew_is_canonicalized(draft: Any) -> None:
    """A narrowing pass starts from a copy that counts as just read: as many edits as there were
    when it was canonical do not make it so."""
    g = draft(x=(2, 6, 5, 5))
    window = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    view = g.finish(g.op("conv", g.x, g.weight("c.weight", tensor(4, 6, 1, 1)), **window))
    view.canonical = 0
    view.count_anew()
    assert canonicalize(view).total and ops(view)["linear"]

"""``trace``: dynamic shapes, what survives of the module, and the message on failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.dropout(self.linear(x)) + self.offset + torch.tensor([1.0, 2.0, 3.0])
        return {"y": y if scale is None else y * scale}


class Call(nn.Module):
    """A module of one function, named ``body`` inside."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.body = Body(function)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Body(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def types(view: FxView) -> list[str]:
    return [str(view.type(v)) for v in (*view.inputs(), *view.outputs())]


@pytest.mark.parametrize("batch", [1, 5])
def test_batch_is_dynamic_also_from_one_example(batch: int) -> None:
    module = Net().train()
    module.dropout.p = 0.9
    view = trace(module, torch.randn(batch, 4))
    assert types(view) == ["f32[batch, 4]", "f32[batch, 3]"]
    assert (view.input_names(), view.output_names()) == (("x",), ("y",))
    assert set(view.weights()) >= {"linear.weight", "linear.bias", "offset"}
    assert module.training and module.dropout.training, "the module is left as it was"
    x = torch.randn(123, 4)
    assert torch.equal(sweep(view, {"x": x})["y"], module.eval()(x)["y"])


def test_integers_also_have_a_dynamic_sequence() -> None:
    class Tokens(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
            return ids * mask, extra + 1

    view = trace(
        Tokens(),
        (torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)),
        {"extra": torch.zeros(1, 7)},
    )
    assert types(view)[:3] == ["i64[batch, seq]", "bool[batch, seq]", "f32[batch, 7]"]
    assert view.output_names() == ("output_0", "output_1")
    ids, mask = torch.arange(615).reshape(5, 123), torch.arange(615).reshape(5, 123) % 2 == 0
    out = sweep(view, {"ids": ids, "mask": mask, "extra": torch.zeros(5, 7)})
    assert torch.equal(out["output_0"], ids * mask)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.ones(2, 3)
    view = trace(Difference(), (x, x))
    out = sweep(view, {"a": 5 * x, "b": x})
    assert torch.equal(out["output"], 3 * x)


def test_only_the_dimension_that_the_module_fixes_is_fixed() -> None:
    class Fixed(nn.Module):
        def forward(self, ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return ids.float() @ torch.ones(3, 2), other * 2

    view = trace(Fixed(), (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 5)))
    assert types(view) == ["i64[batch, 3]", "f32[batch, 5]", "f32[batch, 2]", "f32[batch, 5]"]


def test_dynamic_shapes_are_the_callers_to_give() -> None:
    assert types(trace(Net(), torch.randn(5, 4), dynamic_shapes={}))[0] == "f32[5, 4]"
    rows = Dim("rows", max=100)
    for shapes in ({"x": {0: rows}}, ({0: rows},), {"x": (rows, None)}):
        view = trace(Net(), (torch.randn(5, 4),), dynamic_shapes=shapes)
        assert types(view) == ["f32[rows, 4]", "f32[rows, 3]"]


def test_a_given_dimension_that_must_be_fixed_is_an_error() -> None:
    module = Call(lambda x: x.reshape(2, -1) + torch.ones(x.shape[0], 1))
    with pytest.raises(BadInput, match=r"specialized it to be a constant \(2\)\nTry .* b = 2$"):
        trace(module, torch.randn(2, 4), dynamic_shapes={"x": {0: Dim("b")}})
    assert types(trace(module, torch.randn(2, 4))) == ["f32[2, 4]", "f32[2, 4]"]


def test_what_cannot_be_traced_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def branch(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(BadInput) as caught:
        trace(nn.Sequential(nn.Identity(), Call(branch)), torch.randn(2, 4))
    message = str(caught.value)
    assert "tracing failed in 1.body (Body), " in message and "test_trace.py" in message
    assert "torch.where" in message
    with pytest.raises(BadInput, match=r"in body \(Body\).*same reduction dim.*\nTry inputs"):
        trace(Call(lambda x: x @ torch.ones(5, 2)), torch.randn(2, 4))
    assert capfd.readouterr() == ("", ""), "torch's own reports stay off the terminal"


def test_errors_of_the_models_own_code_are_told() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("no such table")

    with pytest.raises(BadInput, match=r"in body .*no such table") as caught:
        trace(Call(fail), torch.randn(2, 4))
    assert isinstance(caught.value.__cause__, KeyError)


def test_inputs_that_do_not_fit_forward() -> None:
    with pytest.raises(BadInput, match=r"Net\.forward\(x.*missing a required argument: 'x'"):
        trace(Net())
    with pytest.raises(BadInput, match="unexpected keyword argument 'y'"):
        trace(Net(), torch.randn(2, 4), {"y": 1})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: x + torch.rand_like(x),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    ],
    ids=["dropout", "rand", "sdpa", "batch_norm"],
)
def test_randomness_does_not_survive(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BadInput, match=r"^body: aten.* in evaluation mode"):
        trace(Call(function), torch.randn(2, 4, 4))


def test_evaluation_mode_layers_are_exact() -> None:
    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            drawn = torch.rand(())  # read in training alone
            y = F.dropout(self.norm(x), 0.5, training=self.training)
            if self.training and drawn < 0.1:
                return y
            return F.scaled_dot_product_attention(y, y, y)

    module, x = Exact(), torch.randn(5, 4, 3)
    view = trace(module, x)
    assert torch.allclose(sweep(view, {"x": x})["output"], module.eval()(x), atol=1e-6)


def test_meta_parameters_need_handles() -> None:
    from graphwright.ir.core.weights import MemoryWeight

    with torch.device("meta"):
        module = Net()
    module.offset = torch.arange(3.0)
    with pytest.raises(BadInput, match=r"linear\.weight has no data: give its handle"):
        trace(module, torch.randn(2, 4))
    weights = {
        "linear.weight": MemoryWeight(torch.ones(3, 4)),
        "linear.bias": MemoryWeight(torch.zeros(3)),
    }
    view = trace(module, torch.randn(2, 4), weights=weights)
    devices = [v for n in view.nodes() for v in n.kwargs.values() if isinstance(v, torch.device)]
    assert torch.device("meta") not in devices
    out = sweep(view, {"x": torch.ones(5, 4)})["y"]
    assert torch.equal(out, torch.tensor([5.0, 7.0, 9.0]).expand(5, 3))

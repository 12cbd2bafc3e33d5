"""Convolutions whose padding is a word, as SigLIP's patches have it, are convolutions."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep

CASES = {
    "valid": ({"kernel_size": 4, "stride": 4, "padding": "valid"}, {(0, 0)}),
    "same": ({"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)}, {(2, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_word_is_read_as_the_zeros_that_it_means(case: str) -> None:
    options, padding = CASES[case]
    module = torch.nn.Conv2d(3, 6, **options).eval()  # type: ignore[arg-type]
    x = torch.randn(2, 3, 12, 12)
    view = trace(module, (x,))
    convs = [node for node in view.nodes() if view.op(node) == "conv"]
    assert {view.attrs(node)["padding"] for node in convs} == padding
    assert {str(node.target) for node in convs} == {"aten.conv2d.padding"}
    (actual,) = sweep(view, {view.input_names()[0]: x}).values()
    torch.testing.assert_close(actual, module(x))


def test_zeros_that_both_ends_do_not_share_stay_native() -> None:
    view = trace(torch.nn.Conv1d(3, 6, 4, padding="same"), (torch.randn(2, 3, 12),))
    assert "aten.conv1d.padding" in {view.native_op(n) for n in view.nodes()}

"""The driver: rules applied until none fits, on either graph kind, and what it tells afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import InvalidGraph
from graphwright.ir.core.view import Origin, View
from graphwright.ir.onnx.parts import RULE_KEY, STEP_KEY
from graphwright.ir.rewrite.driver import rewrite
from graphwright.ir.rewrite.rule import Build, Rule
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure, compare, exact_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

Drafts = Callable[..., Any]


class FuseSilu(Rule):
    """mul(x, sigmoid(x)) => silu(x)"""

    name = "fuse-silu"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, p.sigmoid(x))

    def replace(self, build: Build, x: Any) -> Any:
        return build.silu(x)


class FuseRsqrt(Rule):
    """reciprocal(sqrt(x)) => rsqrt(x)"""

    name = "fuse-rsqrt"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.reciprocal(p.sqrt(x))

    def replace(self, build: Build, x: Any) -> Any:
        return build.rsqrt(x)


class FuseRMSNorm(Rule):
    """mul(w, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps)))) => rms_norm(x, w, eps)"""

    name = "fuse-rms-norm"

    def pattern(self, p: Any, x: Any, w: Any, eps: Any) -> Any:
        scale = p.rsqrt(p.add(p.mean(p.pow(x, 2.0), dims=(-1,), keepdim=True), eps))
        return p.mul(w, p.mul(x, scale))

    def where(self, match: Any) -> None:
        match.scalar("eps")
        x, w = match.last_dim("x"), match.last_dim("w")
        if x != w:
            match.refuse(f"x and w end in dimensions {x} and {w}")

    def replace(self, build: Build, x: Any, w: Any, eps: Any) -> Any:
        return build.rms_norm(x, w, eps=build.match.scalar("eps"))


class DropDoubleNeg(Rule):
    """neg(neg(x)) => x"""

    name = "drop-double-neg"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.neg(p.neg(x))

    def replace(self, build: Build, x: Any) -> Any:
        return x


class DropUnit(Rule):
    """mul(x, 1) => x"""

    name = "drop-unit"

    def pattern(self, p: Any, x: Any) -> Any:
        return p.mul(x, 1.0)

    def where(self, match: Any) -> None:
        match.value("x")

    def replace(self, build: Build, x: Any) -> Any:
        return x


class AddOfNeg(Rule):
    """add(x, neg(y)) => sub(x, y)"""

    name = "add-of-neg"

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.add(x, p.neg(y))

    def replace(self, build: Build, x: Any, y: Any) -> Any:
        return build.sub(x, y)


class SubOfNeg(Rule):
    """sub(x, neg(y)) => add(x, y)"""

    name = "sub-of-neg"

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.sub(x, p.neg(y))

    def replace(self, build: Build, x: Any, y: Any) -> Any:
        return build.add(x, y)


class TakeFirst(Rule):
    """maximum(x, y) => x, which holds where x is the greater: the tests only want y to go."""

    name = "take-first"
    exact = False

    def pattern(self, p: Any, x: Any, y: Any) -> Any:
        return p.maximum(x, y)

    def replace(self, build: Build, x: Any, y: Any) -> Any:
        return x


def ops(view: View) -> list[str]:
    return [view.op(node) for node in view.nodes()]


def text(view: View) -> list[Any]:
    """All that a rewrite may change, in words."""

    def shown(operand: Any) -> Any:
        return operand if isinstance(operand, int | float | None) else view.name(operand)

    lines: list[Any] = [
        (
            view.name(n),
            view.op(n),
            tuple(shown(o) for o in view.operands(n)),
            dict(view.attrs(n)),
            tuple((view.name(r), view.type(r)) for r in view.results(n)),
        )
        for n in view.nodes()
    ]
    return [*lines, [view.name(v) for v in view.outputs()], view.output_names()]


def inputs_of(view: View, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(view.type(value).shape, generator=generator)
        for name, value in zip(view.input_names(), view.inputs(), strict=True)
    }


def assert_same_numbers(view: View, before: dict[str, torch.Tensor]) -> None:
    after = sweep(view, inputs_of(view))
    for name, difference in compare(before, after).items():
        assert difference.rel_l2 <= exact_tolerance(before[name].dtype), name


# --- what is applied -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 123)])
def test_a_match_is_replaced_and_what_it_used_is_gone(
    draft: Drafts, shape: tuple[int, ...]
) -> None:
    d = draft(x=shape)
    view = d.finish(d.op("exp", d.op("mul", d.op("sigmoid", d.x), d.x)))
    before = sweep(view, inputs_of(view))
    report = rewrite(view, [FuseSilu()])
    assert report.applied == {"fuse-silu": 1}
    assert ops(view) == ["silu", "exp"]
    assert view.type(view.outputs()[0]).shape == shape
    check_structure(view)
    assert_same_numbers(view, before)


def test_a_rewrite_enables_the_next(draft: Drafts) -> None:
    d = draft(x=(1, 5, 123))
    mean = d.op("mean", d.op("pow", d.x, 2.0), dims=(2,), keepdim=True)
    scale = d.op("reciprocal", d.op("sqrt", d.op("add", mean, 1e-6)))
    w = d.weight("w", torch.linspace(0.5, 1.5, 123))
    view = d.finish(d.op("mul", w, d.op("mul", d.x, scale)))
    before = sweep(view, inputs_of(view))
    report = rewrite(view, [FuseRMSNorm(), FuseRsqrt()])
    assert report.applied == {"fuse-rms-norm": 1, "fuse-rsqrt": 1}
    assert ops(view) == ["rms_norm"]
    check_structure(view)
    assert_same_numbers(view, before)


def test_a_late_rewrite_reaches_roots_far_below_it(draft: Drafts) -> None:
    """``maximum`` holds ``sqrt`` until the deep root was refused, which must be seen again."""

    class Deep(Rule):
        """mul(y, mul(neg(rsqrt(x)), y)) => mul(neg(rsqrt(x)), mul(y, y))"""

        name = "deep"

        def pattern(self, p: Any, x: Any, y: Any) -> Any:
            return p.mul(y, p.mul(p.neg(p.rsqrt(x)), y))

        def replace(self, build: Build, x: Any, y: Any) -> Any:
            return build.mul(build.neg(build.rsqrt(x)), build.mul(y, y))

    d = draft(outputs=2)
    root = d.op("sqrt", d.op("exp", d.x))
    deep = d.op("mul", d.y, d.op("mul", d.op("neg", d.op("reciprocal", root)), d.y))
    view = d.finish(deep, d.op("neg", d.op("maximum", d.op("tanh", d.y), root)))
    report = rewrite(view, [Deep(), FuseRsqrt(), TakeFirst()])
    assert report.applied == {"deep": 1, "fuse-rsqrt": 1, "take-first": 1}
    assert sorted(ops(view)) == ["exp", "mul", "mul", "neg", "neg", "rsqrt", "tanh"]
    check_structure(view)


def test_a_late_rewrite_to_an_old_value_reaches_its_new_users(draft: Drafts) -> None:
    d = draft(outputs=2)
    once = d.op("neg", d.op("sigmoid", d.x))
    gated = d.op("mul", d.x, d.op("neg", once))
    view = d.finish(gated, d.op("exp", d.op("maximum", d.op("tanh", d.y), once)))
    report = rewrite(view, [FuseSilu(), DropDoubleNeg(), TakeFirst()])
    assert report.applied == {"fuse-silu": 1, "drop-double-neg": 1, "take-first": 1}
    assert sorted(ops(view)) == ["exp", "silu", "tanh"]
    check_structure(view)


def test_the_earlier_rule_wins(draft: Drafts) -> None:
    class Other(FuseSilu):
        """mul(x, sigmoid(x)) => silu(x)"""

        name = "other"

    d = draft(x=(5,))
    view = d.finish(d.op("mul", d.x, d.op("sigmoid", d.x)))
    assert rewrite(view, [Other(), FuseSilu()]).applied == {"other": 1}


def test_a_chain_collapses_and_a_second_run_finds_nothing(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    value = d.op("tanh", d.x)
    for _ in range(7):
        value = d.op("neg", value)
    view = d.finish(d.op("exp", value))
    assert rewrite(view, [DropDoubleNeg()]).applied == {"drop-double-neg": 3}
    assert ops(view) == ["tanh", "neg", "exp"]
    unchanged = text(view)
    assert rewrite(view, [DropDoubleNeg()]).total == 0
    assert text(view) == unchanged


@pytest.mark.parametrize("times", [1, 2])
def test_an_output_may_become_an_input(draft: Drafts, times: int) -> None:
    d = draft(outputs=times + 1, x=(3, 5))
    view = d.finish(*[d.op("mul", d.x, 1.0) for _ in range(times)], d.op("neg", d.x))
    names = view.output_names()
    before = sweep(view, inputs_of(view))
    assert rewrite(view, [DropUnit()]).total == times
    assert view.output_names() == names
    assert "mul" not in ops(view)
    check_structure(view)
    assert_same_numbers(view, before)


def test_a_root_with_several_results_is_replaced(draft: Drafts) -> None:
    class SplitToSlices(Rule):
        """split(x, (a, b)) => slice(x, 0, a), slice(x, a, a + b)"""

        name = "split-to-slices"

        def pattern(self, p: Any, x: Any) -> Any:
            return p.split(x)

        def replace(self, build: Build, x: Any) -> Any:
            attrs = build.view.attrs(build.match.root)
            (a, b), dim = attrs["sizes"], attrs["dim"]
            return build.slice(x, 0, a, dim=dim), build.slice(x, a, a + b, dim=dim)

    d = draft(outputs=2, x=(3, 7))
    first, second = d.view.results(d.view.producer(d.op("split", d.x, sizes=(2, 5), dim=1)))
    view = d.finish(d.op("neg", first), d.op("exp", second))
    before = sweep(view, inputs_of(view))
    assert rewrite(view, [SplitToSlices()]).total == 1
    assert sorted(ops(view)) == ["exp", "neg", "slice", "slice"]
    check_structure(view)
    assert_same_numbers(view, before)


# --- what is refused -----------------------------------------------------------------------------


def test_a_leak_refuses_until_the_other_user_is_gone(draft: Drafts) -> None:
    d = draft(outputs=2)
    gate = d.op("sigmoid", d.x)
    root = d.op("mul", d.x, gate)
    other = d.op("maximum", d.op("tanh", d.y), gate)
    view = d.finish(root, d.op("exp", other))
    alone = view.copy()
    report = rewrite(alone, [FuseSilu()])
    assert report.total == 0
    reason = report.refusals["fuse-silu"].reason
    assert reason == (
        f"the intermediate {view.name(gate)} is also used by {view.name(view.producer(other))}"
    )
    assert text(alone) == text(view)
    assert rewrite(view, [FuseSilu(), TakeFirst()]).applied == {"fuse-silu": 1, "take-first": 1}
    assert sorted(ops(view)) == ["exp", "silu", "tanh"]


def test_the_refusal_of_where_is_recorded(draft: Drafts) -> None:
    class OnlyNarrow(FuseSilu):
        """mul(x, sigmoid(x)) => silu(x), of at most 4 columns"""

        name = "only-narrow"

        def where(self, match: Any) -> None:
            if match.last_dim("x") > 4:
                match.refuse(f"{match.last_dim('x')} columns are too many")

    d = draft(outputs=2, x=(3, 5), y=(3, 4))
    wide = d.op("mul", d.x, d.op("sigmoid", d.x))
    narrow = d.op("mul", d.y, d.op("sigmoid", d.y))
    root = d.view.producer(wide)
    view = d.finish(wide, narrow)
    report = rewrite(view, [OnlyNarrow()])
    assert report.applied == {"only-narrow": 1}
    refusal = report.refusals["only-narrow"]
    assert refusal.reason == "5 columns are too many"
    assert refusal.node is root
    assert sorted(ops(view)) == ["mul", "sigmoid", "silu"]


def test_the_refusal_that_came_nearest_is_kept(draft: Drafts) -> None:
    d = draft(outputs=3)
    far = d.op("mul", d.x, d.op("tanh", d.x))
    near = d.op("mul", d.x, d.op("sigmoid", d.y))
    view = d.finish(far, near, d.op("mul", d.x, d.y))
    report = rewrite(view, [FuseSilu(), FuseRsqrt()])
    assert report.refusals["fuse-silu"].reason == (
        "expected the same x as before, got the input y at depth 2"
    )
    assert "fuse-rsqrt" not in report.refusals


class _Misfit(FuseSilu):
    name = "misfit"

    def __init__(self, *steps: Any) -> None:
        self.steps = steps

    def replace(self, build: Build, x: Any) -> Any:
        values = [x]
        for op, operands, attrs in self.steps:
            value = getattr(build, op)(*(values[i] for i in operands), **attrs)
            values.append(value)
        return values[-1]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([("silu", (0,), {}), ("matmul", (1, 1), {})], "matmul"),
        ([("silu", (0,), {}), ("mean", (1,), {"dims": (1,), "keepdim": True})], "is needed"),
        ([("silu", (0,), {}), ("cast", (1,), {"dtype": torch.float16})], "is needed"),
        ([("add", (0,), {})], "add takes 2 to 2 operands, not 1"),
        ([("silu", (0,), {}), ("concat", (1, 0), {"dim": 0}), ("relu", (2,), {})], "is needed"),
    ],
)
def test_a_replacement_that_does_not_fit_leaves_the_graph_as_it_was(
    draft: Drafts, steps: list[Any], reason: str
) -> None:
    d = draft()
    root = d.op("mul", d.x, d.op("sigmoid", d.x))
    view = d.finish(d.op("exp", root))
    before, numbers = text(view), sweep(view, inputs_of(view))
    report = rewrite(view, [_Misfit(*steps)])
    assert report.total == 0
    assert reason in report.refusals["misfit"].reason
    assert text(view) == before
    check_structure(view)
    assert_same_numbers(view, numbers)
    assert rewrite(view, [FuseSilu()]).total == 1


def test_a_replacement_of_too_many_values_is_refused(draft: Drafts) -> None:
    class Pair(FuseSilu):
        """mul(x, sigmoid(x)) => silu(x), x"""

        name = "pair"

        def replace(self, build: Build, x: Any) -> Any:
            return build.silu(x), x

    d = draft()
    view = d.finish(d.op("mul", d.x, d.op("sigmoid", d.x)))
    before = text(view)
    assert rewrite(view, [Pair()]).refusals["pair"].reason == "pair gives 2 values for 1"
    assert text(view) == before


def test_rules_that_undo_each_other_are_an_error(draft: Drafts) -> None:
    class Turn(Rule):
        """sub(x, y) => neg(sub(y, x))"""

        name = "turn"

        def pattern(self, p: Any, x: Any, y: Any) -> Any:
            return p.sub(x, y)

        def replace(self, build: Build, x: Any, y: Any) -> Any:
            return build.neg(build.sub(y, x))

    d = draft()
    view = d.finish(d.op("sub", d.x, d.y))
    with pytest.raises(InvalidGraph, match=r"the rules do not settle: \{'turn': \d+"):
        rewrite(view, [Turn()])
    assert view.origin is None
    assert view.journal is None


# --- provenance ----------------------------------------------------------------------------------


def test_new_nodes_say_which_rule_and_pass_made_them(draft: Drafts) -> None:
    d = draft(x=(3, 5))
    view = d.finish(d.op("exp", d.op("mul", d.x, d.op("sigmoid", d.x))))
    rewrite(view, [FuseSilu()], step=7)
    new, old = view.nodes()
    if d.kind == "fx":
        assert new.meta["graphwright"] == Origin("fuse-silu", 7)
        assert "graphwright" not in old.meta
    else:
        assert (new.metadata_props[RULE_KEY], new.metadata_props[STEP_KEY]) == ("fuse-silu", "7")
        assert RULE_KEY not in old.metadata_props
    assert view.origin is None


# --- properties ----------------------------------------------------------------------------------

RULES = (FuseSilu, FuseRsqrt, DropDoubleNeg, DropUnit, AddOfNeg, SubOfNeg)
UNARY = ("neg", "sigmoid", "tanh", "abs", "silu")
BINARY = ("add", "sub", "mul", "maximum")
STEPS = st.lists(
    st.tuples(st.sampled_from((*UNARY, "neg", "unit", "gate", *BINARY)), st.integers(0, 30),
              st.integers(0, 30)),
    min_size=1, max_size=14,
)  # fmt: skip


def random_graph(d: Any, steps: Sequence[tuple[str, int, int]], returned: Sequence[int]) -> View:
    values = [d.x, d.y]
    for op, i, j in steps:
        a, b = values[i % len(values)], values[j % len(values)]
        if op in UNARY:
            value = d.op(op, a)
        elif op == "unit":
            value = d.op("mul", a, 1.0)
        elif op == "gate":
            value = d.op("mul", a, d.op("sigmoid", a))
        else:
            value = d.op(op, a, b)
        values.append(value)
    computed = list(dict.fromkeys([values[2 + i % len(steps)] for i in returned]))
    return d.finish(*computed)  # type: ignore[no-any-return]


@given(
    steps=STEPS,
    returned=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    chosen=st.lists(st.sampled_from(RULES), min_size=1, max_size=6, unique=True),
    shape=st.sampled_from([(1,), (3, 5), (2, 1, 7)]),
)
@settings(max_examples=25, deadline=None)
def test_rewriting_keeps_numbers_and_structure_and_settles(
    draft_of: Drafts, steps: Any, returned: list[int], chosen: list[Any], shape: tuple[int, ...]
) -> None:
    rules = [rule() for rule in chosen]
    applied = {}
    for kind in ("fx", "onnx"):
        distinct = len({2 + i % len(steps) for i in returned})
        d = draft_of(kind, {"x": shape, "y": shape}, outputs=distinct)
        view = random_graph(d, steps, returned)
        check_structure(view)
        before = sweep(view, inputs_of(view))
        applied[kind] = rewrite(view, rules).applied
        check_structure(view)
        assert_same_numbers(view, before)
        settled = text(view)
        assert rewrite(view, rules).total == 0
        assert text(view) == settled
    assert applied["fx"] == applied["onnx"]

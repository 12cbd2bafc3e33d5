"""The sweep in which statistics are gathered: sharing, release, masks by structure, refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.calibrate import Request, calibrate
from graphwright.ir.run.masks import padding_masks, without_first
from graphwright.ir.run.statistics import Gram, Square, Stat, Statistics
from graphwright.ir.run.sweep import sweep, sweep_together
from graphwright.ir.structure.recognize import Linear, recognize
from graphwright.passes.manager import optimize
from torch import Tensor

from ...models import bert, gpt2, llama, opt, raised

KINDS = ("fx", "onnx")
GRAM, SQUARE = Stat("gram", at="linear"), Stat("square", at="linear")
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def graphs() -> dict[str, View]:
    return raised(llama())


def batches(view: View) -> list[Batch]:
    """Two batches; rows padded on the left and on the right."""
    rng = torch.Generator().manual_seed(3)
    inputs = []
    for rows, length in ((3, 9), (2, 6)):
        ids = torch.randint(0, 97, (rows, length), generator=rng)
        mask = torch.ones_like(ids)
        mask[0, :2], mask[1, 4:] = 0, 0
        inputs.append(dict(zip(view.input_names(), (ids, mask), strict=True)))
    return inputs


def by_role(view: View) -> dict[str, Linear]:
    return {x.role: x for x in recognize(view).linears if x.block in (0, None)}


def request(linear: Linear, stats: tuple[Stat, ...], done: Callable[[Statistics], Any]) -> Request:
    return Request(linear.name, ((linear.x,),), stats, done)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_inputs(graphs: dict[str, View], kind: str) -> None:
    view = graphs[kind]
    data, linears = batches(view), by_role(view)
    rows: dict[str, list[Tensor]] = {"q": [], "down": [], "head": []}
    for batch in data:
        mask = batch[view.input_names()[1]].bool()

        def note(node: Any, arguments: list[Any], _: Any, mask: Tensor = mask) -> None:
            for role, parts in rows.items():
                if node is linears[role].node:
                    parts.append(arguments[view.arguments(node).index(linears[role].x)][mask])

        sweep(view, batch, observe=note)
    stats: dict[str, Statistics] = {}
    requests = [request(linears[r], (GRAM, SQUARE), partial(stats.__setitem__, r)) for r in rows]
    calibrate(view, data, requests)
    for role, parts in rows.items():
        x = torch.cat(parts).double()
        assert stats[role][Gram].count == len(x) == 3 * 9 - 7 + 2 * 6 - 4
        torch.testing.assert_close(stats[role][Gram].matrix, x.T @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats[role][Square].total, x.square().sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_linears_of_one_input_share_statistics_that_then_go(
    graphs: dict[str, View], kind: str
) -> None:
    """When one is handed out, all that were handed out for other inputs are gone."""
    view = graphs[kind]
    grams: list[weakref.ref[Gram]] = []
    names: list[list[str]] = []

    def done(name: str, statistics: Statistics) -> None:
        gram = statistics[Gram]
        living = [ref() for ref in grams if ref() is not None]
        assert all(alive is gram for alive in living)
        if not living:
            names.append([])
        names[-1].append(name)
        grams.append(weakref.ref(gram))

    linears = recognize(view).linears
    requests = [request(x, (GRAM,), partial(done, x.role)) for x in linears]
    calibrate(view, batches(view), requests)
    block = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert [sorted(group) for group in names] == [sorted(g) for g in [*block * 2, ["head"]]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_sees_the_compressed_result(graphs: dict[str, View], kind: str) -> None:
    view = graphs[kind]
    linears = by_role(view)
    squares: dict[str, Tensor] = {}

    def totals(compressed: dict[Any, Any]) -> dict[str, Tensor]:
        def done(role: str, statistics: Statistics) -> None:
            squares[role] = statistics[Square].total

        requests = [request(linears[role], (SQUARE,), partial(done, role))
                    for role in ("v", "o", "down")]  # fmt: skip
        calibrate(view, batches(view), requests, compressed)
        return dict(squares)

    def halved(inputs: list[Tensor], results: list[Any]) -> list[Any]:
        assert len(inputs) == len(results) == 2 and "v" in squares, "its statistics come first"
        return [(y / 2,) for (y,) in results]

    before = totals({})
    squares.clear()
    after = totals({linears["v"].node: halved})
    assert torch.equal(before["v"], after["v"])
    torch.testing.assert_close(after["o"], before["o"] / 4, rtol=1e-5, atol=0)
    assert not torch.allclose(before["down"], after["down"], rtol=1e-3)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, bert, opt])
def test_the_mask_is_found_whatever_it_is_called(build: Callable[[], Any]) -> None:
    for view in raised(build()).values():
        view.set_inputs(dict(zip(("one", "other"), view.inputs(), strict=True)))
        data = batches(view)
        assert data[0].keys() == {"one", "other"}
        (first, second) = padding_masks(view, data)
        assert len(first) == len(second) == 1
        assert torch.equal(first[0], data[0]["other"].bool())
        assert torch.equal(second[0], data[1]["other"].bool())


def test_numbers_that_are_no_mask(graphs: dict[str, View]) -> None:
    """Ids that happen to be 0 and 1 pick rows of a table; a mask holds nothing but 0 and 1."""
    view = graphs["fx"]
    ids, mask = view.input_names()
    binary = torch.ones(2, 4, dtype=torch.int64)
    ((padding,),) = padding_masks(view, [{ids: binary, mask: binary}])
    assert torch.equal(padding, binary.bool())
    assert padding_masks(view, [{ids: binary, mask: 3 * binary}]) == [[]]


def test_texts_without_their_first_token(graphs: dict[str, View]) -> None:
    """It is masked wherever it stands, ids stay; a row of one token keeps it."""
    view = graphs["fx"]
    ids, mask = view.input_names()
    rows = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]])
    (cut,) = without_first(view, [{ids: rows + 1, mask: rows}])
    assert cut[mask].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert cut[mask].dtype == rows.dtype and torch.equal(cut[ids], rows + 1)
    assert without_first(view, [{ids: rows + 1, mask: 3 * rows}]) == []


IDS = torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(3))
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SEGMENTS = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)


class _Masked(torch.nn.Module):
    """One attention over embedded ids and two more inputs: ``attend`` makes its mask of them."""

    def __init__(self, attend: Callable[..., Tensor], table: bool = False) -> None:
        super().__init__()
        self.embed, self.q = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)
        self.attend = attend
        self.rows = torch.nn.Parameter(torch.randn(9, 8)) if table else None

    def forward(self, ids: Tensor, other: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.rows is not None:
            x = x + self.rows[other]
        q = self.q(x)[:, None]
        mask = self.attend(other, attention_mask)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def _masks_of(module: _Masked, other: Tensor, names: dict[str, str] | None = None) -> Any:
    inputs = {"ids": IDS, "other": other, "attention_mask": PADDED}
    view = trace(module, kwargs=inputs)
    canonicalize(view)
    values = zip(view.input_names(), view.inputs(), strict=True)
    view.set_inputs({(names or {}).get(name, name): value for name, value in values})
    return padding_masks(view, [{(names or {}).get(n, n): t for n, t in inputs.items()}])[0]


def _same_segment(other: Tensor, mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None] & (other[:, :, None] == other[:, None, :])[:, None]


def _both(other: Tensor, mask: Tensor) -> Tensor:
    return (mask * other).bool()[:, None, None]


def _neither(other: Tensor, mask: Tensor) -> Tensor:
    return torch.ones(6, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("attend", "table"), [(_same_segment, False), (_both, False), (_both, True), (_neither, True)]
)
def test_another_input_of_zeros_and_ones_is_no_padding_mask(
    attend: Callable[..., Tensor], table: bool
) -> None:
    """Segments that are compared, that pick from a table by an index, or that have no name."""
    (padding,) = _masks_of(_Masked(attend, table), SEGMENTS)
    assert torch.equal(padding, PADDED.bool())


def test_two_masks_of_one_shape_that_differ() -> None:
    both = _Masked(_both)
    with pytest.raises(BadInput, match="other and mine may each be the padding mask"):
        _masks_of(both, SEGMENTS, {"attention_mask": "mine"})
    assert len(_masks_of(both, PADDED, {"attention_mask": "mine"})) == 2, "they say the same"


def test_positions_that_are_compared_are_no_mask() -> None:
    def causal(other: Tensor, mask: Tensor) -> Tensor:
        return (other[:, :, None] >= other[:, None, :])[:, None]

    (padding,) = _masks_of(_Masked(causal), SEGMENTS)
    assert torch.equal(padding, PADDED.bool())


# --- what cannot be ------------------------------------------------------------------------------


def test_all_tokens_masked_out(graphs: dict[str, View]) -> None:
    view = graphs["fx"]
    data = [{**b, view.input_names()[1]: torch.zeros(2, 6, dtype=torch.int64)}
            for b in batches(view)[1:]]  # fmt: skip
    with pytest.raises(BadInput, match="every one is masked out"):
        calibrate(view, data, [request(by_role(view)["q"], (SQUARE,), lambda s: None)])


def test_a_statistic_without_a_site(graphs: dict[str, View]) -> None:
    view, other = graphs["fx"], graphs["fx"].copy()
    stray = by_role(other)["down"]
    assert stray.x not in {value for node in view.nodes() for value in view.results(node)}
    with pytest.raises(BadInput, match=r"square matches no site: what .*down_proj takes"):
        calibrate(view, batches(view), [request(stray, (SQUARE,), lambda s: None)])


# --- a stored linear makes its weight once --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_stored_linear_go_together(
    graphs: dict[str, View], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = optimize(graphs[kind], "quantize{bits=8}", samples=batches(graphs[kind])[:1]).graph
    data = batches(view)
    alone = [sweep(view, batch) for batch in data]
    ran: list[str] = []
    execute = type(view).execute

    def counted(self: View, node: Any, args: Any) -> Any:
        ran.append(self.op(node))
        return execute(self, node, args)

    monkeypatch.setattr(type(view), "execute", counted)
    together = sweep_together(view, data)
    assert ran.count("linear_nbit") == len(recognize(view).linears)
    for one, other in zip(alone, together, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)

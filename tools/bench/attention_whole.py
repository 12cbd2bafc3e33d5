"""``python -m graphwright.tools.bench.attention_whole``: attention without a cache.

Four layers, each of three linears and attention among their results, in the shapes of encoders,
towers and prompts: as products (transposed heads), as opset 23's ``Attention``, as Microsoft's
``MultiHeadAttention`` (of as many keys as queries), and, with one product for all three linears, as
opset 23's ``Attention`` and as Microsoft's, which holds its product. Forms are first held against
the products. Microseconds a layer without what its linears take alone, on one thread, the least of
the rounds, all forms in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

from .attention_forms import Graph, started
from .showing import ended

Array = NDArray[Any]
LAYERS = 4
TOLERANCE = 1e-5
FORMS = (
    "linears", "products", "Attention", "MultiHeadAttention", "one product", "+ Attention",
    "+ Microsoft's",
)  # fmt: skip
"""``linears`` and ``one product`` have no attention: forms behind them are counted from these."""
_ALONE = {"linears", "one product"}


@dataclass(frozen=True)
class Case:
    """A model's attention; ``masked``: padding, as [rows, 1, queries, keys]."""

    name: str
    rows: int
    tokens: int
    heads: int
    shared: int
    width: int
    masked: bool = False
    causal: bool = False

    @property
    def parts(self) -> tuple[int, int, int]:
        """Features of queries, keys and values."""
        return tuple(n * self.width for n in (self.heads, self.shared, self.shared))  # type: ignore[return-value]


CASES = (
    Case("MiniLM, 128 tokens", 1, 128, 12, 12, 32, masked=True),
    Case("MiniLM, 32 x 128", 32, 128, 12, 12, 32, masked=True),
    Case("ViT-base, 197", 1, 197, 12, 12, 64),
    Case("CLIP-large, 577", 1, 577, 16, 16, 64),
    Case("GPT-2, 1,024, causal", 1, 1024, 12, 12, 64, causal=True),
    Case("Qwen2-0.5B, 1,024, causal, a mask", 1, 1024, 14, 2, 64, masked=True, causal=True),
)


def session(form: str, case: Case) -> Any | None:
    """Layers in one form, each fed with what the one before it gives; ``None`` where there is no
    such form."""
    own = form in ("MultiHeadAttention", "+ Microsoft's")
    if own and case.heads != case.shared:
        return None
    g, hidden = Graph(), case.heads * case.width
    x = g.input("x", TensorProto.FLOAT, ["rows", "tokens", hidden])
    if case.masked:
        g.input("mask", TensorProto.FLOAT, ["rows", 1, "tokens", "tokens"])
    rng = np.random.default_rng(0)
    for _ in range(LAYERS):
        weights = [_random(rng, hidden, n) for n in case.parts]
        x = _layer(g, x, form, case, weights)
    g.op("Identity", [x], [g.output("y")])
    return started(g)


def _random(rng: np.random.Generator, *shape: int) -> Array:
    numbers: Array = (rng.standard_normal(shape) * shape[0] ** -0.5).astype("f4")
    return numbers


def _layer(g: Graph, x: str, form: str, case: Case, weights: Sequence[Array]) -> str:
    packed, biases = np.concatenate(weights, 1), np.zeros(sum(case.parts), "f4")
    if form == "+ Microsoft's":
        mask = ["", "", "mask"] if case.masked else []
        return g.one(
            "MicrosoftAttention", [x, g.constant(packed), g.constant(biases), *mask],
            num_heads=case.heads, scale=case.width**-0.5, unidirectional=_one_way(case),
        )  # fmt: skip
    if form in ("one product", "+ Attention"):
        parts = g.parts("Split", [_linear(g, x, packed), g.constant([*case.parts])], 3, axis=2)
    else:
        parts = [_linear(g, x, weight) for weight in weights]
    if form in _ALONE:
        sums = [g.one("ReduceMean", [part, g.constant([2])]) for part in parts[1:]]
        return g.one("Add", [parts[0], g.one("Add", sums)])
    mask = ["mask"] if case.masked else []
    if form == "products":
        return _products(g, parts, case, mask)
    if form == "MultiHeadAttention":
        inputs = [*parts, *(["", "", *mask] if mask else [])]
        return g.one(form, inputs, num_heads=case.heads, scale=case.width**-0.5,
                     unidirectional=_one_way(case))  # fmt: skip
    return g.one("Attention", [*parts, *mask], q_num_heads=case.heads, kv_num_heads=case.shared,
                 scale=case.width**-0.5, is_causal=_one_way(case))  # fmt: skip


def _linear(g: Graph, x: str, weight: Array) -> str:
    product = g.one("MatMul", [x, g.constant(weight)])
    return g.one("Add", [product, g.constant(np.zeros(weight.shape[1], "f4"))])


def _one_way(case: Case) -> int:
    """A mask that is given is causal itself."""
    return int(case.causal and not case.masked)


def _products(g: Graph, parts: Sequence[str], case: Case, mask: Sequence[str]) -> str:
    q, k, v = (
        g.one("Transpose", [g.one("Reshape", [part, g.constant([0, 0, count, case.width])])],
              perm=[0, 2, 1, 3])
        for part, count in zip(parts, (case.heads, case.shared, case.shared), strict=True)
    )  # fmt: skip
    rows, tokens = (g.one("Shape", [parts[0]], start=i, end=i + 1) for i in (0, 1))

    def shaped(x: str, heads: int, *last: str) -> str:
        if case.heads == case.shared:
            return x
        sizes = [rows, g.constant([heads]), *last]
        return g.one("Reshape", [x, g.one("Concat", sizes, axis=0)])

    width, rest = g.constant([case.width]), g.constant([-1])
    q = g.one("Mul", [q, g.constant(np.float32(case.width**-0.5))])
    q = shaped(q, case.shared, rest, width)
    logits = g.one("MatMul", [q, g.one("Transpose", [k], perm=[0, 1, 3, 2])])
    logits = shaped(logits, case.heads, tokens, tokens)
    if mask or case.causal:
        logits = g.one("Add", [logits, mask[0] if mask else _lower(g, tokens)])
    weights = shaped(g.one("Softmax", [logits], axis=3), case.shared, rest, tokens)
    y = shaped(g.one("MatMul", [weights, v]), case.heads, tokens, width)
    turned = g.one("Transpose", [y], perm=[0, 2, 1, 3])
    return g.one("Reshape", [turned, g.constant([0, 0, case.heads * case.width])])


def _lower(g: Graph, tokens: str) -> str:
    square = g.one("Concat", [tokens, tokens], axis=0)
    seen = g.one("Trilu", [g.one("Expand", [g.constant(True), square])], upper=0)
    return g.one("Where", [seen, g.constant(np.float32(0)), g.constant(np.float32(-np.inf))])


def feeds(case: Case) -> dict[str, Array]:
    """Random rows, of which the first of several is padded in its second half."""
    rng = np.random.default_rng(1)
    shape = case.rows, case.tokens, case.heads * case.width
    inputs: dict[str, Array] = {"x": rng.standard_normal(shape).astype("f4")}
    if case.masked:
        seen = np.ones((case.rows, 1, case.tokens, case.tokens), bool)
        seen[: case.rows // 2, ..., case.tokens // 2 :] = False
        seen &= np.tril(seen[0, 0]) if case.causal else True
        inputs["mask"] = np.where(seen, 0, -np.inf).astype("f4")
    return inputs


def times(case: Case, rounds: int) -> Mapping[str, float]:
    """Seconds a layer by form. Raises ``ValueError`` where a form gives other numbers."""
    sessions = {form: session(form, case) for form in FORMS}
    inputs, least = feeds(case), dict.fromkeys(FORMS, float("inf"))
    expected = None
    for turn in range(rounds):
        for form, run in sessions.items():
            if run is None:
                continue
            for _ in range(8 if case.rows * case.tokens < 512 else 1):
                began = time.thread_time()
                (y,) = run.run(None, inputs)
                least[form] = min(least[form], (time.thread_time() - began) / LAYERS)
            if turn or form in _ALONE:
                continue
            expected = y if expected is None else expected
            if np.abs(y - expected).max() > TOLERANCE * np.abs(expected).max():
                raise ValueError(f"{form}, {case.name}: {np.abs(y - expected).max():.1e} apart")
    return {form: least[form] - _before(form, least) for form in FORMS}


def _before(form: str, least: Mapping[str, float]) -> float:
    """What a layer takes without its attention."""
    return 0.0 if form in _ALONE else least["one product" if form[0] == "+" else "linears"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="attention_whole", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        table = Table(title=f"us a layer, ONNX Runtime {ort.__version__}", title_justify="left")
        for column in ("", *FORMS):
            table.add_column(column, justify="right" if column else "left")
        for case in CASES:
            cells = times(case, options.rounds).values()
            shown = (f"{s * 1e6:,.0f}" if s < float("inf") else "" for s in cells)
            table.add_row(case.name, *shown)
        console.print(table)

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

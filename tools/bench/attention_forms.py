"""``python -m graphwright.tools.bench.attention_forms``: attention beside a cache in several forms.

Six layers of attention alone, in Qwen2-0.5B's shape (14 heads of width 64 that share 2), from
queries, keys and values in one tensor: as products (``cpu``'s form), as opset 23's ``Attention``,
and as ``GroupQueryAttention`` with its rotation inside, with places and a mask given. Each is first
held against the products, on texts of one length, on texts padded at the left, and on chunks behind
a cache; what the runtime refuses is said. Then microseconds a layer for a step and for a prompt, on
one thread, the least of the rounds, all forms in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from .showing import ended

Array = NDArray[Any]
HEADS, SHARED, WIDTH, LAYERS, LONGEST = 14, 2, 64, 6, 4096
ALL = HEADS + 2 * SHARED
MICROSOFT = "com.microsoft"
SCALE = WIDTH**-0.5
_OWN = ("GroupQueryAttention", "MicrosoftAttention", "MultiHeadAttention", "RotaryEmbedding")
FORMS = ("products", "Attention", "GroupQueryAttention")
CALLS = {"a prompt": (7, 0, 1, 0), "a step": (1, 9, 1, 0), "two chunks": (5, 9, 2, 0),
         "two prompts, padded": (7, 0, 2, 2), "two steps, padded": (1, 9, 2, 2)}  # fmt: skip
"""New tokens, those of before, texts, and padding before the first text."""
TIMED = ((1, 16), (1, 256), (1, 1024), (1, 3000), (16, 0), (256, 0), (1024, 0))
"""New tokens, and those of before."""


class Graph:
    """Nodes of one form, with constants where they are used."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._count = 0

    def input(self, name: str, dtype: int, shape: Sequence[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return name

    def constant(self, array: Any) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(
        self, kind: str, inputs: Sequence[str], names: Sequence[str] = (), **attrs: Any
    ) -> list[str]:
        """The results of a node, named anew where they get no name."""
        results = list(names) or [self.name()]
        own, name = kind in _OWN, kind.removeprefix("Microsoft")
        domain = MICROSOFT if own else ""
        self.nodes.append(helper.make_node(name, inputs, results, domain=domain, **attrs))
        return results

    def one(self, kind: str, inputs: Sequence[str], **attrs: Any) -> str:
        return self.op(kind, inputs, **attrs)[0]

    def parts(self, kind: str, inputs: Sequence[str], count: int, **attrs: Any) -> list[str]:
        return self.op(kind, inputs, [self.name() for _ in range(count)], **attrs)

    def name(self) -> str:
        self._count += 1
        return f"t{self._count}"


def session(form: str) -> Any:
    """Six layers in one form, each fed with what the one before it gives."""
    g = Graph()
    x = g.input("x", TensorProto.FLOAT, ["batch", "new", ALL * WIDTH])
    mask = g.input("mask", TensorProto.FLOAT, ["batch", 1, "new", "all"])
    rows = g.input("rows", TensorProto.INT64, ["batch", "new"])
    for name, dtype, shape in (
        ("last", TensorProto.INT32, ["batch"]), ("total", TensorProto.INT32, []),
        ("cos", TensorProto.FLOAT, [LONGEST, WIDTH // 2]),
        ("sin", TensorProto.FLOAT, [LONGEST, WIDTH // 2]),
    ):  # fmt: skip
        g.input(name, dtype, shape)
    behind = g.constant([HEADS * WIDTH]), g.constant([ALL * WIDTH]), g.constant([2])
    for layer in range(LAYERS):
        past = [g.input(f"past_{p}{layer}", TensorProto.FLOAT, ["batch", SHARED, "past", WIDTH])
                for p in "kv"]  # fmt: skip
        present = [g.output(f"present_{p}{layer}") for p in "kv"]
        y = _LAYERS[form](g, x, (mask, rows), past, present)
        rest = g.one("Slice", [x, *behind])
        x = g.one("Concat", [g.one("Add", [y, y]), rest], axis=2)
    g.op("Identity", [x], [g.output("y")])
    return started(g)


def started(g: Graph) -> Any:
    """A session of one thread."""
    graph = helper.make_graph(g.nodes, "forms", g.inputs, g.outputs, g.constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _products(
    g: Graph, x: str, known: tuple[str, str], past: list[str], present: list[str]
) -> str:
    """As ``backends.onnx.forms.attention_form`` writes it, but for rows that see nothing."""
    mask, rows = known
    batch, new = (g.one("Shape", [x], start=i, end=i + 1) for i in (0, 1))
    group = g.one("Mul", [new, g.constant([HEADS // SHARED])])

    def shape(*sizes: Any) -> str:
        parts = [size if isinstance(size, str) else g.constant([size]) for size in sizes]
        return g.one("Concat", parts, axis=0)

    heads = g.one("Reshape", [x, shape(batch, new, ALL, WIDTH)])
    turned = g.one("Transpose", [heads], perm=[0, 2, 1, 3])
    q, k, v = g.parts("Split", [turned, g.constant([HEADS, SHARED, SHARED])], 3, axis=1)
    q, k = (g.one("RotaryEmbedding", [part, rows, "cos", "sin"]) for part in (q, k))
    g.op("Concat", [past[0], k], [present[0]], axis=2)
    g.op("Concat", [past[1], v], [present[1]], axis=2)
    q = g.one("Mul", [g.one("Reshape", [q, shape(batch, SHARED, group, WIDTH)]),
                      g.constant(np.float32(SCALE))])  # fmt: skip
    keys = g.one("Transpose", [present[0]], perm=[0, 1, 3, 2])
    logits = g.one("Reshape", [g.one("MatMul", [q, keys]), shape(batch, HEADS, new, -1)])
    weights = g.one("Softmax", [g.one("Add", [logits, mask])], axis=3)
    together = g.one("Reshape", [weights, shape(batch, SHARED, group, -1)])
    y = g.one("MatMul", [together, present[1]])
    apart = g.one("Reshape", [y, shape(batch, HEADS, new, WIDTH)])
    joined = g.one("Transpose", [apart], perm=[0, 2, 1, 3])
    return g.one("Reshape", [joined, shape(batch, new, HEADS * WIDTH)])


def _attention(
    g: Graph, x: str, known: tuple[str, str], past: list[str], present: list[str]
) -> str:
    mask, rows = known
    sizes = g.constant([n * WIDTH for n in (HEADS, SHARED, SHARED)])
    q, k, v = g.parts("Split", [x, sizes], 3, axis=2)
    q, k = (g.one("RotaryEmbedding", [part, rows, "cos", "sin"], num_heads=count)
            for part, count in ((q, HEADS), (k, SHARED)))  # fmt: skip
    counts = {"q_num_heads": HEADS, "kv_num_heads": SHARED, "scale": SCALE}
    return g.op("Attention", [q, k, v, mask, *past], [g.name(), *present], **counts)[0]


def _group_query(
    g: Graph, x: str, known: tuple[str, str], past: list[str], present: list[str]
) -> str:
    mask, rows = known
    counts = {"num_heads": HEADS, "kv_num_heads": SHARED, "scale": SCALE, "do_rotary": 1}
    inputs = [x, "", "", *past, "last", "total", "cos", "sin", rows, mask]
    return g.op("GroupQueryAttention", inputs, [g.name(), *present], **counts)[0]


_LAYERS = dict(zip(FORMS, (_products, _attention, _group_query), strict=True))


def feeds(new: int, past: int, texts: int = 1, padding: int = 0) -> tuple[dict[str, Array], Array]:
    """Inputs by name, and which of the new tokens are no padding, [texts, new]."""
    rng, total = np.random.default_rng(new + past), new + past
    held = np.ones((texts, total), bool)
    held[0, :padding] = False
    own = np.arange(past, total)
    seen = (np.arange(total) <= own[:, None])[None] & held[:, None]
    angles = np.arange(LONGEST)[:, None] * 1e4 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    places = np.maximum(held.cumsum(1) - 1, 0)[:, past:]
    inputs: dict[str, Any] = {
        "x": rng.standard_normal((texts, new, ALL * WIDTH)).astype("f4"),
        "mask": np.where(seen, 0, -np.inf).astype("f4")[:, None], "rows": places.astype("i8"),
        "last": np.full(texts, total - 1, "i4"), "total": np.array(total, "i4"),
        "cos": np.cos(angles).astype("f4"), "sin": np.sin(angles).astype("f4"),
    }  # fmt: skip
    for layer in range(LAYERS):
        for part in "kv":
            shape = texts, SHARED, past, WIDTH
            inputs[f"past_{part}{layer}"] = rng.standard_normal(shape).astype("f4")
    return inputs, held[:, past:]


def _known(run: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {entry.name: inputs[entry.name] for entry in run.get_inputs()}


def agreement(sessions: Mapping[str, Any]) -> Table:
    """The greatest difference from the products where there is text, or why there is none."""
    table = Table(title="greatest difference from the products", title_justify="left")
    for column in ("call", *list(sessions)[1:]):
        table.add_column(column)
    for call, sizes in CALLS.items():
        inputs, real = feeds(*sizes)
        cells, expected = [], None
        for run in sessions.values():
            try:
                (y,) = run.run(["y"], _known(run, inputs))
            except Exception as error:  # the runtime's classes have no base of their own
                cells.append(str(error).partition("Message: ")[2][:60] or str(error)[:60])
                continue
            expected = y if expected is None else expected
            cells.append(f"{np.abs(y - expected)[real].max():.1e}")
        table.add_row(call, *cells[1:])
    return table


def times(sessions: Mapping[str, Any], rounds: int) -> Table:
    """Microseconds a layer."""
    table = Table(title=f"us a layer, ONNX Runtime {ort.__version__}", title_justify="left")
    for column in ("new / past", *sessions):
        table.add_column(column, justify="right")
    for new, past in TIMED:
        inputs, _ = feeds(new, past)
        least = dict.fromkeys(sessions, float("inf"))
        for _ in range(rounds):
            for name, run in sessions.items():
                known = _known(run, inputs)
                for _ in range(20 if new == 1 else 2):
                    began = time.thread_time()
                    run.run(None, known)
                    least[name] = min(least[name], time.thread_time() - began)
        table.add_row(f"{new} / {past}", *(f"{s / LAYERS * 1e6:.0f}" for s in least.values()))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, measure, and print both tables."""
    parser = argparse.ArgumentParser(
        prog="attention_forms", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        sessions = {form: session(form) for form in FORMS}
        console.print(agreement(sessions))
        console.print(times(sessions, options.rounds))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

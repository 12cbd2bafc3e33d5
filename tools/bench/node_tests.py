"""``python -m graphwright.tools.bench.node_tests``: the reading of ONNX, by the onnx package's own
node tests.

Each is a file of one node, or of the nodes that a function stands for, with inputs and the outputs
that are right. It goes through the loader, the view and the reference interpreter, and comes out

* equal: every output has the dtype, the shape and the numbers that are right;
* refused: the loader or the interpreter says why it does not take the graph;
* runtime: other numbers than the test's, and those that ONNX Runtime gives for the file itself;
* wrong: other numbers, or an error that was not meant for a person.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from rich.console import Console
from rich.table import Table

from ...backends.onnx.lowering import lowered
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import GraphwrightError
from ...ir.core.values import to_numpy, to_value
from ...ir.load.onnx_file import load_onnx
from ...ir.run.sweep import sweep

Outcome = Literal["equal", "refused", "runtime", "wrong"]
_UNITS = 4


@dataclass(frozen=True)
class Verdict:
    """How one test came out, and the words of a refusal or the difference."""

    name: str
    outcome: Outcome
    words: str = ""


def collect(pattern: str = "*") -> list[Any]:
    """The tests whose name matches, as the onnx package makes them, in its order."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are about overflow and division by zero
        return [t for t in collect_testcases(None) if fnmatch.fnmatch(t.name, pattern)]


def judge(test: Any, folder: Path) -> Verdict:
    """Load a test's model from a file in ``folder``, run it, and compare."""
    path = folder / "model.onnx"
    onnx.save(test.model, path)
    ((inputs, right),) = test.data_sets
    try:
        outputs = _run(path, test.model, inputs)
    except GraphwrightError as error:
        return Verdict(test.name, "refused", str(error).replace(f"{path}: ", ""))
    except Exception as error:
        return Verdict(test.name, "wrong", f"{type(error).__name__}: {error}")
    difference = _difference(test, outputs, right)
    if difference is None:
        return Verdict(test.name, "equal")
    known = _difference(test, outputs, _in_runtime(path, test.model, inputs)) is None
    return Verdict(test.name, "runtime" if known else "wrong", difference)


def _run(path: Path, model: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any]:
    view = load_onnx(path)
    feeds = {i.name: to_value(_plain(x)) for i, x in zip(model.graph.input, inputs, strict=True)}
    values: dict[str, Any] = {}

    def observe(node: Any, _: list[Any], results: tuple[Any, ...]) -> None:
        values.update(zip(map(view.name, view.results(node)), results, strict=True))

    sweep(view, feeds, observe=observe)
    return [to_numpy(values[output.name]) for output in model.graph.output]


def judge_written(test: Any, folder: Path) -> Verdict:
    """The same of what is written: the graph, canonical and lowered again, beside the file itself,
    both in ONNX Runtime. Refused is also what the runtime does not take in the first place."""
    path, written = folder / "model.onnx", folder / "written.onnx"
    onnx.save(test.model, path)
    ((inputs, _),) = test.data_sets
    right = _in_runtime(path, test.model, inputs)
    if not right:
        return Verdict(test.name, "refused", "ONNX Runtime does not run the file itself")
    try:
        view = load_onnx(path)
        canonicalize(view)
        onnx_ir.save(lowered(view).model, written)
        outputs = _run_session(written, test.model, inputs)
    except GraphwrightError as error:
        return Verdict(test.name, "refused", str(error).replace(f"{path}: ", ""))
    except Exception as error:
        return Verdict(test.name, "wrong", f"{type(error).__name__}: {error}")
    difference = _difference(test, outputs, right)
    return Verdict(test.name, "equal" if difference is None else "wrong", difference or "")


def _in_runtime(path: Path, model: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any]:
    """What ONNX Runtime says of the file itself; nothing, where it does not take it."""
    try:
        return _run_session(path, model, inputs)
    except Exception:  # its errors share no base
        return []


def _run_session(path: Path, model: onnx.ModelProto, inputs: Sequence[Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: _plain(x) for i, x in zip(model.graph.input, inputs, strict=True)}
    return list(session.run([o.name for o in model.graph.output], feeds))


def _difference(test: Any, outputs: Sequence[Any], right: Sequence[Any]) -> str | None:
    try:
        _compare(test, outputs, right)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def _compare(test: Any, outputs: Sequence[Any], right: Sequence[Any]) -> None:
    """Raise ``AssertionError`` where a result is another."""
    assert len(outputs) == len(right), f"{len(outputs)} results for {len(right)}"
    for one, other in zip(outputs, right, strict=True):
        if isinstance(other, list):
            _compare(test, one, other)
            continue
        other = to_numpy(to_value(_plain(other)))
        assert one.dtype == other.dtype, f"{one.dtype} for {other.dtype}"
        assert one.shape == other.shape, f"shape {one.shape} for {other.shape}"
        if other.dtype == object:
            np.testing.assert_array_equal(one, other)
        else:
            _compare_numbers(test, one, other)


def _compare_numbers(test: Any, one: Any, other: Any) -> None:
    """By the tolerance of the test, or a few units in the last place of the largest number: a sum
    that is 0 comes out as that."""
    rtol, atol = test.rtol, test.atol
    if other.dtype.kind in "fV":
        unit = float(ml_dtypes.finfo(other.dtype).eps)
        one, other = one.astype(np.float64), other.astype(np.float64)
        largest = np.abs(other[np.isfinite(other)]).max(initial=0.0)
        rtol, atol = max(rtol, 2 * unit), max(atol, _UNITS * unit * largest)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def _plain(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def table(verdicts: Sequence[Verdict]) -> Table:
    """How many came out how, and for what is not equal, why."""
    title = f"{len(verdicts)} node tests of onnx {onnx.__version__}"
    result = Table(title=title, title_justify="left")
    result.add_column("outcome")
    result.add_column("tests", justify="right")
    for outcome, count in Counter(v.outcome for v in verdicts).most_common():
        result.add_row(outcome, str(count))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the tests, print those that are not equal and the counts; 1 where one is wrong."""
    parser = argparse.ArgumentParser(prog="node_tests", description=__doc__)
    parser.add_argument("--only", default="*", help="such as 'test_reduce_*'")
    parser.add_argument("--written", action="store_true", help="judge what is written again")
    options = parser.parse_args(arguments)
    how = judge_written if options.written else judge
    with tempfile.TemporaryDirectory() as folder:
        verdicts = [how(test, Path(folder)) for test in collect(options.only)]
    console = Console(soft_wrap=True)
    for verdict in sorted(verdicts, key=lambda v: v.outcome):
        if verdict.outcome != "equal":
            console.print(f"{verdict.outcome}: {verdict.name}: {verdict.words}", markup=False)
    console.print(table(verdicts))
    return int(any(v.outcome == "wrong" for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())

"""The bench of linears on a stack small enough to run: what it times, prints and refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from graphwright.backends import compile, export
from graphwright.ir.run.verify import difference
from graphwright.tools.bench import linears
from graphwright.tools.bench.linears import Stack, forms
from graphwright.tools.run.machine import processor

STACK = Stack(layers=3, narrow=45, wide=123)
SMALL = ["--layers", "2", "--shape", "16x24", "--batch", "1,3", "--rank", "4", "--rounds", "2",
         "--threads", "1"]  # fmt: skip


def test_each_form_is_what_its_name_says(tmp_path: Path) -> None:
    views = forms(STACK, rank=8, group=32)
    assert list(views) == [
        "fp32", "int4 group 32, accuracy_level=0", "int4 group 32, accuracy_level=0, rank 8",
        "int4 group 32, accuracy_level=4", "int4 group 32, accuracy_level=4, rank 8",
    ]  # fmt: skip
    x = STACK.input(5)
    for index, (name, view) in enumerate(views.items()):
        folder = export(view, tmp_path / str(index))
        nodes = onnx.load(folder / "model.onnx").graph.node
        kinds = Counter(node.op_type for node in nodes)
        low_rank, whole = 6 if "rank" in name else 0, 0 if "int4" in name else 3
        assert (kinds["MatMul"], kinds["MatMulNBits"]) == (low_rank + whole, 3 - whole)
        levels = {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"}
        assert levels == ({4} if "level=4" in name else set())
        got = compile(folder, backend="onnxruntime", threads=1)(x)
        want = compile(view, backend="eager")(x)
        (one,), (other,) = want.values(), got.values()
        assert one.shape == (5, 123)
        assert difference(one, other).rel_l2 <= (2e-2 if "level=4" in name else 1e-5)


def test_the_weights_differ(tmp_path: Path) -> None:
    weights = [w.read() for w in STACK.trace().weights().values()]
    assert [tuple(w.shape) for w in weights] == [(123, 45), (45, 123), (123, 45)]
    assert not torch.equal(weights[0], weights[2])


def test_the_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert linears.main([*SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"onnxruntime", "torch", "cpu", "threads", "load"} < set(figures)
    timings = figures["timings"]
    assert [t["rows"] for t in timings] == [1] * 5 + [3] * 5
    for first in (timings[0], timings[5]):
        assert (first["form"], first["times_fp32"]) == ("fp32", 1.0)
    for one in timings:
        low, high = one["quartiles"]
        assert 0 < low <= one["ms"] <= high
        assert one["gigabytes_per_second"] > 0


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert linears.main(SMALL) == 0
    text = capsys.readouterr().out
    assert "2 linears of 16x24, median of 2 rounds in turns" in text
    assert "GB/s of weights" in text
    assert "threads 1" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--layers", "0"], "give 1 or more of each"),
        (["--rank", "0"], "rank=0, rounds=2: give a rank of 1"),
        (["--rounds", "1"], "rounds=1: give a rank of 1 and 2 rounds"),
        (["--group", "48"], "group=48 must be one of 16, 32, 64, 128, 256"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linears.main([*SMALL, *options]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64", "64x", "64x0", "axb", "1x2x3"])
def test_a_shape_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        linears.main(["--shape", text])
    assert f"{text!r}: give whole numbers, like 64x96" in capsys.readouterr().err


def test_a_processor_that_says_nothing(tmp_path: Path) -> None:
    assert processor(tmp_path / "none") == "unknown processor"
    file = tmp_path / "cpuinfo"
    file.write_text(
        "model name\t: Two Cores\nflags\t\t: sse avx2 amx_int8\n\nmodel name\t: Two Cores\n"
    )
    assert processor(file) == "Two Cores avx2 amx_int8"

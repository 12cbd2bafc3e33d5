"""Quantized artifacts opened again: run by every backend, seen whole, edited, written back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import graphwright as gw
import onnx
import pytest
import torch
from graphwright.backends.runtimes.triton_kernels import bind_kernels
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.ops.base import TOLERANCES
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.costs import graph_costs, sample_sizes, weight_bytes
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.cli.listing import print_structure
from rich.console import Console

EXACT = TOLERANCES[torch.float32]
INTEGERS = 2e-2
"""Rounding of activations to 8 bits flips where they differ in the last place."""
RECIPES = {
    "4 bits": "quantize{bits=4 group=32}",
    "8 bits": "hqq{bits=8 group=64}",
    "easyquant": "easyquant{bits=4 group=32}",
    "eora": "hqq{bits=4 group=32},eora{rank=4}",
}
Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A graph after a recipe, and the artifact that it was written to."""

    graph: View
    folder: Path
    inputs: Feeds

    @property
    def slack(self) -> float:
        nodes = [n for n in self.graph.nodes() if self.graph.op(n) == "linear_nbit"]
        levels = {self.graph.attrs(n)["accuracy_level"] for n in nodes}
        return INTEGERS if 4 in levels else EXACT


def rel(got: Feeds, want: Feeds) -> float:
    return max(difference.rel_l2 for difference in compare(want, got).values())


def ops(view: View) -> Counter[str]:
    return Counter(view.op(node) for node in view.nodes())


@pytest.fixture(scope="module")
def case_of(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """``case_of(name)`` of ``RECIPES``, on a Llama whose inner width of 56 fills no group of 32."""
    small = models.llama(layers=2)
    traced = models.plain(small)

    @cache
    def make(name: str) -> Case:
        result = gw.optimize(
            traced.copy(), RECIPES[name], samples=[small.inputs], calibration=[small.inputs]
        )
        folder = tmp_path_factory.mktemp("artifacts") / name
        return Case(result.graph, gw.export(result.graph, folder), small.inputs)

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_eager_gives_the_numbers_of_the_runtime(name: str, case_of: Callable[[str], Case]) -> None:
    one = case_of(name)
    want = gw.compile(one.folder, backend="onnxruntime", threads=1)(**one.inputs)
    assert rel(gw.compile(one.folder, backend="eager")(**one.inputs), want) <= one.slack
    got = gw.compile(gw.load(one.folder / "model.onnx"), backend="eager")(**one.inputs)
    assert rel(got, want) <= one.slack


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_written_is_seen(name: str, case_of: Callable[[str], Case]) -> None:
    one = case_of(name)
    opened = gw.load(one.folder / "model.onnx")
    canonicalize(opened)
    after, before = recognize(opened), recognize(one.graph)

    def sites(structure: Any) -> list[Any]:
        return [(s.name, s.role, s.block, s.in_features, s.out_features, s.bias is None)
                for s in structure.linears if s.quantized]  # fmt: skip

    assert sites(after) == sites(before)
    assert len(sites(after)) == 15
    assert ops(opened)["sparse_linear"] == ops(one.graph)["sparse_linear"]
    assert len(after.blocks) == len(before.blocks) == 2
    sizes = sample_sizes(opened, one.inputs)
    costs, source = graph_costs(opened, sizes, after), graph_costs(one.graph, sizes, before)
    assert costs.macs == source.macs
    files = sum(f.stat().st_size for f in one.folder.glob("model.onnx*"))
    assert costs.weight_bytes < files
    assert costs.weight_bytes == pytest.approx(source.weight_bytes, rel=0.12)


@pytest.mark.parametrize("name", RECIPES)
def test_written_again_it_is_the_same(
    name: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    one = case_of(name)
    opened = gw.load(one.folder / "model.onnx")
    twice = gw.export(opened, tmp_path / "twice")
    first, second = (onnx.load(folder / "model.onnx") for folder in (one.folder, twice))
    assert _kinds(first) == _kinds(second)
    assert _codes(first) == _codes(second)
    run = [gw.compile(f, backend="onnxruntime", threads=1) for f in (one.folder, twice)]
    assert rel(run[1](**one.inputs), run[0](**one.inputs)) <= 1e-6


def _kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _codes(model: Any) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in model.graph.initializer if t.name.endswith(".codes")}


@pytest.mark.parametrize("name", ["4 bits", "eora"])
def test_kernels_take_it(name: str, case_of: Callable[[str], Case]) -> None:
    one = case_of(name)
    opened = gw.load(one.folder / "model.onnx")
    canonicalize(opened)
    after, before = bind_kernels(opened, None), bind_kernels(one.graph, None)

    def linears(binding: Any) -> Counter[str]:
        names = [bound.kernel.__name__ for bound in binding.bound.values()]
        return Counter(name for name in names if name.startswith("linear"))

    assert linears(after) == linears(before)
    assert linears(after) == {"linear_nbit_low_rank" if name == "eora" else "linear_nbit": 15}


def test_a_second_recipe_goes_on_from_there(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    one = case_of("eora")
    opened = gw.load(one.folder)
    shorter = gw.optimize(opened, "path{blocks=1}", samples=[one.inputs]).graph
    assert ops(shorter)["linear_nbit"] == 8
    want = gw.compile(shorter, backend="eager")(**one.inputs)
    direct = gw.optimize(one.graph, "path{blocks=1}", samples=[one.inputs]).graph
    assert rel(gw.compile(direct, backend="eager")(**one.inputs), want) <= EXACT
    folder = gw.export(shorter, tmp_path / "shorter")
    got = gw.compile(folder, backend="onnxruntime", threads=1)(**one.inputs)
    assert rel(got, want) <= EXACT
    assert weight_bytes(gw.load(folder)) < 0.75 * weight_bytes(opened)


def test_weights_are_not_quantized_twice(case_of: Callable[[str], Case]) -> None:
    one = case_of("8 bits")
    opened = gw.load(one.folder)
    with pytest.raises(BadInput, match="its weight is quantized already, to 8 bits"):
        gw.optimize(opened, "quantize{bits=4}", samples=[one.inputs])
    with pytest.raises(BadInput, match="eora corrects what an earlier pass did to weights"):
        gw.optimize(opened, "eora{rank=4}", samples=[one.inputs], calibration=[one.inputs])


def test_inspect_says_what_is_stored(
    case_of: Callable[[str], Case], capsys: pytest.CaptureFixture[str]
) -> None:
    print_structure(Console(width=200), str(case_of("8 bits").folder))
    text = capsys.readouterr().out
    assert "mlp.down_proj" in text
    assert "8 bits, group 64" in text
    assert "MatMulNBits" not in text


# --- models of another tool ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "block", "symmetric", "level"),
    [(4, 32, True, None), (8, 16, False, 4)],
)
def test_what_the_runtimes_own_quantizer_writes(
    models: ModuleType, tmp_path: Path, bits: int, block: int, symmetric: bool, level: int | None
) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    small = models.bert(layers=1)
    view = models.plain(small)
    plain = gw.export(view, tmp_path / "plain")
    quantizer = MatMulNBitsQuantizer(
        onnx.load(plain / "model.onnx"), bits=bits, block_size=block, is_symmetric=symmetric,
        accuracy_level=level,
    )  # fmt: skip
    quantizer.process()
    path = tmp_path / "model.onnx"
    quantizer.model.save_model_to_file(str(path), False)
    opened = gw.load(path)
    held = {t.name: len(t.raw_data) for t in onnx.load(path).graph.initializer}
    assert weight_bytes(opened) == pytest.approx(sum(held.values()), rel=0.05)
    canonicalize(opened)
    sites, dense = recognize(opened).linears, recognize(_raised(view)).linears
    assert [(s.name, s.role, s.bias is None) for s in sites] == [
        (s.name, s.role, s.bias is None) for s in dense
    ]
    assert all(s.quantized for s in sites)
    want = gw.compile(path, backend="onnxruntime", threads=1)(**small.inputs)
    slack = INTEGERS if level == 4 else EXACT
    assert rel(gw.compile(path, backend="eager")(**small.inputs), want) <= slack
    again = gw.export(opened, tmp_path / "again")
    assert rel(gw.compile(again, backend="onnxruntime", threads=1)(**small.inputs), want) <= EXACT


def _raised(view: View) -> View:
    canonicalize(view)
    return view

"""Backends of another package, registered by entry point: in Python and on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends import backend_names, find_backend
from graphwright.ir.core.errors import BadInput
from graphwright.tools.report import manifest

PACKAGE = """
from pathlib import Path

import torch
from graphwright.backends import Backend
from graphwright.backends.runtimes.eager import EagerExecutable
from graphwright.ir.core.errors import Missing
from graphwright.ir.load.sources import load

built = []

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(32, 16), (torch.randn(2, 32),)

class Scaled(EagerExecutable):
    def __init__(self, view, factor):
        super().__init__(view)
        self.factor = factor

    def __call__(self, *args, **inputs):
        return {name: self.factor * out for name, out in super().__call__(*args, **inputs).items()}

def build(graph, *, device="cpu", factor=1.0):
    built.append(graph)
    return Scaled(load(graph) if isinstance(graph, Path) else graph, factor)

def build_wrong(graph, *, device="cpu"):
    return build(graph, factor=1.01)

def check_device(device):
    if device != "cpu":
        raise Missing(f"the abacus has no {device}")

def check_nothing(device):
    raise Missing("the abacus lacks its beads")

ABACUS = Backend(build, check_device)
FILES = Backend(build, check_device, runs_artifacts=True)
WRONG = Backend(build_wrong, check_device)
BROKEN = Backend(build, check_nothing)
OPTIMIZED = MODEL_DUMP = ABACUS
NOTHING = object()
"""
NAMES = ("abacus", "files", "wrong", "broken", "nothing", "optimized", "model_dump")
MODEL = "graphwright_abacus:make"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The other package's module; it is installed, and the working folder is empty."""
    home, work = tmp_path / "site", tmp_path / "work"
    info = home / "abacus-1.0.dist-info"
    info.mkdir(parents=True)
    work.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1.0\n")
    points = [f"{name} = graphwright_abacus:{name.upper()}" for name in NAMES]
    (info / "entry_points.txt").write_text("\n".join(["[graphwright.backends]", *points, ""]))
    (home / "graphwright_abacus.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.chdir(work)
    yield importlib.import_module("graphwright_abacus")
    sys.modules.pop("graphwright_abacus")


def test_a_backend_of_another_package_is_compiled_for(package: Any) -> None:
    assert set(NAMES) | {"eager", "onnxruntime", "triton"} <= set(backend_names())
    assert find_backend("abacus") is package.ABACUS
    module, (x,) = package.make()
    run = gw.compile(gw.trace(module, (x,)), backend="abacus", factor=2.0)
    (name,) = run.output_names
    torch.testing.assert_close(run(x)[name], 2.0 * module(x))
    with pytest.raises(BadInput, match=r"abacus: .*'scale'"):
        gw.compile(gw.trace(module, (x,)), backend="abacus", scale=2.0)
    with pytest.raises(BadInput, match="no backend 'abacu'; did you mean abacus"):
        find_backend("abacu")
    with pytest.raises(BadInput, match="'nothing' is not a graphwright backend"):
        find_backend("nothing")


def test_without_the_package_it_is_unknown() -> None:
    with pytest.raises(BadInput, match=r"no backend 'abacus'; known: eager, onnxruntime, triton"):
        find_backend("abacus")


@pytest.mark.parametrize("name", ["abacus", "files", "model_dump"])
def test_the_command_also_runs_the_result_there(name: str, package: Any, command: Any) -> None:
    code, out, err = command(MODEL, "-p", "quantize", "--backend", name, "-o", "out")
    assert code == 0, err
    assert f"{name}: cosine 1.000000" in out
    error = manifest.load("out").verification.runtime.backends[name]
    assert error.rel_l2 is not None and error.rel_l2 < 1e-5
    assert f"<td>{name}, against the rewritten graph</td>" in Path("out/report.html").read_text()
    (graph,) = package.built
    assert isinstance(graph, Path) == (name == "files")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("abacu", 2, "--backend abacu is unknown; did you mean abacus"),
        ("eager", 2, "--backend eager: it is what the artifact is compared with"),
        ("optimized", 2, "a backend cannot be named optimized"),
        ("broken", 3, "the abacus lacks its beads"),
        ("wrong", 1, "wrong: the output output is 0.01 (relative L2; bound 0.0001) from what"),
    ],
)
def test_the_command_refuses(
    name: str, code: int, message: str, package: Any, command: Any
) -> None:
    status, out, err = command(MODEL, "-p", "quantize", "--backend", name, "-o", "out")
    assert (status, out) == (code, "") and message in err
    assert list(Path().iterdir()) == []

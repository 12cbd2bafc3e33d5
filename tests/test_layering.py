"""The layers of the package: who may import whom, no circles, a light ``import graphwright``."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("ir", "kernels", "passes", "backends", "tools")
CORE = {"ir/core", "ir/vocab"}
NATIVE = {*CORE, "ir/ops", "ir/fx", "ir/onnx"}
IR = {
    "ir", *NATIVE, "ir/rewrite", "ir/canonical", "ir/structure", "ir/moves", "ir/run", "ir/text",
    "ir/load", "ir/load/checkpoints", "ir/load/gguf", "ir/load/hf", "ir/load/tracing",
    "ir/load/zoo",
}  # fmt: skip
BACKENDS = {
    "backends", "backends/onnx", "backends/artifacts", "backends/generation", "backends/runtimes",
}  # fmt: skip
PASSES = {"passes", "passes/exact", "passes/weights", "passes/tokens", "passes/depth"}
MAY_IMPORT: dict[str, set[str]] = {
    "ir": set(),
    "ir/core": set(),
    "ir/vocab": {"ir/core"},
    "ir/ops": CORE,
    "ir/fx": {*CORE, "ir/ops"},
    "ir/onnx": {*CORE, "ir/ops"},
    "ir/rewrite": {*CORE, "ir/ops"},
    "ir/canonical": {*CORE, "ir/ops", "ir/onnx", "ir/rewrite"},
    "ir/structure": CORE,
    "ir/moves": {*CORE, "ir/structure"},
    "ir/run": {*CORE, "ir/structure"},
    "ir/text": NATIVE,
    "ir/load": {
        *NATIVE, "ir/canonical", "ir/structure", "ir/load/checkpoints", "ir/load/gguf",
        "ir/load/hf", "ir/load/tracing", "ir/load/zoo",
    },
    "ir/load/checkpoints": {*NATIVE},
    "ir/load/gguf": {*NATIVE, "ir/load/checkpoints", "ir/load/hf"},
    "ir/load/hf": {
        *NATIVE, "ir/structure", "ir/load", "ir/load/checkpoints", "ir/load/tracing",
    },
    "ir/load/tracing": {*NATIVE, "ir/structure"},
    "ir/load/zoo": {*NATIVE, "ir/load/checkpoints", "ir/load/hf", "ir/load/tracing"},
    "kernels": CORE | {"ir/ops"},
    "passes": {*CORE, "ir/canonical", "ir/structure", "ir/moves", "ir/run"},
    "passes/exact": {
        "passes", *CORE, "ir/rewrite", "ir/structure", "ir/moves", "ir/run",
    },
    "passes/weights": {"passes", *CORE, "ir/ops", "ir/structure", "ir/moves", "ir/run"},
    "passes/tokens": {"passes", *CORE, "ir/structure", "ir/moves"},
    "passes/depth": {"passes", *CORE, "ir/structure", "ir/moves", "ir/run"},
    "backends": {*IR, "backends/artifacts"},
    "backends/onnx/aten": NATIVE,
    "backends/onnx/forms": IR,
    "backends/onnx": {*IR, "backends/onnx/aten", "backends/onnx/forms"},
    "backends/artifacts": {*IR, "backends", "backends/onnx", "backends/runtimes"},
    "backends/generation": {*IR, "backends"},
    "backends/runtimes": {
        *IR, "kernels", "backends", "backends/onnx", "backends/generation",
    },
    "tools": set(),
    "tools/data": {*IR, "tools/report"},
    "tools/report": {*IR},
    "tools/evaluate": {*IR, *BACKENDS, "tools/data", "tools/report"},
    "tools/search": {*IR, *PASSES, *BACKENDS, "tools/data", "tools/report", "tools/evaluate"},
    "tools/run": {
        *IR, *PASSES, *BACKENDS, "tools/data", "tools/report", "tools/evaluate", "tools/search",
    },
    "tools/formats": {*IR, "passes", *BACKENDS, "tools/report"},
    "tools/cli": {
        *IR, *PASSES, *BACKENDS, "tools/data", "tools/report", "tools/evaluate", "tools/run",
        "tools/formats", "tools/search",
    },
    "tools/bench": {
        ".", *IR, *PASSES, "kernels", *BACKENDS, "tools/data", "tools/report", "tools/evaluate",
        "tools/run", "tools/cli", "tools/formats", "tools/search",
    },
    "tools/examples": set(),
    "tools/zoo": {*IR, *BACKENDS, "tools/data", "tools/evaluate"},
}  # fmt: skip
"""What each room, a folder of the package, may import beside itself."""
FLAT = {
    "backends": {"__init__.py", "base.py", "registry.py"},
    "ir": {"__init__.py"},
    "tools": {"__init__.py"},
}
"""The only files that may lie in these folders themselves."""
FILES = sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def room(path: Path) -> str:
    """The folder of a file of the package; the package root for the root's own files."""
    return path.relative_to(ROOT).parent.as_posix()


@cache
def imported_files(path: Path) -> tuple[Path, ...]:
    """The files of the package that a file imports, at its top or inside a function."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        if base.with_suffix(".py").is_file():
            yield base.with_suffix(".py")
            continue
        for alias in node.names:
            inner = base / alias.name
            yield inner.with_suffix(".py") if inner.with_suffix(".py").is_file() else (
                (inner if inner.is_dir() else base) / "__init__.py"
            )


def libraries(path: Path) -> set[str]:
    """The packages outside that a file imports."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            packages.add((node.module or "").split(".")[0])
    return packages


def test_every_room_has_its_row() -> None:
    assert len(FILES) > 150
    assert {room(p) for p in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_who_may_import_whom(name: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path in FILES
        if room(path) == name
        for other in imported_files(path)
        if room(other) not in {name, *MAY_IMPORT[name]}
    }
    assert not wrong


def test_no_circle_between_files() -> None:
    graph = nx.DiGraph((a, b) for a in FILES for b in imported_files(a) if a != b)
    circles = [sorted(str(p.relative_to(ROOT)) for p in c)
               for c in nx.strongly_connected_components(graph) if len(c) > 1]  # fmt: skip
    assert not circles


def test_nothing_lies_flat() -> None:
    for name, allowed in FLAT.items():
        assert {p.name for p in (ROOT / name).glob("*.py")} == allowed


def test_the_tests_mirror_the_rooms() -> None:
    folders = {room(p) for p in (ROOT / "tests").rglob("test_*.py")} - {"tests"}
    assert {f.removeprefix("tests/") for f in folders} <= set(MAY_IMPORT)


def test_documentation_names_what_is_there() -> None:
    """``ir.run.sweep``, ``ir/run/sweep.py``: a file or a folder, or a word in a file."""
    wrong = []
    for path in [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for name in re.findall(rf"`((?:{'|'.join(LAYERS)})(?:[./][a-z]\w*)+)", path.read_text()):
            *parts, last = re.split(r"[./]", name.removesuffix(".py"))
            file, folder = ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, last)
            there = folder.is_dir() or folder.with_suffix(".py").is_file()
            if not there and not (file.is_file() and last in file.read_text()):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


def test_passes_name_no_backend_and_no_loader() -> None:
    barred = {"onnxruntime", "triton", "transformers"}
    wrong = {
        f"{path.relative_to(ROOT)} names {', '.join(named)}"
        for path in FILES
        if room(path) in PASSES and (named := libraries(path) & barred)
    }
    assert not wrong
    ours = [p for p in FILES if "graphwright" in libraries(p)]
    assert {room(p) for p in ours} == {"tools/examples"}, "imports inside are relative"


def test_importing_the_package_loads_no_heavy_library() -> None:
    """Nor do its backends, nor a plan's first steps."""
    code = (
        "import sys, graphwright.backends, graphwright.backends.base, graphwright as gw; "
        "gw.trace; gw.load; gw.optimize; gw.passes.HQQ; gw.compile; gw.plan; "
        "gw.Recipe.parse('quantize,clean'); "
        "print([m for m in ('triton', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_runtimes_telemetry_is_off_before_it_is_imported() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = "import os, graphwright; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for setting, printed in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ | setting, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        assert done.stdout.strip() == printed


def test_the_public_face_is_short() -> None:
    assert len((ROOT / "__init__.py").read_text().splitlines()) < 48

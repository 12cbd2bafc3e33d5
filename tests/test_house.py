"""The house: floors import downwards only, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"ir": 1, "kernels": 2, "passes": 3, "backends": 4, "tools": 5}
MAY_USE = {
    "ir": {"ir"},
    "kernels": {"ir", "kernels"},
    "passes": {"ir", "passes"},
    "backends": {"ir", "kernels", "backends"},
    "tools": set(FLOORS),
}
FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, is it one of ours by a relative import) of each import in a file."""
    found = []
    parents = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.append((module, node.level > 0))
            if node.level and not node.module:
                found += [(".".join([*base, alias.name]), True) for alias in node.names]
    return found


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    for module, ours in imports(path):
        head = module.split(".")[0]
        assert head != "graphwright", f"{path}: absolute import of {module}"
        if ours and head in FLOORS:
            assert head in MAY_USE[floor], f"{path}: {floor} imports {module}"
        if floor == "passes" and not ours:
            assert head not in ("onnxruntime", "triton", "transformers"), f"{path}: names {module}"


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = (
        "import sys, graphwright as gw; gw.trace; gw.load; gw.optimize; gw.passes; gw.compile; "
        "print([m for m in ('triton', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_face_is_short() -> None:
    assert len((ROOT / "__init__.py").read_text().splitlines()) < 40

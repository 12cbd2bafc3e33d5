"""The wheel holds exactly the package: each source file, each data file, nothing of the root."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # of no statement of the package; the gate names this file
ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("ir", "kernels", "passes", "backends", "tools")
OUTSIDE = ("tools/bench/", "tools/zoo/", "tools/guide/")
"""Commands that measure and train, and pages to read: not in the wheel."""
DATA = {".py", ".toml", ".j2", ".json", ".typed", ".npz", ".gz", ".safetensors", ".md"}


def test_wheel_content(tmp_path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    copy = tmp_path / "source"
    for name in tracked:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("graphwright-*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        f"graphwright/{name}"
        for name in tracked
        if name in ("__init__.py", "py.typed")
        or ((name.split("/")[0] in LAYERS and Path(name).suffix in DATA and (ROOT / name).is_file())
        and not name.startswith(OUTSIDE))
    }
    assert inside == expected


def test_every_dependency_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [name for listed in lists for name in listed if not name.startswith("graphwright[")]
    assert len(names) > 20
    assert [name for name in names if not re.search(r"<\d|==\d", name.partition(";")[0])] == []

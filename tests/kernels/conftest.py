"""Kernels under triton's interpreter, in one process of their own: it is chosen at import.

As a script: ``conftest.py FILE...`` runs ``measure()`` of each test file and prints the results.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = ("linear_bitstack", "linear_nbit", "rope", "token_scores", "token_select")
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

Errors = Mapping[str, Mapping[str, float]]


@pytest.fixture(scope="session")
def errors(once_a_run: Callable[[str, Callable[[], Errors]], Errors]) -> Errors:
    """By kernel and label of the case: the relative L2 error against the op's reference."""
    return once_a_run("interpreted", _interpreted)


def _interpreted() -> Errors:
    files = [str(HERE / f"test_{name}.py") for name in INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *files], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Errors = json.loads(done.stdout)
    return found


def main() -> None:
    found = {}
    for file in map(Path, sys.argv[1:]):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found[file.stem.removeprefix("test_")] = module.measure()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

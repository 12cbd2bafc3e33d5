"""Every kernel compiled for GPUs that are not there: nothing spills, shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import Missing
from graphwright.kernels.registry import kernel_of
from graphwright.tools.bench import kernels

ARCHS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ``bench.kernels --offline --quick --json`` says; a process of its own, with an empty
    cache. Without ``--quick`` all cases are compiled for all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    # The bench is of the checkout: the installed package has none.
    code = (
        "import sys, graphwright.tools\n"
        "graphwright.tools.__path__.append(sys.argv.pop(1))\n"
        "from graphwright.tools.bench.kernels import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    command = [sys.executable, "-c", code, tools, "--offline", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_all_kernels_are_compiled_for_all_kinds_of_devices(rows: list[dict[str, Any]]) -> None:
    kernels = {
        "gemv_kernel", "gemm_kernel", "join_kernel", "token_select_kernel", "rope_kernel",
        "bitstack_kernel", "logits_kernel", "totals_kernel", "mean_kernel",
    }  # fmt: skip
    for arch in ARCHS:
        found = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"] for row in found} == kernels
    kernel = kernel_of("linear_nbit")
    assert kernel is not None
    of_linears = [row for row in rows if row["kernel"] in ("gemv_kernel", "gemm_kernel")]
    assert {row["case"] for row in of_linears if row["arch"] == "sm_90"} == {
        case for case, _ in kernel.launches()
    }
    assert {row["arch"] for row in rows} == set(ARCHS)


@pytest.mark.slow
def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spilled"]] == []
    assert all(16 <= row["registers"] <= 255 for row in rows)


@pytest.mark.slow
def test_shared_memory_is_within_the_device(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["shared_limit"] == ARCHS[row["arch"]]
        assert row["shared"] <= row["shared_limit"], row
    tiles = [row["shared"] for row in rows if row["kernel"] == "gemm_kernel"]
    assert min(tiles) > 16 * 1024  # or loads are not prefetched


def test_a_spill_is_seen() -> None:
    """A kernel held to 32 registers spills, and the figures say so."""
    from dataclasses import replace

    from graphwright.kernels.offline import compile_for

    launch = next(one for _, one in kernels._launches() if "gemv" in one.kernel.__name__)
    assert compile_for(replace(launch, registers=32), 90).spilled > 0


def test_without_ptxas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from graphwright.kernels.offline import compile_for
    from triton import knobs

    for tool in ("ptxas", "ptxas_blackwell"):
        monkeypatch.setattr(vars(type(knobs.nvidia))[tool], "default_path", str(tmp_path / "none"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, launch = next(iter(kernels._launches()))
    with pytest.raises(Missing, match="Cannot find ptxas"):
        compile_for(launch, 90)


def test_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 3
    assert "no CUDA device: the kernels cannot be timed. --offline" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.main(["--offline"]) == 3
    assert "unset it" in capsys.readouterr().err

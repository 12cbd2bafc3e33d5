"""The command for a GPU: every part tried without one, and what it says and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.tools.bench import gpu
from graphwright.tools.bench.gpu_setting import Row, Setting

PARTS = {"correct", "bandwidth", "kernels", "decode", "prefill", "onnxruntime"}


def test_every_part_runs_dry(tmp_path: Path) -> None:
    """In a process of its own: triton takes the interpreter at import."""
    # The bench is of the checkout: the installed package has none.
    code = (
        "import sys, graphwright.tools\n"
        "graphwright.tools.__path__.append(sys.argv.pop(1))\n"
        "from graphwright.tools.bench.gpu import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    tools = str(Path(__file__).resolve().parents[3] / "tools")
    command = [sys.executable, "-c", code, tools, str(tmp_path), "--dry"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, (record, done.stderr[-4000:])
    assert set(record["parts"]) == PARTS and record["machine"]["dry"]
    assert all(entry["rows"] for entry in record["parts"].values())
    named = {row["kernel"] for row in record["parts"]["correct"]["rows"]}
    assert named >= {"linear_bitstack", "linear_nbit", "rope", "token_scores", "token_select"}
    ratios = [row["image tokens"] for row in record["parts"]["prefill"]["rows"]]
    assert ratios == sorted(ratios, reverse=True)
    assert (tmp_path / "gpu.md").read_text() == done.stdout and "| tokens/s |" in done.stdout


def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 3
    message = capsys.readouterr().err
    assert "torch sees no CUDA device" in message and "--dry tries every part" in message
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_is_told_and_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> list[Row]:
        raise RuntimeError("no kernel image")

    parts = {"first": fails, "second": lambda _: [{"ms": 1.23456}]}
    monkeypatch.setattr(gpu, "parts", lambda: parts)
    setting = Setting(torch.device("cpu"), dry=True)
    text = gpu.table(gpu.run(setting))
    assert "failed: RuntimeError: no kernel image" in text and "| 1.235 |" in text
    late = gpu.run(Setting(torch.device("cpu"), dry=False), seconds=0)
    assert set(late["parts"]["second"]) == {"skipped"}

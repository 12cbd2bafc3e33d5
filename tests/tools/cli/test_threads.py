"""Threads of the command: those that wait sleep, and a share of a core gets one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from graphwright.tools.cli import threads


def write_quota(folder: Path, text: str) -> Path:
    path = folder / "cpu.max"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "share"), [("max 100000", None), ("50000 100000", 0.5), ("250000 100000\n", 2.5)]
)
def test_share_of_a_control_group(tmp_path: Path, text: str, share: float | None) -> None:
    assert threads.core_share(write_quota(tmp_path, text)) == share


def test_share_of_an_older_control_group(tmp_path: Path) -> None:
    absent = tmp_path / "cpu.max"
    assert threads.core_share(absent, tmp_path) is None
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    for quota, share in (("-1\n", None), ("150000\n", 1.5)):
        (tmp_path / "cpu.cfs_quota_us").write_text(quota)
        assert threads.core_share(absent, tmp_path) == share


@pytest.mark.parametrize(("share", "expected"), [(None, None), (0.5, "1"), (2.5, "2"), (8.0, None)])
def test_no_more_threads_than_cores_are_granted(
    monkeypatch: pytest.MonkeyPatch, share: float | None, expected: str | None
) -> None:
    for name in (*threads.WAITING, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what the call sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "core_share", lambda: share)
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    threads.share_the_cores()
    assert os.environ.get("OMP_NUM_THREADS") == expected
    assert {name: os.environ[name] for name in threads.WAITING} == threads.WAITING


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "core_share", lambda: 0.5)
    threads.share_the_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and os.environ["OMP_NUM_THREADS"] == "3"


def test_it_is_in_time() -> None:
    """The command's module loads no torch, which loads OpenMP."""
    code = (
        "import os, sys\n"
        "from graphwright.tools.cli import main as cli\n"
        "before = 'torch' in sys.modules\n"
        "cli.app = lambda *args, **options: print(before, os.environ['OMP_WAIT_POLICY'])\n"
        "cli.main(['passes'])"
    )
    environ = {n: v for n, v in os.environ.items() if n not in threads.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "PASSIVE"], done.stderr

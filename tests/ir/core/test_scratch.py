"""Temporary folders: they go with their owner, and with the next process where that was killed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
from graphwright.ir.core.scratch import PREFIX, Scratch, sweep


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep.cache_clear()
    return tmp_path


def test_a_folder_goes_with_its_owner(temporary: Path) -> None:
    with Scratch("a") as folder:
        (folder / "file").write_text("x")
        assert folder.name.startswith(f"{PREFIX}a-") and folder.parent == temporary
    held = Scratch("b")
    assert held.path.is_dir()
    held.close()
    held.close()
    dropped = Scratch("c")
    del dropped
    gc.collect()
    assert list(temporary.iterdir()) == []


def _killed() -> None:
    held = Scratch("killed")
    (held.path / "file").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(temporary: Path) -> None:
    (temporary / "graphwright-work").mkdir()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "graphwright-work")
    with Scratch("mine") as mine:
        child = multiprocessing.get_context("fork").Process(target=_killed)
        child.start()
        child.join()
        assert len(list(temporary.glob(f"{PREFIX}killed-*"))) == 1
        sweep.cache_clear()
        sweep()
        names = {path.name for path in temporary.iterdir()}
        assert names == {mine.name, "graphwright-work", f"{PREFIX}link"}

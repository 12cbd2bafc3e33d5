"""One run at a time in an output's place, and what a killed one left is put right."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from graphwright.backends.artifacts import claim
from graphwright.backends.artifacts.artifact import publish
from graphwright.backends.artifacts.claim import claimed, partial_folder
from graphwright.ir.core.errors import BadInput


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An artifact that is there already."""
    with publish(tmp_path / "out") as folder:
        (folder / "graphwright.json").write_text("{}")
        (folder / "model.onnx").write_text("old")
    return tmp_path / "out"


def test_a_second_run_is_refused_and_harms_nothing(out: Path) -> None:
    messages: list[str] = []

    def other() -> None:
        with pytest.raises(BadInput) as caught, publish(out):
            raise AssertionError("published")
        messages.append(str(caught.value))

    with publish(out) as folder:
        (folder / "model.onnx").write_text("new")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        child = multiprocessing.get_context("fork").Process(target=other)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert (folder / "model.onnx").read_text() == "new"
    assert messages == [
        f"{out}: another run is writing there; wait until it ends, or choose another --out"
    ]
    assert (out / "model.onnx").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_claim_may_be_taken_again_inside(out: Path) -> None:
    with claimed(out) as first, claimed(out) as again:
        assert first == again == partial_folder(out)
    assert not first.exists()


def _dies(out: Path, point: int) -> None:
    """Publish, and be killed before the ``point``-th operation on files."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with publish(out) as folder:
        (folder / "graphwright.json").write_text("{}")
        (folder / "model.onnx").write_text("new")
    os._exit(0)


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_operation_the_next_run_goes_on(
    out: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``out`` is the old or the new one whenever the next run has begun; nothing else is left."""
    if not exchange:
        monkeypatch.setattr(claim, "_exchanged", lambda a, b: False)
    absent, texts, point = 0, set(), 0
    while True:
        point += 1
        child = multiprocessing.get_context("fork").Process(target=_dies, args=(out, point))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        absent += not out.exists()
        with claimed(out):
            texts.add((out / "model.onnx").read_text())
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        with publish(out) as folder:
            (folder / "graphwright.json").write_text("{}")
            (folder / "model.onnx").write_text("old")
    assert point > 10 and texts == {"old", "new"}
    assert absent == (0 if exchange else 1)


def test_without_an_exchange_an_interrupted_switch_is_undone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_exchanged", lambda a, b: False)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), publish(out):
        pass
    assert (out / "model.onnx").read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_readers_see_one_artifact_or_the_other(out: Path) -> None:
    """Two hundred switches under a reader that opens the folder once and reads two files of it."""
    torn, reads, over = [], 0, threading.Event()

    def read() -> None:
        nonlocal reads
        while not over.is_set():
            folder = os.open(out, os.O_RDONLY)
            texts = []
            for name in ("model.onnx", "graphwright.json"):
                try:
                    file = os.open(name, os.O_RDONLY, dir_fd=folder)
                except FileNotFoundError:  # the folder has been removed meanwhile, as a whole
                    continue
                texts.append(os.read(file, 9))
                os.close(file)
            os.close(folder)
            torn.extend([texts] if len(set(texts)) > 1 else [])
            reads += 1

    with publish(out) as folder:
        for name in ("model.onnx", "graphwright.json"):
            (folder / name).write_text("0")
    thread = threading.Thread(target=read)
    thread.start()
    for number in range(200):
        with publish(out) as folder:
            for name in ("model.onnx", "graphwright.json"):
                (folder / name).write_text(str(number))
    over.set()
    thread.join()
    assert not torn and reads

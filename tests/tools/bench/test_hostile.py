"""The campaign on damaged files: a seed makes the same case again, and a fault is seen as one."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from random import Random

import onnx
import pytest
from graphwright.ir.core.heap import set_aside
from graphwright.tools.bench import (
    hostile,
    hostile_mutations,
    hostile_sources,
    hostile_worker,
    onnx_causes,
)
from graphwright.tools.bench.hostile_worker import Ended, command, forked


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    hostile.prepare(folder)
    return folder


def test_cases_are_run_and_counted(valid: Path, tmp_path: Path) -> None:
    kinds = ("kill", "recipe", "manifest", "npz")
    cases = [hostile.run_case(kind, 0, valid, tmp_path / kind) for kind in kinds]
    assert [case.fault for case in cases] == [""] * 4
    assert hostile.table(cases).row_count == 5


def test_a_seed_is_a_case(valid: Path) -> None:
    content = (valid / "llama" / "model.safetensors").read_bytes()
    files = [hostile_mutations.safetensors(Random(3), content) for _ in range(2)]
    other = hostile_mutations.safetensors(Random(4), content)
    assert files[0] == files[1] != content != other != files[0]
    archive = (valid / "data.npz").read_bytes()
    assert hostile_mutations.archive(Random(5), archive) != archive
    assert hostile_mutations.text(Random(6), "a{b=1}") != "a{b=1}"
    graphs = []
    for seed in (7, 7, 8):
        model = onnx.load(valid / "m.onnx")
        hostile_mutations.message(Random(seed), model)
        graphs.append(model.SerializeToString())
    assert graphs[0] == graphs[1] != graphs[2]


@pytest.mark.parametrize(
    ("status", "output", "start"),
    [
        (0, "", ""),
        (2, "error: m.onnx: no", ""),
        (2, "", "exit 2: "),
        (1, "a\nerror: internal error: KeyError: 'x'\n  hint", "error: internal error: KeyError"),
        (1, "Traceback (most recent call last):", "Traceback"),
        (2, "error: \x1b[31mred", "an escape sequence was printed"),
        (5, "x", "exit 5: x"),
        (-signal.SIGSEGV, "x", "signal 11: a crash: x"),
    ],
)
def test_what_is_a_fault(status: int, output: str, start: str) -> None:
    message = hostile.fault(Ended(status, output, seconds=1.0, peak_rss=0))
    assert message.startswith(start) and bool(message) == bool(start)


def test_time_and_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_worker, "SECONDS", 0.2)
    endless = forked(tmp_path, lambda: signal.pause() or 0)
    assert endless.status == -signal.SIGKILL and endless.late

    def busy() -> int:
        while True:
            pass

    monkeypatch.setattr(hostile_worker, "PATIENCE", 1000)
    turning = forked(tmp_path, busy)
    assert turning.status == -signal.SIGXCPU and turning.late and turning.seconds > 0.5

    def large() -> int:
        try:
            # Twice: what a large worker of a test run lets go of meanwhile makes room.
            bytearray(2 * hostile_worker.MEMORY)
        except MemoryError:
            return 7
        return 0

    monkeypatch.setattr(hostile_worker, "SECONDS", 60)
    assert forked(tmp_path, large).status == 7


def test_what_the_parent_held_is_not_destroyed_in_the_child(tmp_path: Path) -> None:
    """A session of the runtime waits there for threads that the child has not."""

    class Session:
        def __init__(self) -> None:
            self.itself = self
            self.owner = os.getpid()

        def __del__(self) -> None:
            if os.getpid() != self.owner:
                os._exit(9)

    def work() -> int:
        with set_aside():  # as the command does
            pass
        gc.collect()
        return 0

    gc.disable()
    try:
        Session()
        assert forked(tmp_path, work).status == 0
    finally:
        gc.enable()
        gc.collect()


def test_a_wrong_result_is_seen(valid: Path, tmp_path: Path) -> None:
    arguments = [str(valid / "m.onnx"), "-p", "clean{optional=true}", "-o", "out"]
    assert command(tmp_path, arguments).status == 0
    written = tmp_path / "work" / "out" / "model.onnx"
    assert hostile_sources.wrong(valid / "m.onnx", written, 1e-3) == ""
    other = onnx.load(valid / "m.onnx")
    weight = onnx.numpy_helper.to_array(other.graph.initializer[0])
    other.graph.initializer[0].raw_data = (2 * weight).tobytes()
    onnx.save(other, tmp_path / "m.onnx")
    assert "(relative L2) from the source" in hostile_sources.wrong(
        tmp_path / "m.onnx", written, 1e-3
    )
    (tmp_path / "m.onnx").write_bytes(b"no model")
    assert hostile_sources.wrong(tmp_path / "m.onnx", written, 1e-3) == ""


def test_a_file_of_each_cause_is_made_and_one_goes_through(valid: Path, tmp_path: Path) -> None:
    every = onnx_causes.cases()
    assert all(len(case.model().SerializeToString()) > 1000 for case in every.values())
    name = "B8: Squeeze of an open dimension"
    _, status, sites, distance = onnx_causes.row(name, every[name], tmp_path / "case")
    assert (status, sites) == ("0", "1, 0") and 1e-4 < float(distance) < 0.02

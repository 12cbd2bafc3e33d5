"""``--resume``: a run that was killed goes on, ends with the same bytes, and refuses another's."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from graphwright.backends.artifacts.claim import partial_folder
from graphwright.backends.onnx.model_files import MODEL_FILES
from graphwright.ir.core.errors import BadInput, DiskFull
from graphwright.ir.core.weights import FileWeight, MemoryWeight, Spool
from graphwright.passes.checkpoint_store import Under, remembered, settled
from graphwright.passes.recipe import Recipe
from graphwright.tools.evaluate.task import silent
from graphwright.tools.report import manifest
from graphwright.tools.run import pipeline
from graphwright.tools.run.resume import FolderStore, remembering

MARKS = {"model": "a" * 64, "recipe": "hqq", "calibration data": "", "version": "torch 1"}

RECIPE = (
    "hqq{bits=3 group=16 kinds=[q k v o]},bitstack{blocks=2 rank=2 kinds=[gate up down]},"
    "drop-blocks{count=1},eora{rank=3}"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked process has no threads of this one, and the number of them is in EoRA's bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def killed(model: Path, function: str, at: int) -> None:
    """Go on with the run in a process of its own, until the function is called for the ``at``-th
    time: that kills the process."""
    module, _, name = function.rpartition(".")
    home = importlib.import_module(module)
    inner, calls = getattr(home, name), []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **options)

    def run() -> None:
        setattr(home, name, dying)
        pipeline.run(request(model, "out", resume=True), silent)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def request(
    model: Path, out: str, recipe: str = RECIPE, *, resume: bool = False
) -> pipeline.Request:
    return pipeline.Request(
        str(model), Recipe.parse(recipe), Path(out), calibration="data.jsonl",
        calibration_length=24, resume=resume,
    )  # fmt: skip


def finished(
    model: Path, out: str, recipe: str = RECIPE, *, resume: bool = False, stop: Any = ()
) -> dict[str, int]:
    """Run to the end, or to Ctrl-C at ``stop``, a function's n-th call; how often each slow
    function was called."""
    calls = dict.fromkeys(SLOW, 0)
    with pytest.MonkeyPatch.context() as patch:
        for function in SLOW:
            module, _, name = function.rpartition(".")
            home = importlib.import_module(module)
            patch.setattr(home, name, _counting(getattr(home, name), calls, function, stop))
        pipeline.run(request(model, out, recipe, resume=resume), silent)
    return calls


def _counting(inner: Any, calls: dict[str, int], name: str, stop: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        if (name, calls[name]) == stop:
            raise KeyboardInterrupt
        return inner(*arguments, **options)

    return call


HQQ, STACK, SCORE, FIT = SLOW = (
    "graphwright.passes.weights.hqq.hqq", "graphwright.passes.weights.bitstack.decompose",
    "graphwright.passes.learning._at_units", "graphwright.passes.weights.eora.spectrum",
)  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{i} is the number of this line of plain text. " * 9})
             for i in range(6)]  # fmt: skip
    Path("data.jsonl").write_text("\n".join(lines))
    folder = Path("out.partial")
    with pytest.raises(KeyboardInterrupt):
        finished(language_model, "out", stop=(HQQ, 3))
    assert len(list(folder.glob("*.result"))) == 3  # the source's outputs, two matrices
    killed(language_model, FIT, 3)
    assert not Path("out").exists() and not list(folder.glob("*.new"))

    (folder / "lock").unlink()  # of the process that was killed
    kept = sorted(path.name for path in folder.iterdir())
    with pytest.raises(BadInput, match=r"another recipe: it had hqq\{bits=3 group=16 kinds=\[q"):
        finished(language_model, "out", "hqq{bits=3 group=16}", resume=True)
    Path("data.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(BadInput, match="is of a run with another calibration data: it had"):
        finished(language_model, "out", resume=True)
    Path("data.jsonl").write_text("\n".join(lines))
    assert sorted(path.name for path in folder.iterdir()) == kept

    # Of the two blocks one is left: seven matrices to correct, two of which were.
    assert finished(language_model, "out", resume=True) == {HQQ: 0, STACK: 0, SCORE: 0, FIT: 5}
    assert not folder.exists()
    assert finished(language_model, "whole") == {HQQ: 8, STACK: 6, SCORE: 1, FIT: 7}
    for name in MODEL_FILES:
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    assert stable("out") == stable("whole")


def stable(folder: str) -> Any:
    return manifest.stable(manifest.load(folder).to_json())


# --- marks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MARKS))
def test_every_mark_counts(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), remembering(out, MARKS) as memory:
        assert memory is not None
        memory.keep("a", 1)
        raise KeyboardInterrupt
    message = f"of a run with another {name}: it had .*, this one has x"
    other = {**MARKS, name: "x"}
    with pytest.raises(BadInput, match=message), remembering(out, other, resume=True):
        raise AssertionError
    with remembering(out, MARKS, resume=True) as memory:
        assert memory is not None and memory.recall("a") == 1
    assert not partial_folder(out).exists()


def test_without_resume_a_run_starts_anew(tmp_path: Path) -> None:
    FolderStore(tmp_path / "out.partial", MARKS).keep("a", 1)
    with remembering(tmp_path / "out", MARKS) as memory:
        assert memory is not None
        with pytest.raises(KeyError):
            memory.recall("a")


def test_an_error_that_a_person_is_told_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput), remembering(tmp_path / "out", MARKS) as memory:
        assert memory is not None
        memory.keep("a", 1)
        raise BadInput("no")
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_an_artifact_to_go_on_with() -> None:
    with remembering(None, MARKS) as memory:
        assert memory is None
    with pytest.raises(BadInput, match="give its -o"), remembering(None, MARKS, resume=True):
        raise AssertionError


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    for resume in (False, True):
        refused = pytest.raises(BadInput, match=r"out\.partial is in the way")
        with refused, remembering(tmp_path / "out", MARKS, resume=resume):
            raise AssertionError
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_left_of_a_state_is_no_state(tmp_path: Path, resume: bool) -> None:
    """Killed while it was made or removed: no marks, or half of them."""
    memory = FolderStore(tmp_path / "out.partial", MARKS)
    memory.keep("a", 1)
    (memory.folder / "run.json").rename(memory.folder / "run.json.new")
    with remembering(tmp_path / "out", MARKS, resume=resume) as memory:
        assert memory is not None
        with pytest.raises(KeyError):
            memory.recall("a")
        memory.keep("a", 2)
    assert list(tmp_path.iterdir()) == []


def test_damaged_state_is_told(tmp_path: Path) -> None:
    memory = FolderStore(tmp_path / "out.partial", MARKS)
    memory.keep("a", {"x": torch.ones(3)})
    (file,) = memory.folder.glob("*.result")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInput, match=r"damaged .*or run without --resume"):
        memory.recall("a")
    (memory.folder / "run.json").write_text("{")
    refused = pytest.raises(BadInput, match="damaged; remove it, or run without --resume")
    with refused, remembering(tmp_path / "out", MARKS, resume=True):
        raise AssertionError


def test_numbers_that_changed_on_disk_are_told(tmp_path: Path) -> None:
    FolderStore(tmp_path / "state", MARKS).keep("a", {"none": torch.ones(0), "x": torch.ones(3)})
    (file,) = (tmp_path / "state").glob("*.result")
    assert torch.equal(FolderStore(tmp_path / "state", MARKS).recall("a")["x"], torch.ones(3))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"damaged \(a checksum is wrong\)"):
        FolderStore(tmp_path / "state", MARKS).recall("a")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFull, match="ran full"):
        FolderStore(tmp_path / "out.partial", MARKS).keep("a", 1)


# --- results -------------------------------------------------------------------------------------


def test_results_come_back_bit_by_bit_and_are_made_once(tmp_path: Path) -> None:
    whole = torch.randn(5, 7, dtype=torch.float64)
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {
            "column": whole[:, 2:3], "row": whole[1], "turned": whole.T, "none": None, "n": 0.1,
            "list": [whole.to(torch.bfloat16), 3, "text", (torch.tensor(4, dtype=torch.uint16),)],
        }  # fmt: skip

    memory = FolderStore(tmp_path / "state", MARKS)
    first, again = (remembered(memory, "key", make) for _ in range(2))
    assert len(calls) == 1 and remembered(memory, "other", make)["n"] == 0.1 and len(calls) == 2
    alone = remembered(None, "key", make)
    for state in (first, again, alone):
        assert list(state) == list(make()) and state["none"] is None and state["n"] == 0.1
        for name in ("column", "row", "turned"):
            assert torch.equal(state[name], make()[name]) and state[name].is_contiguous()
            assert state[name].untyped_storage().nbytes() == 8 * state[name].numel()
        assert state["list"][0].dtype == torch.bfloat16
        assert state["list"][1:3] == [3, "text"] and int(state["list"][3][0]) == 4


def test_parts_of_a_store_share_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, {})
    one, other = Under(store, "w4"), Under(store, "w8")
    assert (remembered(one, "1: outputs", lambda: 1), remembered(other, "1: outputs", lambda: 2)) \
        == (1, 2)  # fmt: skip
    assert remembered(one, "1: outputs", lambda: 3) == 1
    with pytest.raises(KeyError):
        store.recall("1: outputs")


def test_settled_leaves_what_is_settled() -> None:
    tensor = torch.randn(3, 5)
    assert settled(tensor) is tensor and settled({"a": [tensor]})["a"][0] is tensor


def test_a_spool_takes_over_what_is_kept(tmp_path: Path) -> None:
    memory = FolderStore(tmp_path / "state", MARKS)
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    tensors = {"codes": codes, "none": torch.zeros(0, 4)}
    kept = remembered(memory, "key", lambda: tensors)
    weight, empty = Spool().store(kept["codes"]), Spool().store(kept["none"])
    assert isinstance(weight, FileWeight) and weight.path.parent == memory.folder
    assert torch.equal(weight.read(), codes) and empty.shape == (0, 4)
    assert isinstance(Spool().store(kept["codes"][:2]), MemoryWeight)

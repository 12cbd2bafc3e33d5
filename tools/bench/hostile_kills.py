"""Runs that are killed at an operation on files, and artifacts that are read while replaced."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from ...backends.onnx.model_files import MODEL_FILES
from ...ir.core.errors import GraphwrightError
from .hostile_worker import Ended, command, forked

EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
RECIPE = "hqq{bits=4 group=32}"
READS = 60


def kills(rng: Random, valid: Path, case: Path) -> str:
    """Kill a run that replaces an artifact before one of its operations on files; then the folder
    holds the old or the new one, a run with ``--resume``, and a run without, end with the new
    one's bytes, and nothing else is left."""
    model = str(valid / "m.onnx")
    run = [model, "-p", RECIPE, "-o", "out"]
    work, counted = case / "work", case / "count"
    for name in ("whole", "out"):
        shutil.copytree(valid / "made", work / name)
    whole = command(case, [model, "-p", RECIPE, "-o", "whole"], _dying(-1, counted))
    if whole.status:
        return f"the run that is not killed: {whole.output}"
    point = rng.randint(1, int(counted.read_text()))
    for more in (["--resume"], []):
        shutil.rmtree(work / "out")
        shutil.copytree(valid / "made", work / "out")
        killed = command(case, run, _dying(point, counted))
        if killed.status != -signal.SIGKILL:
            return f"operation {point} was not reached: {killed.status}"
        if _hash(work / "out") not in (_hash(valid / "made"), _hash(work / "whole")):
            return f"killed at operation {point}: out is neither the old nor the new one"
        problem = _after(command(case, [*run, *more]), case)
        if problem:
            return f"killed at operation {point}, then a run {' '.join(more)}: {problem}"
    return ""


def _after(again: Ended, case: Path) -> str:
    """What is not as it should be after the run that follows a kill."""
    work = case / "work"
    if again.status:
        return f"exit {again.status}: {again.output[-200:]}"
    if _hash(work / "out") != _hash(work / "whole"):
        return "other bytes"
    names = [p.name for p in (*work.iterdir(), *(case / "tmp").iterdir())]
    extra = sorted({*names} - {"out", "whole"})
    return f"left: {', '.join(extra)}" if extra else ""


def _hash(folder: Path) -> str:
    """Of the model's files; empty where one is not there."""
    files = [folder / name for name in MODEL_FILES]
    if not all(file.is_file() for file in files):
        return ""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _dying(point: int, counted: Path) -> Callable[[], None]:
    """Kills the process before the operation of this number; their number goes into a file."""

    def install() -> None:
        output = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            writes = event == "open" and len(args) > 2 and bool(int(str(args[2])) & os.O_ACCMODE)
            if not writes and event not in EVENTS:
                return
            count += 1
            os.pwrite(output, str(count).encode(), 0)
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def readers(rng: Random, valid: Path, case: Path) -> str:
    """Load an artifact and read its weights while two others take its place in turns: each time
    they are all of one, or there is an error message."""
    from ...backends.artifacts.artifact import publish
    from ...ir.load.sources import load

    work = case / "work"
    for bits in (4, 8):
        recipe = f"quantize{{bits={bits} group=32}}"
        outcome = command(case, [str(valid / "m.onnx"), "-p", recipe, "-o", str(bits)])
        if outcome.status:
            return outcome.output
    out = work / "out"
    shutil.copytree(work / "4", out)

    def weights(folder: Path) -> str:
        digest = hashlib.sha256()
        for weight in load(folder).weights().values():
            digest.update(weight.read().numpy().tobytes())
        return digest.hexdigest()

    def replacing() -> int:
        while True:
            for bits in ("8", "4"):
                with publish(out) as folder:
                    for file in (work / bits).iterdir():
                        shutil.copy(file, folder)

    known = {weights(work / "4"), weights(work / "8")}
    writer = os.fork()
    if writer == 0:
        try:
            replacing()
        finally:
            os._exit(1)

    def reading() -> int:
        torn = 0
        for _ in range(READS):
            try:
                torn += weights(out) not in known
            except GraphwrightError:
                continue
        print(f"{torn} of {READS} reads mixed two artifacts" if torn else "")
        return 0

    try:
        ended = forked(case, reading)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    return ended.output.strip() if ended.status in (0, 1) else f"a reader ended with {ended.status}"

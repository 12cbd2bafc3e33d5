"""``memory``: what a model takes on disk, and in a process that loads it and runs it once."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.core.heap import peak_rss_bytes, status_bytes
from ...ir.core.scratch import Scratch
from .latency import inputs_of
from .subject import Subject
from .task import EvalResult, Setting, Task

PROCESSES = 3
_CHILD = "from graphwright.tools.evaluate.memory import child; child()"


class Memory(Task):
    """Resident memory and bytes on disk.

    ``peak_bytes`` is the peak resident memory of a fresh process that imports torch and the
    backend, loads the model and runs it once on a batch of the given size and length;
    ``model_bytes`` is the part above what the imports alone took; ``disk_bytes`` the weights on
    disk. A sample is a process (3); the figures are medians and the interval is their range. A
    graph in memory is written out and measured in ONNX Runtime. A compiled executable cannot move
    to another process: ``peak_bytes`` is then that of this process while it runs once, all else
    that lives here included. Read from ``/proc`` (Linux).
    """

    name = "memory"
    headlines: ClassVar = {"peak_bytes": "lower", "disk_bytes": "lower"}
    quality = False

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        if status_bytes("VmHWM") is None:
            raise Missing("memory is read from /proc/self/status, which this system does not have")
        inputs_of(subject, setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        results = []
        for number, subject in enumerate(subjects):
            setting.progress(f"{self.name} of {subject.name}", number, len(subjects))
            results.append(self._judge(subject, setting))
        return results

    def _judge(self, subject: Subject, setting: Setting) -> EvalResult:
        inputs = inputs_of(subject, setting)
        shapes = {name: list(t.shape) for name, t in inputs.items()}
        disk = {} if subject.bytes is None else {"disk_bytes": float(subject.bytes)}
        place = subject.on_disk()
        if place is None:
            peak = _peak_here(subject, inputs)
            detail = {"shapes": shapes, "process": "this one"}
            return EvalResult(self.name, {"peak_bytes": peak} | disk, {}, 1, "runs", detail)
        measured = [_measured(place, inputs) for _ in range(PROCESSES)]
        figures, interval = {}, {}
        for name in ("peak_bytes", "model_bytes"):
            values = [m[name] for m in measured]
            figures[name] = float(statistics.median(values))
            interval[name] = (float(min(values)), float(max(values)))
        detail = {"shapes": shapes, "process": "a fresh one", "backend": place[0]}
        return EvalResult(self.name, figures | disk, interval, PROCESSES, "processes", detail)


def _measured(place: tuple[str, str], inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes that a fresh process reports."""
    with Scratch("memory") as folder:
        file = folder / "inputs.pt"
        torch.save(inputs, file)
        # -P: the working folder may hold modules whose names hide installed ones.
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, *place, str(file)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise BadInput(
            f"memory: a fresh process cannot run {place[1]}: {lines[-1] if lines else 'no message'}"
        )
    sizes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def child() -> None:
    """Load and run once what ``sys.argv`` names; print the bytes as JSON. The child's entry."""
    name, target, inputs_file = sys.argv[1:]
    from ...backends import compile as compile_model
    from ...backends import find_backend
    from ...ir.load.sources import load

    backend = find_backend(name)
    if backend.library:
        importlib.import_module(backend.library)
    inputs = torch.load(inputs_file, weights_only=True)
    before = status_bytes("VmRSS") or 0
    source: Any = Path(target) if backend.runs_artifacts else load(target, cache=False)
    executable = compile_model(source, backend=name)
    executable(**{name: inputs[name] for name in executable.input_names if name in inputs})
    peak = peak_rss_bytes()
    print(json.dumps({"peak_bytes": peak, "model_bytes": max(0, peak - before)}))


def _peak_here(subject: Subject, inputs: dict[str, torch.Tensor]) -> float:
    """The peak of this process during one run. Writing 5 resets the kernel's high-water mark."""
    Path("/proc/self/clear_refs").write_text("5")
    subject.run(inputs)
    return float(peak_rss_bytes())

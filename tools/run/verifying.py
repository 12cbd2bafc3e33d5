"""How a run's result is judged: by the source itself, and by the artifact in the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...backends import compile as compile_model
from ...backends import find_backend
from ...backends.artifacts.judging import Judge, check_artifact, checkable
from ...backends.onnx.model_files import MODEL_FILE
from ...backends.registry import DEFAULT
from ...backends.runtimes.original import give_original
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.run.batches import count_samples
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Reference, Truth, ask_source
from ...ir.run.verify import worst_of
from ...ir.structure.cache_slots import answers
from ...passes.checked_run import Result
from ..data.calibration import Calibration
from ..report.manifest import ErrorEntry, OutputEntry, RuntimeEntry, VerificationEntry

CHECKED_TOKENS = 256
"""Tokens of a calibration batch, at most, that checks run on: the first rows of it. Whole batches
took two thirds of a calibrated run, and gigabytes of logits, for the same figures."""

WIDENED = (
    "the artifact computes in bfloat16, which ONNX Runtime's CPU provider does not: it was checked "
    "with float32 in its place, and runs on a GPU alone"
)
Progress = Callable[[str, int, int], None]


def ask(view: View, data: Calibration | None, progress: Progress) -> Truth:
    """What the source itself gives, on its samples; else on calibration data or random inputs."""
    if data is not None and not view.source.samples:
        # Better than random inputs, which hold no image where a prompt needs one.
        view.source.samples = [_shorter(batch) for batch in data.batches[:2]]
    give_original(view)
    progress("running the source", 0, 1)
    return ask_source(view, view.source.samples or [sample_inputs(view)])


def _shorter(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its first rows, ``CHECKED_TOKENS`` or one row. A batch of images is left whole: they are not
    in the order of the rows."""
    ids = batch.get("input_ids")
    if ids is None or any(tensor.shape[:1] != ids.shape[:1] for tensor in batch.values()):
        return dict(batch)
    if "pixel_values" in batch:
        return dict(batch)
    rows = max(1, CHECKED_TOKENS // ids.shape[1])
    return {name: tensor[:rows] for name, tensor in batch.items()}


def verify(
    checks: VerificationEntry, source: View, result: Result, folder: Path, *, device: str,
    backend: str, progress: Progress,
) -> list[str]:  # fmt: skip
    """Run the artifact in ONNX Runtime, and the graph in another ``backend`` if one is named; note
    in ``checks`` how far they are from the rewritten graph and from the source.

    What ``optimize`` has computed is not computed again: ``result`` holds the rewritten graph's
    outputs. Gives what a person should know of how it was run. Raises ``BoundExceeded`` where a
    result is not what it should be.
    """
    known = source.source.samples or result.batches
    batches = checkable(folder, known)
    same = batches is known
    reference = Reference(source, batches, result.truth if same else Truth())
    judge = Judge(result.graph, batches, reference, result.outputs[0] if same else None)
    outcome = check_artifact(folder, result.graph, judge, device=device, progress=progress)
    for name, figures in outcome.to_dict().items():
        setattr(checks.runtime, name, ErrorEntry(**figures))
    checks.prepacked = outcome.prepacked
    outputs = outcome.outputs or [answers(row) for row in result.outputs]
    errors = worst_of(reference.outputs[: len(outputs)], outputs, shortened=True)
    checks.outputs = [OutputEntry(name=name, **d.to_dict()) for name, d in errors.items()]
    checks.samples = count_samples(batches[: len(outputs)])
    notes = [WIDENED] if outcome.widened else []
    if backend == DEFAULT:
        return notes
    progress(f"running it in {backend}", 0, 1)
    whole = find_backend(backend).runs_artifacts
    model = folder / MODEL_FILE if whole else judge.plain
    executable = compile_model(model, backend=backend, device=device)
    actual = [_on_cpu(executable(**inputs)) for inputs in judge.inputs]
    judged = judge.judge_rounded if whole else judge.judge
    error = judged(actual, backend, "Use --backend onnxruntime")
    checks.runtime.backends[backend] = ErrorEntry(**error.to_dict())
    return notes


def _on_cpu(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def check_backend_name(name: str) -> None:
    """Raises ``BadInput`` for a backend whose error would stand where ONNX Runtime's does."""
    if name in RuntimeEntry.model_fields:
        raise BadInput(
            f"a backend cannot be named {name}: the manifest holds ONNX Runtime's own error under "
            "that name. Register it under another one"
        )

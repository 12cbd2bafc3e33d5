"""What ``optimize-model MODEL`` does: load, rewrite, export, verify in the runtime, publish."""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...backends import artifact, find_backend
from ...backends.fx_to_onnx import TRANSLATION_KEY
from ...backends.lowering import lowered
from ...backends.registry import DEFAULT
from ...ir.core.errors import BadInput, BoundExceeded
from ...ir.core.heap import give_back, set_aside
from ...ir.core.view import Node, View
from ...ir.load.sources import fingerprint, load
from ...ir.onnx.view import OnnxView
from ...ir.run.batches import count_samples
from ...ir.run.sweep import sweep
from ...ir.run.verify import Difference, tolerance
from ...ir.structure.cache_slots import answers, has_cache, next_step
from ...passes.base import Pass, PassResult
from ...passes.manager import Plan, Result, Samples, optimize, peak_rss_bytes, plan, worst_of
from ...passes.recipe import Recipe
from ...passes.report import versions
from ..data.calibration import Calibration
from ..data.calibration import read as read_calibration
from ..report import manifest
from ..report.manifest import (
    BeforeAfterEntry,
    ErrorEntry,
    ForecastEntry,
    MachineEntry,
    Manifest,
    OutputEntry,
    PassEntry,
    RefusalEntry,
    RuntimeEntry,
    SiteEntry,
    SizesEntry,
    SourceEntry,
    VerificationEntry,
)
from ..report.module_tree import module_tree
from . import report
from .resume import remembering

RUNTIME_REL_L2 = 1e-4
"""Relative L2 between the artifact in ONNX Runtime and the reference interpreter that passes: float
sums in another order over a few hundred layers stay below 1e-5. Half types round more: theirs is
the tolerance of ``ir.run.verify``."""
RUNTIME_SLACK_INT8 = 1.5
"""With ``accuracy_level=4`` activations are rounded to 8 bits, and a sum in another order turns a
rounding here and there, which the layers after it amplify until the two runs' roundings have little
in common. There the artifact may be this much farther from the source than the reference is."""

REPACKED_BYTES = 1 << 29
"""Largest artifact whose check always lets ONNX Runtime repack the weights, as it does by default:
a copy of them in memory. Larger ones are checked on weights that stay in their file, and the
manifest says so, unless an op rounds activations: there the two differ by that rounding."""

CHECKED_TOKENS = 256
"""Tokens of a calibration batch, at most, that checks run on: the first rows of it. Whole batches
took two thirds of a calibrated run, and gigabytes of logits, for the same figures."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """One run of ``optimize-model``."""

    model: str
    recipe: Recipe
    out: Path | None
    max_error: float | None = None
    device: str = "cpu"
    force: bool = False
    trust_remote_code: bool = False
    verify_samples: int = 256
    calibration: str = ""
    """Data for the passes that learn from some: see ``calibration.FORMS``."""
    calibration_samples: int | None = None
    calibration_length: int | None = None
    resume: bool = False
    """Whether to go on with a run that was killed: see ``resume``."""
    calibration_sha256: str = ""
    """Where given, data of any other hash is refused."""
    backend: str = DEFAULT
    """Another one also runs the result; the artifact is ONNX Runtime's either way."""
    cache: bool | None = None
    """Whether a zoo or Hugging Face model gets its key-value cache as inputs and outputs; ``None``:
    if it writes text."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks that judge the source and the artifact, both in ONNX Runtime."""

    def __post_init__(self) -> None:
        amounts = {
            "--calib-samples": self.calibration_samples, "--calib-length": self.calibration_length
        }  # fmt: skip
        given = [option for option, amount in amounts.items() if amount is not None]
        if given and not self.calibration:
            raise BadInput(f"{given[0]} says how much of --calib is used: give --calib DATA too")


def dry_run(request: Request) -> Manifest:
    """The forecast of a run as a manifest; weights may be absent."""
    started = time.perf_counter()
    view = load(
        request.model, trust_remote_code=request.trust_remote_code, allow_missing_weights=True,
        cache=request.cache,
    )  # fmt: skip
    loading = time.perf_counter() - started
    forecast = plan(view, request.recipe)
    forecast.seconds += loading
    return _forecast_manifest(view, request.recipe, forecast)


def run(request: Request, progress: Progress) -> Manifest:
    """Make the artifact; the manifest. Nothing is published where a check fails."""
    if request.out is not None:
        artifact.check_target(request.out, force=request.force, sources=[request.model])
    _check_backend_name(request.backend)
    for name in dict.fromkeys((DEFAULT, request.backend)):
        find_backend(name).check_device(request.device)
    progress(f"loading {request.model}", 0, 1)
    view = load(
        request.model, trust_remote_code=request.trust_remote_code, cache=request.cache
    )
    _check_eval(request, view)
    with set_aside():
        return _made(request, view, progress)


def _made(request: Request, view: View, progress: Progress) -> Manifest:
    """The rest of ``run``, once the graph is there."""
    view.source.sha256 = fingerprint(view.source)
    data = _calibration(request, view, progress)
    if data is not None and not view.source.samples:
        # Better than random inputs, which hold no image where a prompt needs one.
        view.source.samples = [_shorter(batch) for batch in data.batches[:2]]
    marks = _marks(request, view, data)
    with remembering(request.out, marks, resume=request.resume) as checkpoints:
        result = optimize(
            view, request.recipe, calibration=None if data is None else data.batches,
            max_error=request.max_error, progress=progress, checkpoints=checkpoints,
        )  # fmt: skip
        return _published(request, view, result, data, progress)


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


def _given_cache(view: View) -> bool:
    """Whether it has a cache because ``load`` was asked for one."""
    return has_cache(view) and view.source.kind in ("hf", "zoo")


def _marks(request: Request, view: View, data: Calibration | None) -> dict[str, str]:
    """What decides a run's results: a run that was killed goes on with the same alone."""
    known = versions()
    used = ("graphwright", "python", "torch", "transformers")
    return {
        "model": view.source.sha256 + (" with its cache" if _given_cache(view) else ""),
        "recipe": str(request.recipe),
        "calibration data": "" if data is None else data.sha256,
        "version": ", ".join(f"{name} {known[name]}" for name in used if name in known),
    }


def _published(
    request: Request, view: View, result: Result, data: Calibration | None, progress: Progress
) -> Manifest:
    """The manifest; with ``request.out``, the artifact is there and checked."""
    done = Manifest.model_validate(result.report.to_dict())
    if _given_cache(view):
        done.source.cache = True
    done.calibration = None if data is None else data.entry()
    done.machine = _machine(request.device)
    done.graph_before = module_tree(result.source)
    done.graph_after = module_tree(result.graph)
    if request.out is None:
        return done
    progress("exporting to ONNX", 0, 1)
    onnx = lowered(result.graph)
    _note_translation(onnx, done)
    with artifact.publish(request.out, force=request.force) as folder:
        _write_metadata(onnx, done)
        artifact.write_model(onnx.model, folder, progress)
        _note_left(artifact.copy_side_files(view.source.folder, folder), done)
        _verify(request, view, result, folder, done, progress)
        done.sizes.artifact_bytes = artifact.model_bytes(folder)
        done.files = manifest.files(folder)
        if request.eval_tasks:
            manifest.write(folder, done)
            done.eval = _evaluated(request, view, folder, progress)
        done.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest.write(folder, done)
        report.write(folder, done)
    return done


def _note_translation(onnx: OnnxView, done: Manifest) -> None:
    """Say in the report what of the graph ``torch.onnx`` has translated, where any was."""
    remarks = onnx.metadata().get(TRANSLATION_KEY, "").splitlines()
    if remarks and done.passes:
        done.passes[-1].notes += [f"writing ONNX: {remark}" for remark in remarks]


def _note_left(names: Sequence[str], done: Manifest) -> None:
    """Say in the report which files of the source's folder are not in the artifact."""
    if names and done.passes:
        listed = ", ".join(names)
        done.passes[-1].notes.append(f"not copied, as links out of the model's folder: {listed}")


def _calibration(request: Request, view: View, progress: Progress) -> Calibration | None:
    """The data that was asked for. Raises as ``calibration.read``, and ``BadInput`` where it is not
    the data that it should be."""
    if not request.calibration:
        return None
    progress(f"reading {request.calibration}", 0, 1)
    data = read_calibration(
        request.calibration, view, samples=request.calibration_samples,
        length=request.calibration_length,
    )  # fmt: skip
    wanted = request.calibration_sha256
    if wanted not in ("", data.sha256):
        raise BadInput(
            f"{request.calibration} has changed: the batches that it gives had the hash "
            f"{wanted[:12]}…, they have {data.sha256[:12]}…"
        )
    return data


def _verify(
    request: Request, source: View, result: Result, folder: Path, done: Manifest,
    progress: Progress,
) -> None:  # fmt: skip
    """The artifact in ONNX Runtime against the rewritten graph, and against the source.

    What ``optimize`` has computed is not computed again: ``result`` holds the rewritten graph's
    outputs. The source is run as it was given, before any rewrite, once.
    """
    from ...backends import compile as compile_model

    rewritten = result.graph
    batches = source.source.samples or result.batches
    checked, expected = [batches[0]], [result.outputs[0]]
    reference = _Reference(source, batches, progress)
    bound = max(RUNTIME_REL_L2, tolerance(rewritten))
    rounded = any(_rounds_activations(node, rewritten) for node in rewritten.nodes())
    done.verification.prepacked = rounded or artifact.model_bytes(folder) <= REPACKED_BYTES
    if rounded:
        found = worst_of(reference.outputs[:1], [answers(expected[0])], shortened=True)
        bound += RUNTIME_SLACK_INT8 * worst(found).rel_l2
    step = next_step(checked[0], expected[0])
    if step is not None:
        checked.append(step)
        expected.append(sweep(rewritten, step))
    for mode, optimized in (("optimized", True), ("unoptimized", False)):
        switched = f"graph optimisation {'on' if optimized else 'off'}"
        progress(f"running the artifact, {switched}", 0, 1)
        executable = compile_model(
            folder / artifact.MODEL_FILE, backend=DEFAULT, device=request.device,
            optimize=optimized, lean=not (optimized and done.verification.prepacked),
        )  # fmt: skip
        actual = [executable(**b) for b in checked]
        error = worst(worst_of(expected, actual))
        setattr(done.verification.runtime, mode, ErrorEntry(**error.to_dict()))
        if not error.rel_l2 <= bound:
            raise BoundExceeded(
                f"ONNX Runtime ({switched}) is {error.rel_l2:.3g} (relative L2) from the "
                f"reference, more than {bound:g}: the artifact is not published. Update "
                "onnxruntime, or report the model"
            )
        if optimized:
            rest = (answers(executable(**b)) for b in batches[1:])
            outputs = [answers(actual[0]), *rest]
            errors = worst_of(reference.outputs, outputs, shortened=True)
            checks = done.verification
            checks.outputs = [OutputEntry(name=n, **d.to_dict()) for n, d in errors.items()]
            checks.samples = count_samples(batches)
            del outputs
        # The next session is made when this one is gone: each may hold the whole model.
        del actual, executable
        give_back()
    other = request.backend
    if other != DEFAULT:
        progress(f"running it in {other}", 0, 1)
        file = folder / artifact.MODEL_FILE
        model = file if find_backend(other).runs_artifacts else rewritten
        executable = compile_model(model, backend=other, device=request.device)
        error = worst(worst_of(expected, [_on_cpu(executable(**b)) for b in checked]))
        done.verification.runtime.backends[other] = ErrorEntry(**error.to_dict())
        if not error.rel_l2 <= bound:
            raise BoundExceeded(
                f"{other} is {error.rel_l2:.3g} (relative L2) from the reference, more than "
                f"{bound:g}: the artifact is not published. Use --backend onnxruntime"
            )


class _Reference:
    """The untouched source graph's outputs on every batch, computed at the first use."""

    def __init__(self, source: View, batches: Samples, progress: Progress) -> None:
        self._source, self._batches, self._progress = source, batches, progress

    @cached_property
    def outputs(self) -> list[dict[str, torch.Tensor]]:
        found = []
        for i, batch in enumerate(self._batches):
            self._progress("running the source", i, len(self._batches))
            found.append(answers(sweep(self._source, batch)))
        return found


def _on_cpu(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def _check_backend_name(name: str) -> None:
    """Raises ``BadInput`` for a backend whose error would stand where ONNX Runtime's does."""
    if name in RuntimeEntry.model_fields:
        raise BadInput(
            f"a backend cannot be named {name}: the manifest holds ONNX Runtime's own error under "
            "that name. Register it under another one"
        )


def _check_eval(request: Request, view: View) -> None:
    """Refuse tasks that cannot be done before any work is. Raises ``BadInput`` and ``Missing``."""
    if not request.eval_tasks:
        return
    if request.out is None:
        raise BadInput("--eval judges the artifact: give its folder with -o")
    from .. import evaluate

    source = evaluate.Subject.of(view)
    evaluate.check_tasks([source], request.eval_tasks, source, evaluate.Setting())


def _evaluated(
    request: Request, view: View, folder: Path, progress: Progress
) -> dict[str, BeforeAfterEntry]:
    """What the tasks say of the source and of the artifact, in turns in ONNX Runtime."""
    from .. import evaluate

    source = evaluate.Subject.of(view, backend=DEFAULT, device=request.device)
    made = evaluate.Subject.of(
        folder, name="the artifact", device=request.device, kind=source.kind,
        tokenizer=source.folder if _has_tokenizer(source.folder) else None,
    )  # fmt: skip
    setting = evaluate.Setting(progress=progress)
    found = evaluate.evaluate_all([source, made], request.eval_tasks, source, setting)
    return {
        task: BeforeAfterEntry(before=before.entry(), after=after.entry())
        for task, (before, after) in found.items()
    }


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (folder / "tokenizer.json").is_file()


def _rounds_activations(node: Node, view: View) -> bool:
    return bool(view.attrs(node).get("accuracy_level") == 4)


def worst(errors: Mapping[str, Difference]) -> Difference:
    """The error of the output that is furthest off."""
    return max(errors.values(), key=lambda d: d.rel_l2)


def _write_metadata(onnx: OnnxView, done: Manifest) -> None:
    onnx.model.producer_name = "graphwright"
    onnx.model.producer_version = versions()["graphwright"]
    onnx.metadata()["graphwright.recipe"] = done.recipe
    onnx.metadata()["graphwright.source"] = f"{done.source.kind}:{done.source.sha256}"
    for step in done.passes:
        rel_l2 = step.error.rel_l2 if step.error else 0.0
        onnx.metadata()[f"graphwright.pass.{step.order}"] = (
            f"{step.text} sites={len(step.sites)} bytes={step.bytes_after} "
            f"rel_l2={math.inf if rel_l2 is None else rel_l2:.4g}"
        )


def _forecast_manifest(view: View, recipe: Recipe, forecast: Plan) -> Manifest:
    made = zip(forecast.passes, recipe.passes, strict=True)
    return Manifest(
        schema=manifest.SCHEMA,
        source=SourceEntry.model_validate(
            {
                "kind": view.source.kind,
                "name": view.source.name,
                "sha256": "",
                "notes": list(view.source.notes),
            }
        ),
        recipe=str(recipe),
        versions=versions(),
        passes=[
            _forecast_pass(order, text, pass_, result)
            for order, ((text, result), pass_) in enumerate(made, 1)
        ],
        verification=VerificationEntry(
            outputs=[],
            runtime=RuntimeEntry.model_validate({"optimized": None, "unoptimized": None}),
        ),
        sizes=SizesEntry(source_bytes=forecast.source_bytes, artifact_bytes=0),
        predicted=ForecastEntry(
            artifact_bytes=forecast.artifact_bytes,
            peak_rss_bytes=max(forecast.peak_rss_bytes, peak_rss_bytes()),
            seconds=round(forecast.seconds, 1),
        ),
    )


def _forecast_pass(order: int, text: str, pass_: Pass, result: PassResult) -> PassEntry:
    return PassEntry(
        order=order, name=pass_.name, text=text, options={}, exact=pass_.exact,
        sites=[
            SiteEntry(
                name=site.name, kind=site.kind, shape=list(site.shape),
                bytes_before=site.bytes_before, bytes_after=site.bytes_after,
                bits_per_weight=site.bits_per_weight,
            )
            for site in result.sites
        ],
        refused=[RefusalEntry(site=site, reason=reason) for site, reason in result.refused],
        bytes_before=sum(site.bytes_before for site in result.sites),
        bytes_after=sum(site.bytes_after for site in result.sites),
        macs_before=None, macs_after=None, error=None, seconds=None, peak_rss_bytes=None,
    )  # fmt: skip


def _machine(device: str) -> MachineEntry:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return MachineEntry(
        platform=platform.platform(),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        threads=torch.get_num_threads(),
        memory_bytes=pages * size,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    lines = path.read_text(errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")

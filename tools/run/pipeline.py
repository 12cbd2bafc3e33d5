"""What ``optimize-model MODEL`` does: load, rewrite, export, verify in the runtime, publish."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...backends import find_backend
from ...backends.artifacts import artifact
from ...backends.artifacts.entries import entry_fields, parse_paths, write_entries
from ...backends.artifacts.genai_pictures import write_genai
from ...backends.onnx.fx_to_onnx import TRANSLATION_KEY
from ...backends.onnx.lowering import lowered, remarks
from ...backends.onnx.model_files import write_model
from ...backends.registry import DEFAULT
from ...ir.core.errors import BadInput
from ...ir.core.heap import set_aside
from ...ir.core.types import FLOATS
from ...ir.core.view import View
from ...ir.load.sources import castable_from, fingerprint, load
from ...ir.onnx.view import OnnxView
from ...ir.run.batches import batches_sha256
from ...ir.structure.cache_slots import has_cache
from ...ir.vocab.targets import CPU, find_target
from ...passes.checked_run import Result
from ...passes.checkpoint_store import CheckpointStore, Under
from ...passes.checks import check_needs
from ...passes.forecast import plan
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ...passes.report import versions
from ...passes.rules import check_order
from ..data.calibration import SAMPLES, Calibration
from ..data.calibration import read as read_calibration
from ..data.selecting import POOL, Selection
from ..data.text import BEGINNINGS, check_windows
from ..report import manifest
from ..report.manifest import (
    BeforeAfterEntry,
    Manifest,
    OriginalEntry,
    PathEntry,
)
from ..report.module_tree import module_tree
from ..report.tensors import tensors
from ..report.token_picture import kept_entry
from ..search.budget import Budget
from ..search.data import unfitted
from ..search.points import Found
from ..search.search import KNOBS, ROUNDS, search
from ..search.telling import search_entry
from ..search.times import Times
from . import report
from .forecast_manifest import forecast_manifest
from .machine import machine_entry, processor
from .most_moved import most_moved
from .named_model import load_original
from .named_source import beside
from .resume import remembering
from .verifying import ask, check_backend_name, verify

Progress = Callable[[str, int, int], None]
Batch = Mapping[str, torch.Tensor]


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
    calibration_select: str = ""
    """Which of the data are used: see ``data.selecting``."""
    calibration_windows: str = BEGINNINGS
    """How texts are cut: see ``data.text.WINDOWS``."""
    resume: bool = False
    """Whether to go on with a run that was killed: see ``resume``."""
    calibration_sha256: str = ""
    """Where given, data of any other hash is refused."""
    backend: str = DEFAULT
    """Another one also runs the result; the artifact is ONNX Runtime's either way."""
    cache: bool | None = None
    """Whether a zoo or Hugging Face model gets its key-value cache as inputs and outputs; ``None``:
    if it writes text."""
    part: str = ""
    """Of an encoder-decoder's folder, the graph that is taken: see ``hf_pair.PARTS_OF_PAIR``."""
    target: str = CPU.name
    """What the artifact is written for: see ``vocab.targets``."""
    settled: bool = False
    """Whether the recipe stands as it is. One that a manifest tells leaves nothing open for the
    target: what it does not say is the pass's own default, also where Python ran it without one."""
    original: str = ""
    """The model that ``model`` was compressed from: see ``passes.original``."""
    original_sha256: str = ""
    """Where given, an original of any other hash is refused."""
    dtype: str = ""
    """A name of ``FLOATS`` in which a zoo or Hugging Face model is loaded; empty for its own, or
    for the one that the target prefers."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks that judge the source and the artifact, both in ONNX Runtime."""
    eval_data: Path | None = None
    """A person's own file that they judge on."""
    budget: Budget | None = None
    """Where given, the recipe is searched for: see ``search``."""
    paths: tuple[tuple[str, str], ...] = ()
    """Further entry graphs of the artifact: their names, and the blocks that they go through."""
    using: tuple[str, ...] = KNOBS
    """The knobs that the search turns."""
    workers: int | str = 0
    """Processes that the search measures in, or ``ray``: see ``search``."""
    times: Times | None = None
    """A table of times that the search goes by where time is bounded: see ``search.times``."""
    refine: float = 0.0
    """Seconds that the search may spend on neighbours of what it found: see ``search``."""

    def __post_init__(self) -> None:
        amounts = {
            "--calib-samples": self.calibration_samples, "--calib-length": self.calibration_length
        }  # fmt: skip
        if not self.settled:
            object.__setattr__(self, "recipe", self.recipe.settled(find_target(self.target)))
        check_order(self.recipe.passes, compressed=bool(self.original))
        parse_paths(dict(self.paths))
        options = [option for option, amount in amounts.items() if amount is not None]
        if options and not self.calibration:
            raise BadInput(f"{options[0]} says how much of --calib is used: give --calib DATA too")
        if Selection(self.calibration_select).text and not self.calibration:
            raise BadInput("--calib-select says what of --calib is used: give --calib DATA too")
        check_windows(self.calibration_windows)
        if self.calibration_windows != BEGINNINGS and not self.calibration:
            raise BadInput("--calib-windows says how --calib is cut: give --calib DATA too")


def dry_run(request: Request) -> Manifest:
    """The forecast of a run as a manifest; weights may be absent."""
    started = time.perf_counter()
    view = _loaded(request, allow_missing_weights=True)
    original = _original(request, allow_missing=True)
    loading = time.perf_counter() - started
    forecast = plan(view, request.recipe, original=original)
    forecast.seconds += loading
    return forecast_manifest(view, request.recipe, forecast)


def dry_search(request: Request, progress: Progress) -> Manifest:
    """The forecast of a run whose recipe a budget decides: weights and data are read, no candidate
    is measured."""
    view = _loaded(request)
    data = _calibration(request, view, progress)
    outcome = _searched(request, view, data, _judged(request, view, data), progress, rounds=0)
    done = forecast_manifest(view, outcome.recipe, plan(view, outcome.recipe))
    done.search = search_entry(outcome)
    return done


def _searched(
    request: Request, view: View, data: Calibration | None, judged: Sequence[Batch],
    progress: Progress, checkpoints: CheckpointStore | None = None, rounds: int = ROUNDS,
) -> Found:  # fmt: skip
    assert request.budget is not None
    return search(
        view, budget=request.budget, calibration=[] if data is None else data.batches,
        judged=judged, using=request.using, target=request.target, rounds=rounds,
        progress=progress, checkpoints=checkpoints, workers=request.workers,
        reload=functools.partial(_loaded, request), machine=processor(),
        times=request.times, refine=request.refine,
    )  # fmt: skip


def _judged(request: Request, view: View, data: Calibration | None) -> Sequence[Batch]:
    """What a search judges by beside the calibration data, unless it was said how much is used."""
    if request.budget is None or data is None or request.calibration_samples is not None:
        return []
    return unfitted(
        data.name, view, data.batches, request.calibration_length, request.calibration_windows
    )


def run(request: Request, progress: Progress) -> Manifest:
    """Make the artifact; the manifest. Nothing is published where a check fails."""
    if request.out is not None:
        artifact.check_target(request.out, force=request.force, sources=[request.model])
    check_needs(request.recipe, calibrated=bool(request.calibration))
    check_backend_name(request.backend)
    for name in dict.fromkeys((DEFAULT, request.backend)):
        find_backend(name).check_device(request.device)
    progress(f"loading {request.model}", 0, 1)
    view = _loaded(request)
    _check_eval(request, view)
    with set_aside():
        return _rewritten(request, view, progress)


def _loaded(request: Request, *, allow_missing_weights: bool = False) -> View:
    """The graph, in the float that was asked for, or that the target prefers to float32."""
    target, dtype = find_target(request.target), FLOATS.get(request.dtype)
    asks = target.prefers is not None and dtype is None
    prefers = target.prefers if asks and _is_float32(request) else None
    view = load(
        request.model, trust_remote_code=request.trust_remote_code, cache=request.cache,
        allow_missing_weights=allow_missing_weights, dtype=prefers or dtype,
        part=request.part or None,
    )  # fmt: skip
    if prefers is None:
        return view
    name = next(name for name, dtype in FLOATS.items() if dtype == prefers)
    note = f"it is taken in {name}, which target {target.name} prefers to float32: see --dtype"
    view.source = dataclasses.replace(view.source, notes=(*view.source.notes, note))
    return view


def _is_float32(request: Request) -> bool:
    usual = castable_from(request.model, trust_remote_code=request.trust_remote_code)
    return usual == torch.float32


def _rewritten(request: Request, view: View, progress: Progress) -> Manifest:
    """The rest of ``run``, once the graph is there."""
    view.source.sha256 = fingerprint(view.source)
    if request.original:
        progress(f"loading {request.original}", 0, 1)
    original = _original(request)
    data = _calibration(request, view, progress)
    truth = ask(view, data, progress)
    judged, outcome = _judged(request, view, data), None
    marks = _marks(request, view, data, original, judged)
    with remembering(request.out, marks, resume=request.resume) as store:
        checkpoints: CheckpointStore | None = store
        if request.budget is not None:
            outcome = _searched(request, view, data, judged, progress, checkpoints)
            request = replace(request, recipe=outcome.recipe)
            checkpoints = None if store is None else Under(store, str(outcome.recipe))
        result = optimize(
            view, request.recipe, calibration=None if data is None else data.batches,
            max_error=request.max_error, progress=progress, checkpoints=checkpoints, truth=truth,
            original=original,
        )  # fmt: skip
        return _published(request, view, result, data, original, outcome, progress)


def _original(request: Request, *, allow_missing: bool = False) -> View | None:
    """The model that the source was compressed from, with its hash. Raises as ``load``, and
    ``BadInput`` where it is not the one that it should be."""
    if not request.original:
        return None
    view = load_original(
        request.original, trust_remote_code=request.trust_remote_code,
        allow_missing_weights=allow_missing,
    )  # fmt: skip
    sha256 = "" if allow_missing else fingerprint(view.source)
    if request.original_sha256 not in ("", sha256):
        raise BadInput(
            f"{request.original} has changed: its hash was {request.original_sha256[:12]}…, it is "
            f"{sha256[:12]}…"
        )
    return view


def _given_cache(view: View) -> bool:
    """Whether it has a cache because ``load`` was asked for one."""
    return has_cache(view) and view.source.kind in ("hf", "zoo", "gguf")


def _marks(
    request: Request, view: View, data: Calibration | None, original: View | None,
    judged: Sequence[Batch],
) -> dict[str, str]:  # fmt: skip
    """What decides a run's results: a run that was killed goes on with the same alone."""
    known = versions()
    used = ("graphwright", "python", "torch", "transformers")
    searched = {} if request.budget is None else {
        "budget": str(request.budget), "knobs": ", ".join(request.using),
        "data to judge by": batches_sha256(judged),
        "times": str(request.times or ""),
    }  # fmt: skip
    return {
        "model": view.source.sha256 + (" with its cache" if _given_cache(view) else ""),
        "part": request.part,
        "recipe": str(request.recipe),
        "target": request.target,
        "dtype": request.dtype,
        "calibration data": "" if data is None else data.sha256,
        "original": "" if original is None else original.source.sha256,
        "version": ", ".join(f"{name} {known[name]}" for name in used if name in known),
        **searched,
    }


def _published(
    request: Request, view: View, result: Result, data: Calibration | None, original: View | None,
    outcome: Found | None, progress: Progress,
) -> Manifest:  # fmt: skip
    """The manifest; with ``request.out``, the artifact is there and checked."""
    done = Manifest.model_validate(result.report.to_dict())
    if _given_cache(view):
        done.source.cache = True
    if request.part:
        done.source.part = request.part
    done.calibration = None if data is None else data.entry()
    if data is not None and view.source.sampler is None:
        done.verification.data = f"samples of --calib {data.name}"
    if original is not None:
        source = original.source
        done.original = OriginalEntry(name=request.original, sha256=source.sha256)
    if outcome is not None:
        done.search = search_entry(outcome)
    done.machine = machine_entry(request.device)
    done.target, done.dtype = request.target, request.dtype
    done.graph_before = module_tree(result.source)
    done.graph_after = module_tree(result.graph)
    if request.out is None:
        return done
    done.source.beside = beside(request.model, request.out)
    if done.calibration is not None:
        done.calibration.beside = beside(request.calibration, request.out)
    if done.original is not None:
        done.original.beside = beside(request.original, request.out)
    done.image_tokens = kept_entry(result.graph, result.batches[0])
    progress("exporting to ONNX", 0, 1)
    onnx = lowered(result.graph, find_target(request.target))
    notes = _of_writing(onnx)
    done.sizes.tensors = tensors(onnx, result.graph.weights(), result.source.weights())
    with artifact.publish(request.out, force=request.force) as folder:
        _write_metadata(onnx, done)
        write_model(onnx.model, folder, progress)
        notes += _of_links(artifact.copy_side_files(result.graph.source.folder, folder))
        parts = write_genai(result.graph, onnx, folder, find_target(request.target))
        notes += [f"writing ONNX: {note}" for note in parts]
        _write_paths(request, result.graph, folder, done)
        notes += verify(
            done.verification, result.standard, result, folder, device=request.device,
            backend=request.backend, progress=progress,
        )  # fmt: skip
        if notes:  # a field that was set is written
            done.notes = notes
        done.sizes.artifact_bytes = artifact.model_bytes(folder)
        _note_files(done)
        done.files = manifest.files(folder)
        if request.eval_tasks:
            manifest.write(folder, done)
            done.eval = _evaluated(request, view, result.graph, folder, progress)
        done.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest.write(folder, done)
        report.write(folder, done)
    return done


def _write_paths(request: Request, graph: View, folder: Path, done: Manifest) -> None:
    entries = write_entries(graph, folder, dict(request.paths), find_target(request.target))
    if entries:
        done.paths = {n: PathEntry.model_validate(entry_fields(e)) for n, e in entries.items()}


def _of_writing(onnx: OnnxView) -> list[str]:
    """What of the graph ``torch.onnx`` has translated, where any was, and which forms of the target
    it does not have."""
    notes = [*onnx.metadata().get(TRANSLATION_KEY, "").splitlines(), *remarks(onnx)]
    return [f"writing ONNX: {remark}" for remark in notes]


def _note_files(done: Manifest) -> None:
    """Say where the files are larger than a budget of bytes, which is one of weights."""
    limit = None if done.search is None else done.search.limits.get("bytes")
    if done.search is not None and limit is not None and done.sizes.artifact_bytes > limit:
        done.search.notes.append(
            f"the budget is one of weights: the model's files take {done.sizes.artifact_bytes} "
            "bytes, with the graph itself and what the runtime wants wider"
        )


def _of_links(names: Sequence[str]) -> list[str]:
    """Which files of the source's folder are not in the artifact."""
    if not names:
        return []
    return [f"not copied, as links out of the model's folder: {', '.join(names)}"]


def _calibration(request: Request, view: View, progress: Progress) -> Calibration | None:
    """The data that was asked for. Raises as ``calibration.read``, and ``BadInput`` where it is not
    the data that it should be."""
    if not request.calibration:
        return None
    progress(f"reading {request.calibration}", 0, 1)
    selection, samples = Selection(request.calibration_select), request.calibration_samples
    data = read_calibration(
        request.calibration, view, length=request.calibration_length, select=selection.text,
        samples=POOL * (samples or SAMPLES) if selection.by_model else samples,
        windows=request.calibration_windows,
    )  # fmt: skip
    if selection.by_model:
        progress("choosing the samples that move most", 0, 1)
        data = replace(data, batches=most_moved(view, data.batches, samples or SAMPLES))
    expected = request.calibration_sha256
    if expected not in ("", data.sha256):
        raise BadInput(
            f"{request.calibration} has changed: the batches that it gives had the hash "
            f"{expected[:12]}…, they have {data.sha256[:12]}…"
        )
    return data


def _check_eval(request: Request, view: View) -> None:
    """Refuse tasks that cannot be done before any work is. Raises ``BadInput`` and ``Missing``."""
    if not request.eval_tasks:
        if request.eval_data is not None:
            raise BadInput("--eval-data is what --eval TASKS judge on: name them too")
        return
    if request.out is None:
        raise BadInput("--eval judges the artifact: give its folder with -o")
    from .. import evaluate

    source, setting = evaluate.Subject.of(view), evaluate.Setting(data=request.eval_data)
    evaluate.check_tasks([source], request.eval_tasks, source, setting)


def _evaluated(
    request: Request, view: View, graph: View, folder: Path, progress: Progress
) -> dict[str, BeforeAfterEntry]:
    """What the tasks say of the source and of the artifact, in turns in ONNX Runtime."""
    from .. import evaluate

    source = evaluate.Subject.of(view, backend=DEFAULT, device=request.device)
    # A trimmed vocabulary has a tokenizer of its own, which lies in the artifact.
    own = graph.source.folder != view.source.folder
    optimized = evaluate.Subject.of(
        folder, name="the artifact", device=request.device, kind=source.kind,
        tokenizer=source.folder if _has_tokenizer(source.folder) and not own else None,
    )  # fmt: skip
    setting = evaluate.Setting(data=request.eval_data, progress=progress)
    results = evaluate.evaluate_all([source, optimized], request.eval_tasks, source, setting)
    return {
        task: BeforeAfterEntry(before=before.entry(), after=after.entry())
        for task, (before, after) in results.items()
    }


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and (folder / "tokenizer.json").is_file()


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

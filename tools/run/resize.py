"""``optimize-model resize OUT --max-bytes N -o OUT2``: an artifact of any size, made smaller."""

from __future__ import annotations

import datetime
from pathlib import Path

from ...backends import compile as compile_model
from ...backends.artifacts import artifact
from ...backends.artifacts.entries import entry_fields, write_entries
from ...backends.artifacts.genai_pictures import write_genai
from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MODEL_FILE, write_model
from ...ir.core.errors import BadInput, BoundExceeded
from ...ir.core.view import View
from ...ir.load.bitstack_size import possible_sizes
from ...ir.load.intact import check_files
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import Rule, worst, worst_of
from ...ir.vocab.targets import find_target
from ..report import manifest
from ..report.manifest import Manifest, PathEntry, RuntimeEntry, VerificationEntry
from . import pipeline, report


def resize(
    folder: Path, max_bytes: int, out: Path, progress: pipeline.Progress, *, force: bool = False
) -> Manifest:
    """Write the largest size of ``folder`` whose model files take at most ``max_bytes``.

    Its manifest is that of ``folder`` with sizes, hashes and verification made anew: the runtime's
    graph optimisation must change nothing. Returns the manifest. Raises ``BadInput`` where the
    artifact has one size or none as small as that, ``BoundExceeded`` where the check fails.
    """
    done = manifest.load(folder)
    artifact.check_target(out, force=force)
    if out.resolve() == folder.resolve():
        raise BadInput(f"{out} is the artifact itself: give another --out")
    check_files(folder, whole=True)
    with artifact.publish(out, force=force) as target:
        progress(f"cutting {folder}", 0, 1)
        view = _written(folder, max_bytes, target, progress, done)
        done.verification = _checked(view, target, progress)
        done.sizes.artifact_bytes = artifact.model_bytes(target)
        done.sizes.tensors = []
        done.files = manifest.files(target)
        done.sizes.whole_bytes = artifact.model_bytes(folder)
        done.eval = None
        done.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest.write(target, done)
        report.write(target, done)
    return done


def _written(
    folder: Path, max_bytes: int, target: Path, progress: pipeline.Progress, done: Manifest
) -> View:
    """The graph of the largest size that fits, its files written: further graphs over its data
    too, as ``folder`` has them."""
    runtime, sizes = find_target(done.target), possible_sizes(folder / MODEL_FILE)
    beside, least = artifact.model_bytes(folder) - sizes[-1], sizes[0]
    budget = max_bytes - beside
    if beside and budget < least:
        raise BadInput(_too_small(folder, max_bytes, least - budget))
    while True:
        view = load(folder, max_bytes=budget)
        onnx = lowered(view, runtime)
        write_model(onnx.model, target, progress)
        artifact.copy_side_files(str(folder), target)
        write_genai(view, onnx, target, runtime)
        texts = {name: entry.blocks for name, entry in done.paths.items()}
        entries = write_entries(view, target, texts, runtime)
        done.paths = {n: PathEntry.model_validate(entry_fields(e)) for n, e in entries.items()}
        over = artifact.model_bytes(target) - max_bytes
        if over <= 0:
            return view
        # Graphs are written anew, and may have become larger than they were.
        budget -= over
        if budget < least:
            raise BadInput(_too_small(folder, max_bytes, over))


def _too_small(folder: Path, max_bytes: int, missing: int) -> str:
    return f"{folder}: no size fits in {max_bytes} bytes; try {max_bytes + missing}"


def _checked(view: View, target: Path, progress: pipeline.Progress) -> VerificationEntry:
    inputs = sample_inputs(view)
    results = []
    for optimized in (False, True):
        progress(f"running it, graph optimisation {'on' if optimized else 'off'}", 0, 1)
        executable = compile_model(target / MODEL_FILE, optimize=optimized)
        results.append(executable(**inputs))
    difference = worst(worst_of([results[0]], [results[1]]))
    rule = Rule.of(view)
    if not rule.allows(difference):
        raise BoundExceeded(
            f"ONNX Runtime's graph optimisation changes the outputs by {difference.rel_l2:.3g} "
            f"(relative L2), more than {rule.bound:g}: nothing is published. Update onnxruntime"
        )
    checked = {"optimized": difference.to_dict(), "unoptimized": None}
    return VerificationEntry(outputs=[], runtime=RuntimeEntry.model_validate(checked))

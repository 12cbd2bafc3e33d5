"""``optimize-model resize OUT --max-bytes N -o OUT2``: an artifact of any size, made smaller."""

from __future__ import annotations

import datetime
from pathlib import Path

from ...backends import compile as compile_model
from ...backends.artifacts import artifact
from ...backends.artifacts.genai import write_genai_config
from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MODEL_FILE, write_model
from ...ir.core.errors import BadInput, BoundExceeded
from ...ir.core.view import View
from ...ir.load.bitstack_size import possible_sizes
from ...ir.load.intact import check_files
from ...ir.load.sources import load
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import Rule, worst, worst_of
from ...ir.vocab.targets import Target, find_target
from ..report import manifest
from ..report.manifest import Manifest, RuntimeEntry, VerificationEntry
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
        view = _written(folder, max_bytes, target, progress, find_target(done.target))
        done.verification = _checked(view, target, progress)
        done.sizes.artifact_bytes = artifact.model_bytes(target)
        done.sizes.tensors = []
        done.files = manifest.files(target)
        done.sizes.whole_bytes = possible_sizes(folder / MODEL_FILE)[-1]
        done.eval = None
        done.created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        artifact.copy_side_files(str(folder), target)
        write_genai_config(view, target, find_target(done.target))
        manifest.write(target, done)
        report.write(target, done)
    return done


def _written(
    folder: Path, max_bytes: int, target: Path, progress: pipeline.Progress, runtime: Target
) -> View:
    """The graph of the largest size that fits, its files written."""
    budget, least = max_bytes, possible_sizes(folder / MODEL_FILE)[0]
    while True:
        view = load(folder, max_bytes=budget)
        write_model(lowered(view, runtime).model, target, progress)
        over = artifact.model_bytes(target) - max_bytes
        if over <= 0:
            return view
        # The graph's own file is written anew, and may have become larger than it was.
        budget -= over
        if budget < least:
            raise BadInput(f"{folder}: no size fits in {max_bytes} bytes; try {max_bytes + over}")


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

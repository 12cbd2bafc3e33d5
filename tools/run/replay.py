"""``optimize-model replay``: repeat the run that made an artifact, and compare the weights."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from ...backends.artifacts import artifact
from ...backends.onnx.model_files import MODEL_FILES
from ...ir.core.errors import BadInput, BoundExceeded, Missing
from ...ir.core.scratch import Scratch
from ...ir.core.types import FLOATS
from ...ir.load.intact import check_files
from ...ir.load.names import form_of
from ...passes.recipe import Recipe
from ..data.text import BEGINNINGS
from ..report import manifest
from . import named_source, pipeline

_MARKS = ("graphwright.pass.", "graphwright.recipe", "graphwright.source")
"""Keys of metadata that say what a run did."""
_FILES = ("onnx", "pt2", "gguf")
_PATHS = ("", *_FILES)
"""What ``form_of`` takes a path for that leads to nothing."""
MOST_THREADS = 256
"""More than these are not started for what a manifest says."""


def replay(
    folder: Path, out: Path | None, progress: pipeline.Progress, *, force: bool = False,
    trust_source: bool = False, source: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Run the recipe of ``folder`` on its source again, into ``out`` or a temporary folder.

    ``source`` is where the model lies now, if it is not where the manifest says, seen from here or
    from the artifact.
    ``out`` is written where the result is the same, and stays as it was elsewhere. Returns a
    summary. Raises ``BadInput`` where ``out`` is ``folder``, and where the source or the
    calibration data has changed since, ``BoundExceeded`` where the weights come out different, and
    as ``named_source.check_name``.
    """
    known = manifest.load(folder)
    if out is not None and out.resolve() == folder.resolve():
        raise BadInput(f"{out} is the artifact itself: give another --out")
    name = source or named_source.located(known.source.name, known.source.beside, folder)
    kind = known.source.kind
    if kind == "memory" and not source:
        raise BadInput(
            f"{folder}: made from a memory graph ({name}), which cannot be "
            "loaded again: run gw.optimize on it with the recipe " + known.recipe
        )
    if kind in ("hf", *_FILES) and form_of(name) in _PATHS and not Path(name).exists():
        raise Missing(
            f"{folder}: its source, {name}, is not there, from here or from the artifact "
            f"({known.source.beside or 'which does not say'}): give it with --source MODEL"
        )
    check_files(folder, whole=True)
    named_source.check_name(name, trusted=trust_source)
    with contextlib.ExitStack() as place:
        if out is None:
            target = place.enter_context(Scratch("replay")) / "artifact"
        else:
            artifact.check_target(out, force=force, sources=[name, folder])
            target = place.enter_context(artifact.publish(out, force=force))
        # What was found to be the same takes its place at the end of the block.
        with _as_many_threads(known.machine):
            repeat = _repeated(folder, known, name, target, progress, trust_source)
        _compare(folder, known, target, repeat)
    return {
        "artifact": str(folder),
        "recipe": known.recipe,
        "identical": True,
        "summary": f"{folder}: replayed {known.recipe} on {name}: "
        f"{' and '.join(MODEL_FILES)} byte-identical",
    }


@contextlib.contextmanager
def _as_many_threads(machine: manifest.MachineEntry | None) -> Iterator[None]:
    """Run on as many threads as the machine did, where that is known: eigenvalues of the same
    matrix differ in their last bits between one thread and two."""
    mine = torch.get_num_threads()
    if machine is not None and 0 < machine.threads <= MOST_THREADS:
        torch.set_num_threads(machine.threads)
    try:
        yield
    finally:
        torch.set_num_threads(mine)


def _repeated(
    folder: Path, known: manifest.Manifest, name: str, target: Path, progress: pipeline.Progress,
    trusted: bool,
) -> manifest.Manifest:  # fmt: skip
    """The run that the manifest of ``folder`` tells of, on the source ``name``, into ``target``."""
    data, before = known.calibration, known.original
    if known.dtype and known.dtype not in FLOATS:
        raise BadInput(
            f"{folder}: its model was taken in {known.dtype}, which ONNX Runtime computes in part: "
            f"it cannot be repeated. Load it with a dtype of {', '.join(FLOATS)}, and export it so"
        )
    original = named_source.located(before.name, before.beside, folder) if before else ""
    if original:
        named_source.check_name(original, trusted=trusted)
    request = pipeline.Request(
        name, Recipe.parse(known.recipe), target,
        max_error=known.verification.max_error, cache=known.source.cache, part=known.source.part,
        trust_remote_code=trusted, target=known.target, dtype=known.dtype, settled=True,
        calibration=named_source.located(data.name, data.beside, folder) if data else "",
        calibration_samples=data.samples if data else None,
        calibration_length=data.length if data else None,
        calibration_select=data.select if data else "",
        calibration_windows=(data.windows if data else "") or BEGINNINGS,
        calibration_sha256=data.sha256 if data else "", original=original,
        original_sha256=before.sha256 if before else "",
        paths=tuple((name, entry.blocks) for name, entry in known.paths.items()),
    )  # fmt: skip
    return pipeline.run(request, progress)


def _compare(
    folder: Path, known: manifest.Manifest, target: Path, repeat: manifest.Manifest
) -> None:
    """Raise ``BadInput`` where the source is another, ``BoundExceeded`` where the model is."""
    source = known.source
    # A graph that was exported in Python has no hash of its source.
    if source.sha256 and repeat.source.sha256 != source.sha256:
        raise BadInput(
            f"{source.name} has changed since {folder} was made: its hash was "
            f"{source.sha256[:12]}…, it is {repeat.source.sha256[:12]}…"
        )
    read = _hash if source.sha256 else _unmarked
    different = [n for n in MODEL_FILES if read(folder / n) != read(target / n)]
    if different:
        changed = _changed_versions(known.versions, repeat.versions)
        changed += _changed_machine(known, repeat)
        raise BoundExceeded(
            f"replay of {folder}: {', '.join(different)} came out different"
            + (f" (changed since: {', '.join(changed)})" if changed else "")
        )


def _hash(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _unmarked(path: Path) -> str:
    """The hash of a file without what the command writes of a run, and an export does not."""
    if path.suffix != ".onnx" or not path.is_file():
        return _hash(path)
    model = onnx.load(path, load_external_data=False)
    model.producer_version = ""
    kept = [entry for entry in model.metadata_props if not entry.key.startswith(_MARKS)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _changed_versions(a: dict[str, str], b: dict[str, str]) -> list[str]:
    names = sorted(set(a) | set(b))
    return [f"{n} {a.get(n)} to {b.get(n)}" for n in names if a.get(n) != b.get(n)]


def _changed_machine(known: manifest.Manifest, repeat: manifest.Manifest) -> list[str]:
    """What of the machine decides the order of sums."""
    a, b = known.machine, repeat.machine
    if a is None or b is None:
        return []
    pairs = (("processor", a.cpu, b.cpu), ("threads", a.threads, b.threads))
    return [f"{name} {old} to {new}" for name, old, new in pairs if old and old != new]

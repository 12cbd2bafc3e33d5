"""``export_pair``: an encoder-decoder as a folder of the three graphs that the ecosystem loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir

from ...ir.core.errors import BadInput
from ...ir.core.version import __version__
from ...ir.core.view import View
from ...ir.run.inputs import sample_inputs
from ...ir.run.truth import Reference, Truth
from ...ir.structure.costs import weight_bytes
from ..onnx.lowering import lowered
from ..onnx.model_files import MANIFEST_FILE, save
from .artifact import PAIR_FILES, check_target, copy_side_files, publish
from .judging import Judge, check_artifact


def export_pair(parts: Mapping[str, View], out: str | Path, *, force: bool = False) -> Path:
    """Write the parts of an encoder-decoder (``load(FOLDER, part=...)``), rewritten or not.

    ``parts`` are ``encoder``, ``decoder`` and ``decoder_with_past``; the files are
    ``encoder_model.onnx``, ``decoder_model.onnx`` and ``decoder_with_past_model.onnx``, each with
    its data beside it, under the names of inputs and outputs that Optimum's
    ``ORTModelForSeq2SeqLM`` and ``ORTModelForSpeechSeq2Seq`` use. Before the folder takes its place
    ONNX Runtime runs each part, graph optimisation on and off: it must compute what its graph does.

    Raises ``BadInput`` where a part lacks, and as ``export``.
    """
    if set(parts) != set(PAIR_FILES):
        raise BadInput(f"the parts are {', '.join(PAIR_FILES)}, not {', '.join(parts) or 'none'}")
    source = parts["encoder"].source
    check_target(Path(out), force=force, sources=[source.folder or "", *source.files])
    sizes: dict[str, int] = {}
    with publish(Path(out), force=force) as folder:
        for name, view in parts.items():
            sizes[name] = _write(view, folder / PAIR_FILES[name])
        copy_side_files(source.folder, folder)
        manifest = {
            "schema": 1, "versions": {"graphwright": __version__}, "parts": sizes,
            "source": {"kind": source.kind, "name": source.name},
        }  # fmt: skip
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return Path(out)


def _write(view: View, path: Path) -> int:
    """Write one part and run it; the bytes of its weights."""
    model: onnx_ir.Model = lowered(view).model
    save(model, path, f"{path.name}.data", lambda *_: None)
    batches = [sample_inputs(view)]
    judge = Judge(view, batches, Reference(view, batches, Truth()))
    check_artifact(path.parent, view, judge, file=path.name)
    return weight_bytes(view)

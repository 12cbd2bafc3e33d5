"""``convert``: an artifact as files that another tool runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...backends.onnx.model_files import MANIFEST_FILE
from ...ir.core.errors import BadInput, near_misses
from ...ir.load.intact import check_files
from ...passes.base import BLOCKS, TOKENS
from ...passes.registry import pass_class
from ..report import manifest
from .gguf_file import write_gguf
from .peft_adapter import write_adapter
from .quantized_folder import write_compressed_tensors, write_gptq
from .transformers_js import write_layout

FORMATS: dict[str, Callable[[Path, Path], list[str]]] = {
    "compressed-tensors": write_compressed_tensors,
    "gguf": write_gguf,
    "gptq": write_gptq,
    "peft": write_adapter,
    "transformers.js": write_layout,
}
"""What writes each format into an empty folder; what it says of it."""
GRAPHS = {"transformers.js"}
"""Those that hold the graph itself, whatever passes made of it."""


def convert(artifact: Path, to: str, out: Path) -> list[str]:
    """Write an artifact as ``to`` into the new folder ``out``; what a person should know of it.

    Raises ``BadInput`` for a folder that is not an artifact, one of another than these formats, a
    folder that is there already and an artifact that the format cannot hold.
    """
    if to not in FORMATS:
        raise BadInput(f"there is no format {to!r}; {near_misses(to, list(FORMATS))}")
    if not (artifact / MANIFEST_FILE).is_file():
        raise BadInput(f"{artifact} is not an artifact: give the folder that optimize-model wrote")
    check_files(artifact)
    for step in () if to in GRAPHS else manifest.load(artifact).passes:
        lost = {TOKENS, BLOCKS} & {*pass_class(step.name).provides}
        if lost:
            raise BadInput(
                f"{artifact}: {step.name} left {', '.join(sorted(lost))}, which only a graph "
                "holds: other formats hold weights alone"
            )
    if out.exists():
        raise BadInput(f"{out} exists: give a new folder as --out")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        notes = FORMATS[to](artifact, folder)
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return notes

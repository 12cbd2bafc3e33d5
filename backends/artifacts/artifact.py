"""The artifact folder: written beside its final name, which it takes when it is whole."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir

from ...ir.core.errors import FULL, BadInput, DiskFull
from ...ir.core.files import is_own
from ...ir.load.checkpoints.quantized import KEYS
from ...ir.load.entry_files import PARTS, PATTERN, SOUND_FILE
from ...ir.load.side_files import read_json
from ...ir.structure.cache_slots import ROWS_KEY
from ..onnx.model_files import MANIFEST_FILE, MODEL_FILE, MODEL_FILES
from .claim import NEW, claimed, recover, switch

PAIR_FILES = {part: f"{part}_model.onnx" for part in ("encoder", "decoder", "decoder_with_past")}
"""The graphs of an encoder-decoder; the data of each lies beside it."""
REPORT_FILE = "report.html"
GENAI_FILE = "genai_config.json"
"""See ``backends.artifacts.genai``."""
PROCESSOR_FILE = "genai_processor.json"
SOUND_PROCESSOR_FILE = "genai_sounds.json"
"""See ``backends.artifacts.genai_sounds``."""
PICTURED_FILES = dict(zip(("vision", "embedding", "text"), PARTS, strict=True))
"""See ``backends.artifacts.genai_pictures``: parts of a model of images and text, over its data."""
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "chat_template.jinja",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json",
)  # fmt: skip
"""Files of a source folder that other tools need to use the model."""
_MODULE = re.compile(r"\d+_\w+")
_MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
"""Names of a module of sentence-transformers that stands behind the model, and of its files."""


def check_target(out: Path, *, force: bool, sources: Iterable[str | Path] = ()) -> None:
    """Refuse an output folder early: one that is not ours, that holds one of the ``sources`` or
    anything that no artifact has, or that cannot be written.

    Raises ``BadInput``.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(f"{out} exists and is not a folder")
    here = out.resolve()
    if any(here == place or here in place.parents for place in (Path.cwd(), Path.home())):
        raise BadInput(
            f"{out} holds the working or the home folder: an artifact replaces its folder"
        )
    for source in sources:
        if any(here == place or here in place.parents for place in _places(source)):
            raise BadInput(
                f"{out} holds the source, {source}, which the artifact would replace: choose "
                "another --out"
            )
    foreign = list(itertools.islice(_foreign(out), 4))
    if foreign:
        named = ", ".join(foreign[:3]) + (", ..." if foreign[3:] else "")
        raise BadInput(
            f"{out} holds what no artifact has ({named}), and an artifact replaces its folder, "
            "--force or not: move it, or choose another --out"
        )
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file() and not force:
        raise BadInput(f"{out} exists and is not a graphwright artifact; --force replaces it")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"{parent} is not writable: choose another --out")


def _places(source: str | Path) -> list[Path]:
    """Where a source lies, if it is one of files: as it is named, and behind links."""
    path = Path(source).expanduser()
    return [path.absolute(), path.resolve()] if str(source) and path.exists() else []


def _foreign(out: Path) -> Iterator[str]:
    """Names below a folder that are in no artifact, as they are found."""
    pair = {*PAIR_FILES.values(), *(f"{name}.data" for name in PAIR_FILES.values())}
    ours = {*MODEL_FILES, *pair, *PARTS, SOUND_FILE, MANIFEST_FILE, REPORT_FILE, GENAI_FILE,
            PROCESSOR_FILE, SOUND_PROCESSOR_FILE, *SIDE_FILES}  # fmt: skip
    ours |= {*_module_files(out)}
    for folder, _, files in os.walk(out):
        for name in files:
            inner = (Path(folder) / name).relative_to(out).as_posix()
            if inner not in ours and not fnmatch.fnmatchcase(inner, PATTERN):
                yield inner


@contextlib.contextmanager
def publish(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well.

    What was there before stays whole until then, and for good where anything fails. Raises
    ``BadInput`` as ``check_target`` and ``claimed``, and ``DiskFull`` where the disk ran full.
    """
    check_target(out, force=force)
    out = out.absolute()
    with claimed(out) as place:
        try:
            folder = place / NEW
            folder.mkdir()
            yield folder
            check_target(out, force=force)
            _put_in_place(out)
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull(
                    f"the disk of {out.parent} ran full; nothing was changed there. Free some "
                    "space or choose another --out"
                ) from None
            raise
        finally:
            recover(out)


def _put_in_place(out: Path) -> None:
    try:
        switch(out)
    except OSError as error:
        if error.errno in FULL:
            raise
        # A mount point cannot be renamed, for one.
        raise BadInput(
            f"{out} cannot be replaced: {error.strerror}; give a folder inside it as --out"
        ) from None


def model_bytes(folder: Path) -> int:
    """Size of the model's files."""
    files = [*(folder / name for name in (*MODEL_FILES, *PARTS)), *folder.glob(PATTERN)]
    return sum(path.stat().st_size for path in files if path.is_file())


def rows_begin(folder: Path) -> bool:
    """Whether attention takes a row's padding to be at its end: see ``cache_slots.ROWS_KEY``."""
    return ROWS_KEY in onnx_ir.load(folder / MODEL_FILE).metadata_props


def copy_side_files(source: str | None, folder: Path) -> list[str]:
    """Copy tokenizer and configuration files of the source's folder, if it has one, and what
    sentence-transformers runs behind the model, such as ``2_Dense``.

    A link that leads out of the model's own files is not followed, as what lies there was never
    given: the names of those are returned.
    """
    links = []
    for name in (*SIDE_FILES, *_module_files(source)) if source is not None else ():
        path = Path(str(source)) / name
        if not path.is_file():
            continue
        if not is_own(path, Path(str(source))):
            links.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    _forget_quantization(folder / SIDE_FILES[0])
    return links


def _module_files(folder: str | Path) -> list[str]:
    """Names of files that ``modules.json`` of a folder says may be there, but for those that are
    in every list."""
    path = Path(folder) / "modules.json"
    try:
        modules = json.loads(path.read_bytes()) if path.is_file() else []
    except (ValueError, RecursionError):
        return []
    listed = modules if isinstance(modules, list) else []
    places = [str(module.get("path")) for module in listed if isinstance(module, dict)]
    names = [f"{place}/{file}" for place in places if _MODULE.fullmatch(place)
             for file in _MODULE_FILES]  # fmt: skip
    return [name for name in names if name not in SIDE_FILES]


def _forget_quantization(path: Path) -> None:
    """Take out of a copied config how its checkpoint was quantized: readers would look for tensors
    of that format, and the artifact is a graph."""
    config = read_json(path.parent, path.name)
    if config.keys().isdisjoint(KEYS):
        return
    kept = {key: value for key, value in config.items() if key not in KEYS}
    path.write_text(json.dumps(kept, indent=2) + "\n")

"""The tensors of a checkpoint folder as handles, from the files that transformers would read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import BadInput, Missing
from ...core.files import belongs
from ...core.weights import Weight, read_safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WRAPPERS = re.compile(r"^(?:module\.)+|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module)\.")
"""What DataParallel, ``torch.compile`` and FSDP put into the names of what they wrap."""
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Handles by the names that the files give them."""

    tensors: Mapping[str, Weight]
    files: tuple[Path, ...]
    """The files that they are in, and the index that names those."""
    notes: tuple[str, ...] = ()
    """What a person should know of the choice of files."""


def read_checkpoint(
    folder: Path, *, allow_missing: bool = False, stem: str = "model"
) -> Checkpoint | None:
    """``model.safetensors``, or whatever the library calls that, else the shards that its index
    names.

    ``None`` where there are no weights and ``allow_missing`` is set. Raises ``Missing`` for absent
    weights or shards, ``BadInput`` for damaged files, for links out of the folder and for pickled
    checkpoints, which are never unpickled: unpickling runs whatever code the file holds.
    """
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if _exists(folder / single):
        return _single(folder, single, index)
    if _exists(folder / index):
        return _read_shards(folder / index, _shards(folder / index), allow_missing)
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(others) == 1 and not pickles:
        return _single(folder, others[0], index)
    if others and not pickles:
        raise BadInput(
            f"{folder}: {len(others)} safetensors files, but neither {single} nor {index} to say "
            "which one counts"
        )
    if allow_missing:
        return None
    if pickles:
        raise BadInput(
            f"{folder}: the weights are pickled ({pickles[0]}), and pickles are never opened: they "
            "can run any code. On a machine where you trust the file, convert it: "
            "AutoModel.from_pretrained(folder).save_pretrained(out) writes safetensors"
        )
    raise Missing(
        f"{folder}: no weights ({single} or {index}); fetch them, for example with "
        "`hf download ID --local-dir FOLDER`, or use --dry-run, which needs the config only"
    )


def unwrapped(checkpoint: Checkpoint) -> tuple[Checkpoint, bool]:
    """The checkpoint by the names that its model had before something wrapped it, and whether they
    are others. Raises ``BadInput`` where two tensors get the same."""
    plain: dict[str, Weight] = {}
    wrappers: dict[str, None] = {}
    for name, weight in checkpoint.tensors.items():
        wrappers |= dict.fromkeys(_WRAPPERS.findall(name))
        short = _WRAPPERS.sub("", name)
        if short in plain:
            raise BadInput(f"{checkpoint.files[0]}: {name!r} is {short!r} in a wrapper, and both "
                           "are there")  # fmt: skip
        plain[short] = weight
    if not wrappers:
        return checkpoint, False
    note = (
        f"names of the checkpoint were read without {' and '.join(wrappers)}, of a wrapper around "
        "the model, which transformers does not take off"
    )
    return replace(checkpoint, tensors=plain, notes=(*checkpoint.notes, note)), True


def refuse_stranger(path: Path) -> None:
    """Raise ``BadInput`` for a link out of the model's own folder and the hub cache's store."""
    if not belongs(path, path.parent):
        raise BadInput(
            f"{path}: a link to {path.resolve()}, out of the model's folder: such a file is not "
            "read. Put the file itself there, or give the folder that it lies in"
        )


def _exists(path: Path) -> bool:
    """Also where it is a pipe or a device: what must not be read is not passed over."""
    return path.exists() and not path.is_dir()


def _single(folder: Path, name: str, index: str) -> Checkpoint:
    refuse_stranger(folder / name)
    notes: tuple[str, ...] = ()
    if (folder / index).exists():
        notes = (f"{name} was read, as transformers does: {index} and its shards were not",)
    return Checkpoint(dict(read_safetensors_header(folder / name)), (folder / name,), notes)


def _shards(path: Path) -> dict[str, str]:
    refuse_stranger(path)
    try:
        table = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(key): str(value) for key, value in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: no valid index (a JSON object with weight_map): {error}") from None
    strange = sorted({v for v in pairs.values() if Path(v).name != v or "\0" in v})
    if strange:
        raise BadInput(f"{path}: the shard {strange[0]!r} does not lie in the model's folder")
    return pairs


def _read_shards(index: Path, table: Mapping[str, str], allow_missing: bool) -> Checkpoint | None:
    folder = index.parent
    names = sorted(set(table.values()))
    gone = [name for name in names if not (folder / name).exists()]
    if gone and allow_missing:
        return None
    if gone:
        raise Missing(
            f"{folder}: {len(gone)} of {len(names)} shards are missing: {', '.join(gone[:5])}; "
            "fetch them, for example with `hf download ID --local-dir FOLDER`"
        )
    handles: dict[str, Weight] = {}
    for name in names:
        refuse_stranger(folder / name)
        # All that a shard holds, as transformers reads it: the index may not list it.
        tensors = dict(read_safetensors_header(folder / name))
        twice = sorted(handles.keys() & tensors.keys())
        if twice:
            raise BadInput(f"{folder / name}: the tensor {twice[0]!r} is in another shard too")
        lost = sorted(k for k, shard in table.items() if shard == name and k not in tensors)
        if lost:
            raise BadInput(
                f"{folder / name}: no tensor {lost[0]!r}, which {index.name} says is in it"
            )
        handles |= tensors
    return Checkpoint(handles, (index, *(folder / name for name in names)))

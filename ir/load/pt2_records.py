"""Sizes of a ``.pt2`` archive's records, against the file's own and against what is said of them.

Torch takes an empty record for zeros, whatever the tensor, and one that is too long for a tensor
that uses the beginning of it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput


def record_sizes(path: Path) -> dict[str, int]:
    """Bytes of each record by its name, without the folder that all lie in.

    Raises ``BadInput`` where they claim more than the file holds, as compressed ones may: torch
    writes records as they are.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {i.filename.partition("/")[2]: i.file_size for i in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise BadInput(f"{path}: not a .pt2 archive ({error})") from None
    claimed, held = sum(sizes.values()), path.stat().st_size
    if claimed > held:
        raise BadInput(
            f"{path}: its records claim {claimed} bytes, and the file holds {held}: it is "
            "compressed, which torch.export.save does not do, or damaged"
        )
    return sizes


def check_tensors(config: Any, folder: str, sizes: Mapping[str, int], path: Path) -> None:
    """Raise ``BadInput`` where a record of ``folder`` does not hold its tensors.

    ``config`` is the decoded JSON that describes them. A record must be as long as its tensors
    reach; a longer one is left to buffers and constants, which may be slices of a larger tensor.
    """
    try:
        needed = _needed(config["config"].values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(
            f"{path}: {folder} is described in a way that is not understood ({error!r})"
        ) from None
    for name, (least, exact) in needed.items():
        record = f"{folder}/{name}"
        size = sizes.get(record)
        if size is None:
            raise BadInput(f"{path}: there is no record {record}")
        if size < least or (exact and size > least):
            raise BadInput(
                f"{path}: the record {record} has {size} bytes, and its tensors take {least}: the "
                "file is damaged. Where a parameter is a slice of a larger tensor, clone it before "
                "you export the module"
            )


def _needed(payloads: Iterator[Any]) -> dict[str, tuple[int, bool]]:
    """By record, how far its tensors reach in bytes and whether a parameter is among them."""
    needed: dict[str, tuple[int, bool]] = {}
    for payload in payloads:
        if payload["use_pickle"] or payload["tensor_meta"] is None:
            continue
        name = str(payload["path_name"])
        least, exact = needed.get(name, (0, False))
        reach = max(least, _reach(payload["tensor_meta"]))
        needed[name] = reach, exact or bool(payload["is_param"])
    return needed


def _reach(meta: Mapping[str, Any]) -> int:
    """Bytes from the start of its storage to the end of a strided tensor."""
    from torch._export.serde.serialize import deserialize_scalar_type

    sizes, strides = ([int(d["as_int"]) for d in meta[key]] for key in ("sizes", "strides"))
    if 0 in sizes:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    dtype: torch.dtype = deserialize_scalar_type(meta["dtype"])
    return (int(meta["storage_offset"]["as_int"]) + last + 1) * dtype.itemsize

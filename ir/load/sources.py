"""``load``: a model by name, folder, file or factory. ``fingerprint``: what it was made from."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput, GraphwrightError, Missing, near_misses
from ..core.heap import uncollected
from ..core.view import Source, View
from .intact import open_whole
from .names import check_name, form_of
from .tracing.trace import trace
from .zoo import load_zoo


@uncollected()
def load(
    spec: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    allow_missing_weights: bool = False,
    cache: bool | None = None,
    max_bytes: int | None = None,
    part: str | None = None,
    path: str | None = None,
) -> View:
    """The graph of a model: see ``names.FORMS`` for what ``spec`` may be.

    A folder that this tool wrote gives its ``model.onnx``, if that is as it was written (see
    ``intact``). ``dtype`` overrides the dtype of a zoo or Hugging Face model;
    ``allow_missing_weights`` lets a Hugging Face folder hold its config only. A zoo or Hugging Face
    model that writes text has its key-value cache as inputs and outputs
    (``past_key_values.N.key``, ``present.N.key``), by which it decodes step by step; ``cache`` is
    false to leave it out, true to refuse a model that has none. ``max_bytes`` loads the artifact of
    a recipe with ``bitstack`` in the largest size that fits, from the beginning of its data.
    ``path`` loads another entry graph of an artifact that was made with ``--path``, by its name.
    ``part`` is ``encoder``, ``decoder`` or ``decoder_with_past`` of an encoder-decoder's folder, or
    ``sounds`` of Phi-4-multimodal's. No weight of a Hugging Face or ONNX model is taken into
    memory.

    Raises ``BadInput`` for what is damaged, unknown or unsafe, ``Missing`` for what is not there.
    """
    check_name(spec)
    if isinstance(dtype, str):  # as transformers takes it
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise BadInput(f"dtype is {dtype!r}, and must be one of torch, such as torch.float16")
    text, place, form = str(spec), Path(spec).expanduser(), form_of(spec)
    if path is not None:
        return _entry(place, path, form)
    if max_bytes is not None:
        return _cut(place, form, max_bytes)
    if part is not None and form not in ("folder", "hub"):
        raise BadInput(f"{text}: part is for the folders of encoder-decoders")
    if form == "zoo":
        return load_zoo(text.removeprefix("zoo:"), dtype=dtype, cache=cache)
    if cache and form in ("artifact", "onnx", "pt2", "factory"):
        raise BadInput(
            f"{text}: only zoo and Hugging Face models are given a cache; another graph has one, "
            "or has none"
        )
    if dtype is not None and form in ("onnx", "pt2"):
        raise BadInput(
            f"{text}: dtype is for zoo and Hugging Face models; a {place.suffix} file keeps its own"
        )
    if form == "folder":
        return _folder(place, text, trust_remote_code, dtype, allow_missing_weights, cache, part)
    if form in ("artifact", "onnx"):
        from .onnx_file import load_onnx

        if form == "artifact":
            return open_whole(place, lambda: load_onnx(place / "model.onnx"))
        return load_onnx(place)
    if form == "pt2":
        from .pt2_file import load_pt2

        return load_pt2(place)
    if form == "gguf":
        from .gguf.graph import load_gguf

        return load_gguf(place, name=text, dtype=dtype, cache=cache)
    if form == "factory":
        return _factory(text)
    from .hf.model import download

    hub = download(text)
    return _folder(hub, text, trust_remote_code, dtype, allow_missing_weights, cache, part)


def castable_from(spec: str | Path, *, trust_remote_code: bool = False) -> torch.dtype | None:
    """The float in which ``load`` takes a model where none is given, and from which it can be cast;
    ``None`` for a source that keeps its own. Nothing is traced. Raises as ``load``."""
    form = form_of(spec)
    if form == "zoo":
        return torch.float32
    if form not in ("folder", "hub"):
        return None
    from .hf.folder import folder_dtype
    from .hf.model import download

    path = Path(spec).expanduser() if form == "folder" else download(str(spec))
    return folder_dtype(path, trust_remote_code=trust_remote_code)


def _folder(
    path: Path, name: str, trust: bool, dtype: torch.dtype | None, allow: bool, cache: bool | None,
    part: str | None,
) -> View:  # fmt: skip
    from .diffusers_folder import is_diffusers, load_diffusers
    from .hf.folder import load_folder

    if is_diffusers(path):
        if cache:
            raise BadInput(f"{name}: what makes images has no cache of keys and values")
        return load_diffusers(path, name=name, dtype=dtype, allow_missing_weights=allow, part=part)
    return load_folder(
        path,
        name=name,
        trust_remote_code=trust,
        dtype=dtype,
        allow_missing_weights=allow,
        cache=cache,
        part=part,
    )


def _entry(folder: Path, name: str, form: str) -> View:
    from .entry_files import entry_path
    from .onnx_file import load_onnx

    if form != "artifact":
        raise BadInput(f"{folder}: path={name} is for artifacts, made with --path NAME=BLOCKS")
    return open_whole(folder, lambda: load_onnx(entry_path(folder, name)))


def _cut(path: Path, form: str, max_bytes: int) -> View:
    from .onnx_file import load_onnx

    if form == "artifact":
        return open_whole(path, lambda: load_onnx(path / "model.onnx", max_bytes))
    if form == "onnx":
        return load_onnx(path, max_bytes)
    raise BadInput(f"{path}: max_bytes is for artifacts, which a run of optimize-model wrote")


# --- factories ----------------------------------------------------------------------------------


def _factory(text: str) -> View:
    """Call ``package.module:factory``, the user's own code, and trace what it returns."""
    module_name, _, attribute = text.partition(":")
    product = _call_factory(text, _import(text, module_name), attribute)
    if isinstance(product, View):
        return product
    parts: tuple[Any, ...] = product if isinstance(product, tuple) else (product,)
    module, args, kwargs, shapes = (*parts, *((), None, None)[len(parts) - 1 :])[:4]
    if not isinstance(module, torch.nn.Module) or not 1 <= len(parts) <= 4:
        raise BadInput(
            f"{text} returned {type(product).__name__}; it must return a module, (module, args), "
            "(module, args, kwargs), (module, args, kwargs, dynamic_shapes), or a View"
        )
    file = inspect.getsourcefile(sys.modules[module_name])
    source = Source(
        kind="factory",
        name=text,
        files=(Path(file),) if file else (),
        source_bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
    )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise BadInput(f"{text}: kwargs must be a mapping of names, not {type(kwargs).__name__}")
    return trace(module, args, kwargs, dynamic_shapes=shapes, source=source)


def _import(text: str, name: str) -> Any:
    # A console script does not search the working directory. Last, so that it shadows nothing.
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        # Importing runs the user's code, which may raise anything.
        raise BadInput(
            f"{text}: importing {name} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)


def _call_factory(text: str, module: Any, attribute: str) -> Any:
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [n for n, v in vars(target).items() if callable(v) and not n.startswith("_")]
            raise BadInput(f"{text}: no {part!r} there; {near_misses(part, public)}".rstrip("; "))
        target = getattr(target, part)
    if not callable(target):
        raise BadInput(f"{text} is {type(target).__name__}, not a function without arguments")
    try:
        return target()
    except GraphwrightError:
        raise
    except Exception as error:
        raise BadInput(f"{text}() failed: {type(error).__name__}: {error}") from error


# --- identity -----------------------------------------------------------------------------------


def fingerprint(source: Source) -> str:
    """SHA-256 of the files behind a source, kept in ``source.sha256``; empty for memory.

    Of one file it is the file's own hash; of several, the hash of their names and hashes in order
    of names. Reads every byte: gigabytes of weights take seconds.
    """
    if source.sha256 or not source.files:
        return source.sha256
    hashes = []
    for path in sorted(source.files):
        if not path.is_file():
            raise Missing(f"{path}: the model was loaded from this file and it is gone")
        with path.open("rb") as file:
            hashes.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in hashes)
    joined = hashlib.sha256(listing.encode()).hexdigest()
    source.sha256 = hashes[0][1] if len(hashes) == 1 else joined
    return source.sha256

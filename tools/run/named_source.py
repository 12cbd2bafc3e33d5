"""The model that a manifest names. A manifest may come from anybody: its words run no code."""

from __future__ import annotations

import os
from pathlib import Path

from ...ir.core.errors import BadInput, Missing
from ...ir.core.view import View
from ...ir.load.hf.model import cached
from ...ir.load.names import form_of
from ...ir.load.sources import load

FLAG = "--trust-source"


def beside(name: str, folder: Path) -> str:
    """The path of a model or of data from an artifact's folder; empty for what is not a path."""
    path = Path(name).expanduser()
    return os.path.relpath(path.resolve(), folder.resolve()) if name and path.exists() else ""


def located(name: str, way: str, folder: Path) -> str:
    """Where a model or data lie that a manifest names: as it says, else by their way from the
    artifact in ``folder``, so that a run is repeated from any folder. ``name`` where neither
    leads to anything."""
    if Path(name).expanduser().exists() or not way:
        return name
    other = Path(os.path.normpath(folder.resolve() / way))
    return str(other) if other.exists() else name


def check_name(name: str, *, trusted: bool) -> None:
    """Refuse to load what a manifest names where that would run code or fetch a model, unless a
    person trusts it. What the manifest says of its kind counts for nothing: ``load`` goes by the
    name. Raises ``BadInput`` for a factory, ``Missing`` for a hub id that is not in the cache.
    """
    form = "" if trusted else form_of(name)
    if form == "factory":
        raise BadInput(
            f"the manifest names a factory, {name}: loading it runs that code, which may be "
            f"anyone's. Read it, then pass {FLAG}"
        )
    if form == "hub" and cached(name) is None:
        raise Missing(
            f"the manifest names a model of the hub, {name}, which is not on this machine and is "
            f"not fetched unasked: `hf download {name}`, or pass {FLAG}"
        )


def load_named(
    name: str, *, trusted: bool, cache: bool | None = None, part: str = ""
) -> View:
    """The graph of a model that a manifest names; ``trusted`` lets it run code, that of a hub model
    too. Raises as ``check_name`` and ``load``."""
    check_name(name, trusted=trusted)
    return load(name, cache=cache, trust_remote_code=trusted, part=part or None)

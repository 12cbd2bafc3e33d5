"""What a model may be called, and what is said of a name that is none: at once, without torch."""

from __future__ import annotations

import re
from pathlib import Path

from ..core.errors import BadInput, GraphwrightError, Missing, near_misses
from .zoo import ZOO, check_zoo

FORMS = (
    "zoo:NAME, a Hugging Face folder or id (organisation/name), FILE.onnx, FILE.pt2, FILE.gguf, or "
    "package.module:factory"
)
_FACTORY = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
_HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
_FILES = (".onnx", ".pt2", ".gguf")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def check_name(spec: str | Path) -> None:
    """Refuse a name that no model has. Nothing is opened.

    Raises ``BadInput`` for an empty or unknown name and for a file of a kind that is not read,
    ``Missing`` for a file that is not there.
    """
    if not isinstance(spec, str | Path):
        raise BadInput(
            f"a model is named by a text or a path, and this is a {type(spec).__name__}: give "
            f"{FORMS}; gw.trace(module, inputs) makes a graph of a torch module"
        )
    text, path, form = str(spec), Path(spec).expanduser(), form_of(spec)
    if form == "zoo":
        check_zoo(text.removeprefix("zoo:"))
    elif not text:
        raise BadInput(f"the model has an empty name; a model is {FORMS}")
    elif not form:
        unfit = path.suffix in (*_PICKLES, ".safetensors")
        raise _unfit_file(path) if unfit else _unknown(text, path)
    elif f".{form}" in _FILES and not path.is_file():
        raise Missing(f"{path}: no such file")


def form_of(spec: str | Path) -> str:
    """What ``load`` takes a name for: ``zoo``, ``folder`` (of Hugging Face), ``artifact``,
    ``onnx``, ``pt2``, ``gguf``, ``factory``, ``hub``, or ``""`` for what it refuses. Nothing is
    opened."""
    text, path = str(spec), Path(spec).expanduser()
    if text.startswith("zoo:"):
        return "zoo"
    if not text:
        return ""
    if path.is_dir():
        return "artifact" if (path / "graphwright.json").is_file() else "folder"
    if path.suffix in _FILES:
        return path.suffix.removeprefix(".")
    if re.fullmatch(_FACTORY, text):
        return "factory"
    if path.suffix in (*_PICKLES, ".safetensors"):
        return ""
    return "hub" if not path.exists() and re.fullmatch(_HUB_ID, text) else ""


def _unfit_file(path: Path) -> GraphwrightError:
    if not path.is_file():
        return Missing(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return BadInput(
            f"{path}: holds weights, but no model; give the folder with its config.json"
        )
    return BadInput(
        f"{path}: a pickled checkpoint, and pickles are never opened: they can run any code. Give "
        "a Hugging Face folder with safetensors, or save the model with "
        "torch.export.save(torch.export.export(module, args), 'model.pt2')"
    )


def _unknown(text: str, path: Path) -> GraphwrightError:
    if path.exists():
        return BadInput(f"{text}: not a kind of file that is read; a model is {FORMS}")
    if "/" in text:
        return Missing(f"{text}: no such file or folder; a model is {FORMS}")
    near = near_misses(text, [f"zoo:{name}" for name in ZOO])
    siblings = [p.name for p in Path().iterdir() if p.is_dir() or p.suffix in _FILES]
    here = near_misses(text, siblings)
    hints = [h for h in (near, here) if h.startswith("did you mean")]
    return BadInput(f"{text}: {' '.join((*hints, f'a model is {FORMS}'))}")

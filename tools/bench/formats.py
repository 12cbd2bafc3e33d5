"""``python -m graphwright.tools.bench.formats ARTIFACT --peer-python PYTHON``: written, run there.

Converts an artifact into each format and compares the logits of its own library with those of the
artifact in ONNX Runtime; and those of the folder when it is read back here. An artifact with
low-rank paths is run with its adapter. The libraries get an environment of their own::

    python -m venv PEER
    PEER/bin/pip install "torch>=2.11,<2.14" transformers compressed-tensors peft accelerate \\
        gguf xllamacpp

llama.cpp rounds the inputs of a quantized linear to 8 bits, which its figure shows; transformers,
which reads the same file, shows the file. GPTQ needs gptqmodel and optimum there; where they are
missing its row says so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...backends import compile
from ...ir.load.sources import load
from ..formats.convert import convert
from . import format_peer
from .processes import CommandFailed, environment, measure
from .showing import ended

FORMATS = ("compressed-tensors", "gptq", "gguf")


def measured(artifact: Path, peer: str, formats: Sequence[str]) -> Table:
    """A row a format: relative L2 of its logits to the artifact's, read back here and there."""
    ids = torch.arange(1, 25)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = compile(artifact)(**given)["logits"].float().numpy()
    table = Table(title=str(artifact), title_justify="left")
    for name in ("format", "read back here", "its own library"):
        table.add_column(name)
    for name in formats:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            convert(artifact, name, folder)
            adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
            here = "with the adapter, not read here"
            if adapter is None:
                here = _here(own, folder, given)
            table.add_row(name, here, _there(own, folder, adapter, peer))
    return table


def _here(own: np.ndarray, folder: Path, given: dict[str, torch.Tensor]) -> str:
    if not (folder / "config.json").is_file():
        return "not read here"
    again = compile(load(folder, dtype=torch.float32))(**given)["logits"].numpy()
    return f"{_error(own, again):.1e}"


def _there(own: np.ndarray, folder: Path, adapter: Path | None, peer: str) -> str:
    out = folder.with_suffix(".npy")
    more = [] if adapter is None else [str(adapter)]
    # -P: a module of this folder must not stand in for a library of its name.
    command = [peer, "-P", format_peer.__file__, str(folder), str(out), *more]
    try:
        measure(command, environment(None, {"PYTHONPATH": ""}))
    except CommandFailed as error:
        return str(error).strip().splitlines()[-1]
    found, said = np.load(out), ""
    llama = out.with_suffix(".llama.npy")
    if llama.is_file():
        wanted = torch.log_softmax(torch.from_numpy(own[0, -1]), -1).numpy()
        gap = np.abs(np.load(llama) - wanted[: len(np.load(llama))])
        said = f"; llama.cpp's log-probabilities {gap.mean():.1e} off, {gap.max():.1e} at most"
    return f"{_error(own, found):.1e}{said}"


def _error(own: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(other - own) / np.linalg.norm(own))


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, run and print the table."""
    parser = argparse.ArgumentParser(
        prog="formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--peer-python", required=True, help="of the libraries' environment")
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        formats = options.formats.split(",")
        console.print(measured(options.artifact, options.peer_python, formats))

    return ended(show, width=120)


if __name__ == "__main__":
    raise SystemExit(main())

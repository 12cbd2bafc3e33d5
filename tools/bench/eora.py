"""``python -m graphwright.tools.bench.eora DIR``: the cost of a calibrated run, beside one by hand.

``optimize-model DIR -r w4-eora --calib DATA -o OUT``, with its tracing, checks and artifact, beside
a straight torch script (``by_hand``) that quantizes and compensates the same model on the same
tokens and writes nothing. Both are processes of their own. ``DIR`` is a Llama or Qwen2 in the form
of ``transformers``, such as ``l01`` of ``graphwright.tools.bench.checkpoints``; the tokens are
random. The script rounds to nearest, where ``w4-eora`` searches its zero points (``hqq``): the
residual before compensation tells the two apart. ``--passes`` takes other passes for our side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...backends.onnx.model_files import MANIFEST_FILE
from ...ir.core.errors import BadInput, GraphwrightError
from .processes import OPTIMIZE_MODEL, Usage, environment, measure

RANK, GROUP = 16, 32
"""Of ``w4-eora``."""
OVERSAMPLE, ITERATIONS = 8, 2
"""Extra directions and power iterations of the randomized decomposition."""
OURS, SCRIPT = "optimize-model", "by hand"
BY_HAND = "--by-hand"
_NOTE = re.compile(r"relative error of the linears' outputs: (\S+), compensated ([^\s\"]+)")


@dataclass(frozen=True)
class Residual:
    """Mean over linears of the relative error of their outputs on the calibration data."""

    sites: int
    before: float
    after: float


@dataclass(frozen=True)
class Run:
    """One of the two and what came of it."""

    name: str
    usage: Usage
    residual: Residual


# --- by hand -------------------------------------------------------------------------------------


@dataclass
class Compensation:
    """A forward hook of every linear, in the order of the model: by the time that a linear runs,
    its inputs come from linears that are quantized and compensated already."""

    rank: int
    errors: list[tuple[float, float]] = field(default_factory=list)
    _x: torch.Tensor | None = None
    _forward: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _inverse: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(
        self, linear: torch.nn.Linear, inputs: tuple[torch.Tensor], _: torch.Tensor
    ) -> torch.Tensor:
        (x,) = inputs
        if x is not self._x:  # q, k and v have one input, gate and up another
            self._x = x
            self._decompose(x.flatten(0, -2))
        weight = linear.weight.data
        rounded = round_to_nearest(weight)
        gap = (weight - rounded) @ self._forward
        q = min(self.rank + OVERSAMPLE, *gap.shape)
        left, sigma, right = torch.svd_lowrank(gap, q, niter=ITERATIONS)
        left, sigma, right = left[:, : self.rank], sigma[: self.rank], right[:, : self.rank]
        up, down = left * sigma.sqrt(), sigma.sqrt()[:, None] * (right.T @ self._inverse)
        whole = torch.linalg.norm(weight @ self._forward)
        rest = torch.linalg.norm(gap - (left * sigma) @ right.T)
        self.errors.append((float(torch.linalg.norm(gap) / whole), float(rest / whole)))
        return torch.nn.functional.linear(x, rounded, linear.bias) + (x @ down.T) @ up.T

    def _decompose(self, rows: torch.Tensor) -> None:
        """``P = Q L^(1/2)`` and its pseudo-inverse, of the Gram matrix ``Q L Q^T``."""
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root, vectors = values[kept].sqrt(), vectors[:, kept]
        self._forward, self._inverse = vectors * root, (vectors / root).T


def round_to_nearest(weight: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """``[out, in]`` in symmetric 4 bits, a scale for each ``group`` inputs, as float again."""
    groups = weight.reshape(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def by_hand(folder: Path, ids: torch.Tensor, rank: int) -> Residual:
    """Quantize and compensate every linear but a tied head, in one run of the model on ``ids``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compensation, table = Compensation(rank), model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not table:
            module.register_forward_hook(compensation)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    before, after = zip(*compensation.errors, strict=True)
    return Residual(len(before), sum(before) / len(before), sum(after) / len(after))


# --- both ----------------------------------------------------------------------------------------


def measured(
    folder: Path,
    passes: str,
    rank: int,
    size: tuple[int, int],
    threads: int | None,
    scratch: Path | None,
) -> list[Run]:
    """Ours, then the script. Raises ``CommandFailed`` where one of them fails, ``BadInput`` where
    our manifest does not say what the compensation did."""
    env = environment(threads)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        data, out = Path(place) / "tokens.npz", Path(place) / "out"
        _write_tokens(data, folder, size)
        chosen = ["-p", passes] if passes else ["-r", "w4-eora"]
        ours = measure(
            [*OPTIMIZE_MODEL, "run", str(folder), *chosen, "--calib", str(data), "-o", str(out)],
            env,
        )
        residual = _from_manifest(json.loads((out / MANIFEST_FILE).read_text()))
        script = measure(
            [sys.executable, "-m", f"{__package__}.eora", str(folder), BY_HAND, str(data),
             "--rank", str(rank)],
            env,
        )  # fmt: skip
    (line,) = [line for line in script.output.splitlines() if line.startswith("{")]
    return [Run(OURS, ours, residual), Run(SCRIPT, script, Residual(**json.loads(line)))]


def _write_tokens(path: Path, folder: Path, size: tuple[int, int]) -> None:
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(3, vocab, size)  # above the special tokens
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))


def _from_manifest(manifest: dict[str, Any]) -> Residual:
    for step in manifest["passes"]:
        note = _NOTE.search(" ".join(step["notes"]))
        if note:
            before, after = map(float, note.groups())
            return Residual(len(step["sites"]), before, after)
    raise BadInput("no pass of the run compensates: give --passes that end with eora{rank=...}")


def table(runs: Sequence[Run]) -> Table:
    """A row a run, and ours by the script's in the last."""
    title = f"EoRA; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    result = Table(title=title, title_justify="left")
    for name in ("", "user+system s", "wall s", "peak RSS MB", "peak anonymous MB", "linears",
                 "error before", "error after"):  # fmt: skip
        result.add_column(name, justify="left" if not name else "right")
    for run in runs:
        usage, residual = run.usage, run.residual
        result.add_row(
            run.name, f"{usage.seconds:.1f}", f"{usage.wall:.1f}", f"{usage.peak_rss / 1e6:,.0f}",
            f"{usage.peak_anonymous / 1e6:,.0f}", str(residual.sites), f"{residual.before:.4f}",
            f"{residual.after:.4f}",
        )  # fmt: skip
    ours, script = runs
    ratios = (
        ours.usage.seconds / script.usage.seconds, ours.usage.wall / script.usage.wall,
        ours.usage.peak_rss / script.usage.peak_rss,
        ours.usage.peak_anonymous / script.usage.peak_anonymous,
        ours.residual.sites / script.residual.sites,
        ours.residual.before / script.residual.before, ours.residual.after / script.residual.after,
    )  # fmt: skip
    result.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="eora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("-p", "--passes", default="", help="instead of the recipe w4-eora")
    parser.add_argument("--rank", type=int, default=RANK, help="of the script")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, help="of OpenMP; as libraries choose")
    parser.add_argument("--scratch", type=Path, help="where the artifact lies until it is read")
    parser.add_argument(BY_HAND, type=Path, metavar="DATA", help="the script alone, on this data")
    options = parser.parse_args(arguments)
    if options.by_hand is not None:
        ids = torch.from_numpy(np.load(options.by_hand)["input_ids"])
        residual = by_hand(options.folder, ids, options.rank)
        sys.stdout.write(f"{json.dumps(asdict(residual))}\n")
        return 0
    try:
        runs = measured(
            options.folder, options.passes, options.rank, (options.sequences, options.length),
            options.threads, options.scratch,
        )  # fmt: skip
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    Console(width=None if sys.stdout.isatty() else 160).print(table(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

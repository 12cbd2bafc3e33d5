"""All that a GPU is to show, by one command of at most eight minutes.

``python -m graphwright.tools.bench.gpu OUT`` runs on a CUDA machine, one part after another: our
kernels against their references, all kernels against cuBLAS in bf16 and against the bandwidth that
a copy has, a decode step from a CUDA graph, the prefill of pruned image tokens on a 7B shape, and
ONNX Runtime's CUDA provider on an artifact of ``--target cuda``. It writes ``OUT/gpu.json`` and
``OUT/gpu.md``. A part that fails is told with its error, and the others run; one for which no time
is left is skipped, and told so.

``--dry`` runs every part at tiny sizes, on the CPU and under Triton's interpreter: what it shows is
that nothing crashes. Without a GPU and without ``--dry`` it ends with 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...backends.runtimes.runtime_packages import no_cuda
from ...ir.core.errors import GraphwrightError, Missing
from .gpu_setting import Row, Setting

SECONDS = 480.0
"""Of the whole command."""
LEAST = 45.0
"""A part does not begin with fewer seconds left."""
PACKAGES = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "transformers", "graphwright")

def parts() -> dict[str, Callable[[Setting], list[Row]]]:
    """By name, in order. Imported here: triton looks for its interpreter when it is imported."""
    from . import gpu_kernels, gpu_models

    return {
        "correct": gpu_kernels.correct, "bandwidth": gpu_kernels.bandwidth,
        "kernels": gpu_kernels.kernels, "decode": gpu_models.decode,
        "prefill": gpu_models.prefill, "onnxruntime": gpu_models.runtime,
    }  # fmt: skip


def run(setting: Setting, seconds: float = SECONDS) -> dict[str, Any]:
    """Every part's rows, seconds and error, and what machine it was."""
    started, entries = time.perf_counter(), {}
    for name, part in parts().items():
        begun = time.perf_counter()
        if begun - started > seconds - LEAST and not setting.dry:
            entries[name] = {"skipped": f"{seconds - (begun - started):.0f} s were left"}
            continue
        entry: dict[str, Any] = {}
        try:
            entry["rows"] = part(setting)
        except Exception as error:  # whatever one part meets, the others are run and written
            entry["failed"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = round(time.perf_counter() - begun, 1)
        entries[name] = entry
    return {"machine": machine(setting), "parts": entries}


def machine(setting: Setting) -> dict[str, Any]:
    known = {}
    for name in PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "dry": setting.dry, "python": platform.python_version(), "platform": platform.platform(),
        "packages": known, "device": "cpu, interpreted",
    }  # fmt: skip
    if setting.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(setting.device)
        facts |= {
            "device": gpu.name, "memory_bytes": gpu.total_memory, "cuda": torch.version.cuda,
            "processors": gpu.multi_processor_count, "capability": f"{gpu.major}.{gpu.minor}",
        }  # fmt: skip
    return facts


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    facts = report["machine"]
    listed = ", ".join(f"{name} {there}" for name, there in facts["packages"].items())
    lines = [f"# {facts['device']}", "", listed, ""]
    if facts["dry"]:
        lines += ["A dry run: sizes and times mean nothing.", ""]
    for name, entry in report["parts"].items():
        seconds = f" ({entry['seconds']} s)" if "seconds" in entry else ""
        lines += [f"## {name}{seconds}", ""]
        lines += [f"{what}: {entry[what]}" for what in ("failed", "skipped") if what in entry]
        rows = entry.get("rows", [])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [
            "| " + " | ".join(_shown(row.get(column, "")) for column in columns) + " |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(dry: bool) -> Setting:
    """Raises ``Missing`` where no GPU can be used, and it is not a dry run."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
        return Setting(torch.device("cpu"), dry)
    if reason := no_cuda():
        raise Missing(f"{reason}; --dry tries every part at tiny sizes without a GPU")
    return Setting(torch.device("cuda", torch.cuda.current_device()), dry)


def main(argv: Sequence[str] | None = None) -> int:
    """Write both files; 0, 1 where a part failed, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m graphwright.tools.bench.gpu")
    parser.add_argument("out", type=Path, metavar="OUT", help="A folder for gpu.json and gpu.md.")
    parser.add_argument("--dry", action="store_true", help="Tiny sizes, without a GPU.")
    options = parser.parse_args(argv)
    try:
        setting = _setting(options.dry)
    except GraphwrightError as error:
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    report = run(setting)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.out / "gpu.md").write_text(text)
    sys.stdout.write(text)
    return int(any("failed" in entry for entry in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

"""An ONNX file in, as ``torch.onnx`` exports it, and a smaller one out, run by ONNX Runtime alone.

``python -m graphwright.tools.examples.onnx_file [OUT]``. The file that goes in lies beside OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphwright as gw
import onnxruntime
import torch


def exported(path: Path) -> torch.Tensor:
    """Write a small model as ONNX; inputs for it."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)]
    x = torch.randn(4, 256)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        torch.nn.Sequential(*layers).eval(), (x,), path, input_names=["x"], output_names=["y"],
        dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip
    return x


def main(out: Path) -> tuple[int, int]:
    out.parent.mkdir(parents=True, exist_ok=True)
    original = out.with_name(f"{out.name}.onnx")
    x = exported(original)
    result = gw.optimize(original, "quantize{bits=4 group=32}", samples=[{"x": x}])
    gw.export(result.graph, out, report=result.report, samples=[{"x": x}], force=True)
    before, after = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
            ["y"], {"x": x.numpy()}
        )[0]
        for file in (original, out / "model.onnx")
    )
    error = float(abs(after - before).max() / abs(before).max())
    sizes = original.stat().st_size, sum(f.stat().st_size for f in out.glob("model.onnx*"))
    print(
        f"{original}: {sizes[0]} bytes, {out}: {sizes[1]}; largest difference {error:.3g} of the "
        "largest output"
    )
    return sizes


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out-onnx"))

"""A text model in 4 bits, with its key-value cache, that writes.

``python -m graphwright.tools.examples.text_model [OUT]``. ``OUT`` is also a folder for
onnxruntime-genai, and ``optimize-model generate OUT "prompt"`` does the same on the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphwright as gw


def main(out: Path) -> str:
    result = gw.optimize("zoo:tiny-llama", "quantize{bits=4 group=32}")
    gw.export(result.graph, out, report=result.report, force=True)
    (continuation,) = gw.generate(out, "The function returns", max_new_tokens=24)
    print(continuation.text)
    return continuation.text


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out-text"))

"""Asking for help costs what the command line itself costs: no library that computes is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "triton", "numpy")
CODE = """
import sys
from graphwright.tools.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


MISTAKES = (["--no-such-option"], ["insect"], ["zoo:minilm", "-p", "quantize{bitz=4}"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["run", "--help"], ["passes", "-h"], ["eval", "--help"],
     *MISTAKES],
    ids=" ".join,
)  # fmt: skip
def test_help_and_mistakes_load_no_heavy_library(arguments: list[str]) -> None:
    command = [sys.executable, "-c", CODE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (2 if arguments in MISTAKES else 0), done.stderr

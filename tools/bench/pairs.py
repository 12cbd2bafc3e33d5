"""Encoder-decoders in Optimum: the parts that we write against the library's greedy decoding.

``python -m graphwright.tools.bench.pairs --python ENV/bin/python [--only GLOB]``: ``ENV`` is an
environment with ``optimum-onnx``, whose bounds on torch and transformers do not fit ours. A small
model of random weights of each family is written as ``encoder_model.onnx``, ``decoder_model.onnx``
and ``decoder_with_past_model.onnx`` beside its config, opened there by ``ORTModelForSeq2SeqLM`` or
``ORTModelForSpeechSeq2Seq``, and told to go on greedily; the tokens must be the library's own. Ends
with 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ...backends.artifacts.pair import export_pair
from ...ir.core.quiet import quiet
from ...ir.load.sources import load
from .families import save
from .family_models import PAIRS

TRIED = ("t5", "bart", "marian", "whisper")
TOKENS = 12
GENERATE = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
kind, key, folder, given = sys.argv[1:]
model = globals()[kind].from_pretrained(folder, use_merged=False)
value = torch.load(given, weights_only=True)
made = model.generate(**{key: value}, do_sample=False, num_beams=1, max_new_tokens=%d)
print(json.dumps(made.tolist()))
"""


def greedy(folder: Path, name: str) -> tuple[str, torch.Tensor, list[list[int]]]:
    """The name of an input, its values, and the tokens that the library's model writes behind."""
    import transformers

    with quiet():
        model = getattr(transformers, PAIRS[name].model).from_pretrained(folder).eval()
    rng = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        value = torch.randn(2, model.config.num_mel_bins, frames, generator=rng)
    else:
        value = torch.randint(5, 90, (2, 9), generator=rng)
    key: str = model.main_input_name
    arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": TOKENS}
    with torch.no_grad(), quiet():
        return key, value, model.generate(**{key: value}, **arguments).tolist()


def judged(name: str, python: str) -> bool:
    """Whether Optimum's tokens are the library's; says both where they differ."""
    with tempfile.TemporaryDirectory(prefix="graphwright-pairs-") as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "out"
        save(PAIRS[name], folder)
        key, value, expected = greedy(folder, name)
        parts = ("encoder", "decoder", "decoder_with_past")
        export_pair({part: load(folder, part=part) for part in parts}, out)
        torch.save(value, out / "given.pt")
        kind = "SpeechSeq2Seq" if key == "input_features" else "Seq2SeqLM"
        command = [python, "-c", GENERATE % TOKENS, f"ORTModelFor{kind}", key, str(out),
                   str(out / "given.pt")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    tokens = json.loads(lines[-1]) if done.returncode == 0 and lines else done.stderr[-400:]
    equal = tokens == expected
    print(f"{name}: {'equal' if equal else f'{tokens}, not {expected}'}", flush=True)
    return equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge each family; 1 where one differs."""
    parser = argparse.ArgumentParser(prog="pairs", description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with Optimum")
    parser.add_argument("--only", default="*", metavar="GLOB", help="families of these names")
    options = parser.parse_args(arguments)
    names = [name for name in TRIED if fnmatchcase(name, options.only)]
    equal = [judged(name, options.python) for name in names]
    return int(not all(equal))


if __name__ == "__main__":
    raise SystemExit(main())

"""README's first command, and its artifact in the tools that its users have.

``python -m graphwright.tools.bench.peers --python ENV/bin/python``: ``ENV`` is an environment with
``sentence-transformers`` and ``optimum-onnx``, whose bounds on torch and transformers do not fit
ours. The artifact of ``zoo:minilm`` in 8 bits is opened by both, and its vectors are compared with
those of the source in torch. With ``--folder`` an encoder's Hugging Face folder is tried as well.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...backends.artifacts.exporting import export
from ...backends.runtimes.original import load
from ..run.named_model import optimize

RECIPE = "quantize{bits=8 group=64}"
SENTENCES = """
import sys, torch
from sentence_transformers import SentenceTransformer
made, source = (SentenceTransformer(sys.argv[i], backend=b) for i, b in ((1, "onnx"), (2, "torch")))
texts = ["A cat sits on the mat.", "The weather is fine today, is it not?", "cat"]
a, b = (torch.tensor(model.encode(texts)) for model in (made, source))
print("sentence-transformers, backend=onnx: cosines to the source", torch.cosine_similarity(a, b))
"""
FEATURES = """
import sys, torch, transformers
from optimum.onnxruntime import ORTModelForFeatureExtraction
made = ORTModelForFeatureExtraction.from_pretrained(sys.argv[1])
source = transformers.AutoModel.from_pretrained(sys.argv[2])
ids = torch.tensor([[3, 5, 7, 11], [4, 6, 8, 0]])
inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
a, b = (model(**inputs).last_hidden_state.flatten() for model in (made, source))
print("ORTModelForFeatureExtraction: cosine to the source", torch.cosine_similarity(a, b, dim=0))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with both libraries")
    parser.add_argument("--folder", help="an encoder's Hugging Face folder")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        codes = {"zoo:minilm": (SENTENCES, FEATURES), options.folder: (FEATURES,)}
        for number, (name, tried) in enumerate(codes.items()):
            if name is None:
                continue
            view = load(name)
            done = optimize(view, RECIPE)
            out = export(done.graph, Path(place) / str(number), report=done.report)
            for code in tried:
                command = [options.python, "-c", code, str(out), str(view.source.folder)]
                print(
                    name, subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )


if __name__ == "__main__":
    main()

"""A sentence encoder in 8 bits, opened in sentence-transformers.

``python -m graphwright.tools.examples.sentence_encoder [OUT]``
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphwright as gw

TEXTS = ("A cat sits on the mat.", "There is a kitten on the rug.", "Interest rates rose again.")


def main(out: Path) -> None:
    graph = gw.load("zoo:minilm")
    # Its own samples are 256 sentences; a batch of them is enough to check a pass here.
    samples = (graph.source.samples or [])[:1]
    result = gw.optimize(graph, "quantize{bits=8 group=64}", samples=samples)
    gw.export(result.graph, out, report=result.report, samples=samples, force=True)
    print(result.report)
    try:
        from optimum.onnxruntime import ORTModelForFeatureExtraction as _  # noqa: F401
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        print(f"{error}: the artifact is in {out}; to open it there:")
        print("  pip install sentence-transformers optimum-onnx")
        print(f'  SentenceTransformer("{out}", backend="onnx").encode([...])')
        return
    model = SentenceTransformer(str(out), backend="onnx")
    print(model.similarity(model.encode(TEXTS), model.encode(TEXTS)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out-encoder"))

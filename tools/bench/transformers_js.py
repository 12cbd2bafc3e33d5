"""``python -m graphwright.tools.bench.transformers_js --node FOLDER``: our folders in that library.

zoo:minilm (feature extraction) and zoo:tiny-llama (text generation) are optimized, written by
``optimize-model convert … --to transformers.js`` and run by @huggingface/transformers in node, as
its users call it: a pipeline of the folder's name, the dtype as the folder's config says. What is
compared is its vectors with those of the artifact in ONNX Runtime and of the source, and the ids
and the greedy tokens of a text. ``FOLDER`` is one in which the library is installed::

    mkdir FOLDER && cd FOLDER
    ONNXRUNTIME_NODE_INSTALL=skip npm install @huggingface/transformers
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...backends import compile, export
from ...backends.runtimes.original import load
from ...ir.core.errors import Missing
from ...ir.load.zoo.text import read_tokenizer
from ...passes.manager import optimize
from ..formats.convert import convert
from .processes import CommandFailed
from .showing import ended
from .structure_table import print_table

PACKAGE = "@huggingface/transformers"
RECIPES = {
    "fp32": "clean", "q8": "quantize{bits=8 group=64}", "q4": "quantize{bits=4 group=32}",
}  # fmt: skip
"""Of each dtype that the library knows."""
TEXTS = ("A cat sits on the mat.", "The weather is fine today, is it not?", "cat")
PROMPT, NEW = "The functions of this module", 20
SCRIPT = """
const { env, pipeline } = require("@huggingface/transformers");
const [place, name, task, texts, count] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = place;
pipeline(task, name).then(async (pipe) => {
  if (task === "feature-extraction") {
    const vectors = await pipe(JSON.parse(texts), { pooling: "mean", normalize: true });
    return { vectors: vectors.tolist() };
  }
  const inputs = pipe.tokenizer(JSON.parse(texts));
  const tokens = await pipe.model.generate(
    { ...inputs, max_new_tokens: Number(count), do_sample: false });
  return { ids: inputs.input_ids.tolist()[0].map(Number), tokens: tokens.tolist()[0].map(Number) };
}).then((answer) => console.log("\\n" + JSON.stringify(answer)));
"""


def run_there(node: Path, folder: Path, task: str, texts: object) -> Any:
    """What the library makes of a folder. Raises ``CommandFailed`` with what it said."""
    command = ["node", "-e", SCRIPT, "-", str(folder.parent), folder.name, task,
               json.dumps(texts), str(NEW)]  # fmt: skip
    env = {**os.environ, "NODE_PATH": str(node / "node_modules")}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode:
        raise CommandFailed(f"node ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def check_node(node: Path) -> None:
    """Raises ``Missing`` where node or the library is not there."""
    if shutil.which("node") is None:
        raise Missing("node is not on the PATH: it runs transformers.js")
    if not (node / "node_modules" / PACKAGE / "package.json").is_file():
        raise Missing(f"{node} has no {PACKAGE}: cd {node} && ONNXRUNTIME_NODE_INSTALL=skip npm "
                      f"install {PACKAGE}")  # fmt: skip


def vectors(node: Path, folder: Path, artifact: Any, source: Any) -> list[str]:
    """Largest difference to the artifact's vectors here, and least cosine to the source's."""
    there = torch.tensor(run_there(node, folder, "feature-extraction", TEXTS)["vectors"])
    reader = read_tokenizer(folder)
    reader.no_padding()
    encoded = [reader.encode(text).ids for text in TEXTS]
    batch = torch.zeros(len(TEXTS), max(map(len, encoded)), dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, ids in enumerate(encoded):
        batch[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    own, whole = (model(input_ids=batch, attention_mask=mask)["sentence_embedding"].float()
                  for model in (artifact, source))  # fmt: skip
    cosine = torch.cosine_similarity(there, whole).min()
    return [f"{float((there - own).abs().max()):.1e}", f"cosine {float(cosine):.6f}"]


def tokens(node: Path, folder: Path, artifact: Any, source: Any) -> list[str]:
    """Whether its greedy tokens are the artifact's here, and how many of them are the source's."""
    there = run_there(node, folder, "text-generation", PROMPT)
    prompt, after = there["ids"], there["tokens"][len(there["ids"]) :]
    if prompt != read_tokenizer(folder).encode(PROMPT).ids:
        return ["other ids of the text", ""]
    own, whole = (greedy(model, prompt, len(after)) for model in (artifact, source))
    same = sum(a == b for a, b in zip(after, whole, strict=True))
    return ["equal" if after == own else f"DIFFERENT: {after}, {own}", f"{same} of {len(after)}"]


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The most likely tokens, a whole text a step."""
    ids = list(prompt)
    for _ in range(count):
        batch = torch.tensor([ids])
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch))["logits"]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


CHECKS = {"zoo:minilm": vectors, "zoo:tiny-llama": tokens}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folders, run them and print the table."""
    parser = argparse.ArgumentParser(
        prog="transformers_js", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--node", type=Path, required=True, help="where the library is installed")
    parser.add_argument("--models", default=",".join(CHECKS))
    parser.add_argument("--markdown", action="store_true", help="the table as FORMATS.md has it")
    options = parser.parse_args(arguments)

    def rows() -> Any:
        for name in options.models.split(","):
            for dtype, recipe in RECIPES.items():
                with tempfile.TemporaryDirectory() as scratch:
                    yield [name, dtype, *_row(options.node.absolute(), name, recipe, scratch)]

    def show(console: Console) -> None:
        check_node(options.node)
        columns = ("model", "dtype", "to the artifact here", "to the source")
        print_table(columns, rows(), console, markdown=options.markdown)

    return ended(show)


def _row(node: Path, name: str, recipe: str, scratch: str) -> list[str]:
    view = load(name)
    result = optimize(view, recipe)
    artifact = export(result.graph, Path(scratch) / "artifact", report=result.report)
    folder = Path(scratch) / "folder"
    convert(artifact, "transformers.js", folder)
    return CHECKS[name](node, folder, compile(artifact), compile(view))


if __name__ == "__main__":
    raise SystemExit(main())

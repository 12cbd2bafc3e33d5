"""``python -m graphwright.tools.bench.genai_tokens ARTIFACT --peer-python PYTHON``: the same words?

onnxruntime-genai, in an environment of its own, runs an artifact's folder as it is: prompts of 1,
16 and 300 random ids, a batch of three lengths, which it pads on the right, and a text by its own
tokenizer. Their greedy tokens are held against those of the artifact without a cache, a whole
sequence a step; the text against the ``tokenizers`` package, with special tokens and without:
unless it is asked for them, onnxruntime-genai's tokenizer adds none (its pull request 1442).

``--on-cpu`` runs a folder of ``--target cuda`` on the CPU's provider, which has its nodes in half
floats: what its ``genai_config.json`` asks for is left out of a copy. ``--source FOLDER`` holds the
tokens against transformers' own model of that folder, in the artifact's dtype.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LENGTHS, ROWS, NEW = (1, 16, 300), (5, 16, 11), 20
TEXT = "The functions of this module"
LOWEST = 5
"""The first id that is drawn: those below are special ones."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and say for each prompt whether its tokens are equal; 1 where some are not."""
    parser = argparse.ArgumentParser(
        prog="genai_tokens", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--peer-python", required=True, help="of onnxruntime-genai's environment")
    parser.add_argument("--on-cpu", action="store_true", help="whatever provider it asks for")
    parser.add_argument("--source", type=Path, help="a folder of transformers to hold it against")
    options = parser.parse_args(arguments)
    from .processes import environment, measure

    with tempfile.TemporaryDirectory() as scratch:
        out, folder = Path(scratch) / "found.json", options.artifact
        if options.on_cpu:
            folder = _on_cpu(folder, Path(scratch) / "copy")
        measure([options.peer_python, "-P", __file__, str(folder), str(out)],
                environment(None, {"PYTHONPATH": ""}))  # fmt: skip
        answers = json.loads(out.read_text())
    last = _of_artifact(options.artifact) if options.source is None else _of_library(options)
    rows = _compared(options.artifact, answers, last)
    for what, equal in rows:
        sys.stdout.write(f"{what}: {'equal' if equal else 'DIFFERENT'}\n")
    return int(not all(equal for _, equal in rows))


def _on_cpu(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"].pop("session_options", None)
    path.write_text(json.dumps(config))
    return copy


Last = Callable[[Any], Any]
"""Of ids [1, tokens] the logits behind the last of them, [words]."""


def _of_artifact(folder: Path) -> Last:
    import torch

    from ...backends import compile

    run = compile(folder)
    return lambda ids: run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][0, -1]


def _of_library(options: argparse.Namespace) -> Last:
    import torch
    import transformers

    from ...ir.load.onnx_file import load_onnx

    view = load_onnx(options.artifact / "model.onnx")
    names = dict(zip(view.output_names(), view.outputs(), strict=True))
    dtype = view.type(names["logits"]).dtype
    library: Any = transformers.AutoModelForCausalLM
    model = library.from_pretrained(options.source, dtype=dtype).eval()

    def last(ids: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1]

    return last


def _compared(folder: Path, answers: dict[str, Any], last: Last) -> list[tuple[str, bool]]:
    import tokenizers

    rows = [
        (f"prompt of {len(prompt)}", _agree(folder, last, prompt, tokens[len(prompt) :]))
        for prompt, tokens in answers["prompts"]
    ]
    longest = max(ROWS)
    for prompt, tokens in zip(*answers["batch"], strict=True):
        new = tokens[longest:]
        rows.append((f"row of {len(prompt)} in a batch", _agree(folder, last, prompt, new)))
    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain, ids, tokens, text = answers["text"]
    without = reader.encode(TEXT, add_special_tokens=False).ids
    rows.append(("ids of a text, no special tokens (the default there)", plain == without))
    rows.append(("ids of a text, add_special_tokens=True", ids == reader.encode(TEXT).ids))
    rows.append(("tokens behind it", _agree(folder, last, ids, tokens[len(ids) :])))
    rows.append(("its words", text == reader.decode(tokens)))
    return rows


def _agree(folder: Path, last: Last, prompt: list[int], tokens: list[int]) -> bool:
    import torch

    ids = list(prompt)
    ends = json.loads((folder / "genai_config.json").read_text())["model"].get("eos_token_id")
    for token in tokens:
        if int(last(torch.tensor([ids])).argmax()) != token:
            return False
        if token in (ends if isinstance(ends, list) else [ends]):
            break  # what is behind it in a batch is padding
        ids.append(token)
    return bool(tokens)


def peer(folder: str, out: str) -> None:
    """In the other environment: what onnxruntime-genai writes."""
    import numpy as np
    import onnxruntime_genai as library

    config = json.loads((Path(folder) / "genai_config.json").read_text())["model"]
    model, rng = library.Model(folder), np.random.default_rng(0)

    def drawn(count: int) -> list[int]:
        return [int(i) for i in rng.integers(LOWEST, config["vocab_size"], count)]

    def written(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        settings = library.GeneratorParams(model)
        settings.set_search_options(max_length=longest + NEW, batch_size=len(prompts),
                                    do_sample=False)  # fmt: skip
        ids = np.full((len(prompts), longest), config.get("pad_token_id", 0), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        running = library.Generator(model, settings)
        running.append_tokens(ids)
        while not running.is_done():
            running.generate_next_token()
        return [[int(i) for i in running.get_sequence(row)] for row in range(len(prompts))]

    prompts = [(p := drawn(count), written([p])[0]) for count in LENGTHS]
    batch = [drawn(count) for count in ROWS]
    words = library.Tokenizer(model)
    plain = [int(i) for i in words.encode(TEXT)]
    words.update_options(add_special_tokens=True)
    ids = [int(i) for i in words.encode(TEXT)]
    text = written([ids])[0]
    Path(out).write_text(json.dumps({
        "prompts": prompts, "batch": [batch, written(batch)],
        "text": [plain, ids, text, words.decode(np.array(text, np.int32))],
    }))  # fmt: skip


if __name__ == "__main__":
    # By its path, as the other environment runs it, it is in no package.
    sys.exit(main()) if __package__ else peer(*sys.argv[1:])

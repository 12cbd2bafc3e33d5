"""``python -m graphwright.tools.bench.genai_tokens ARTIFACT --peer-python PYTHON``: the same words?

onnxruntime-genai, in an environment of its own, runs an artifact's folder as it is: prompts of 1,
16 and 300 random ids, a batch of three lengths, which it pads on the right, and a text by its own
tokenizer. Their greedy tokens are held against those of the artifact without a cache, a whole
sequence a step; the text against the ``tokenizers`` package, with special tokens and without:
unless it is asked for them, onnxruntime-genai's tokenizer adds none (its pull request 1442).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
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
    options = parser.parse_args(arguments)
    from .processes import environment, measure

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        measure([options.peer_python, "-P", __file__, str(options.artifact), str(out)],
                environment(None, {"PYTHONPATH": ""}))  # fmt: skip
        answers = json.loads(out.read_text())
    rows = _compared(options.artifact, answers)
    for what, equal in rows:
        sys.stdout.write(f"{what}: {'equal' if equal else 'DIFFERENT'}\n")
    return int(not all(equal for _, equal in rows))


def _compared(folder: Path, answers: dict[str, Any]) -> list[tuple[str, bool]]:
    import tokenizers

    rows = [
        (f"prompt of {len(prompt)}", _agree(folder, prompt, tokens[len(prompt) :]))
        for prompt, tokens in answers["prompts"]
    ]
    longest = max(ROWS)
    for prompt, tokens in zip(*answers["batch"], strict=True):
        rows.append((f"row of {len(prompt)} in a batch", _agree(folder, prompt, tokens[longest:])))
    reader = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain, ids, tokens, text = answers["text"]
    without = reader.encode(TEXT, add_special_tokens=False).ids
    rows.append(("ids of a text, no special tokens (the default there)", plain == without))
    rows.append(("ids of a text, add_special_tokens=True", ids == reader.encode(TEXT).ids))
    rows.append(("tokens behind it", _agree(folder, ids, tokens[len(ids) :])))
    rows.append(("its words", text == reader.decode(tokens)))
    return rows


def _agree(folder: Path, prompt: list[int], tokens: list[int]) -> bool:
    import torch

    from ...backends import compile

    run, ids = compile(folder), list(prompt)
    last = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    for token in tokens:
        batch = torch.tensor([ids])
        logits = run(input_ids=batch, attention_mask=torch.ones_like(batch))["logits"]
        if int(logits[0, -1].argmax()) != token:
            return False
        if token in (last if isinstance(last, list) else [last]):
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

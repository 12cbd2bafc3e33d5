"""What drafts save: ``python -m graphwright.tools.bench.speculation [MODEL [RECIPE [PATH ...]]]``.

64 prompts of English, 48 new tokens each, greedy, one thread, by the whole model and with each path
as its draft, in turns on each prompt: texts that are equal, the share of drafted tokens that was
accepted, tokens a call of the whole model, the ratio of tokens a second to the whole model's alone,
and the ratio that the costs of single calls forecast at that share. ``auto`` drafts by the first
path where that is faster.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from ...backends import compile as compile_model
from ...backends import export
from ...backends.decode import Decoder
from ...backends.sampling import Sampling
from ...backends.speculate import Speculator
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...ir.structure.recognize import last_tower, recognize
from ...passes.manager import optimize

PROMPTS, PROMPT_TOKENS, NEW = 64, 24, 48


def timed(tokens: Iterable[int]) -> tuple[list[int], float]:
    began = time.perf_counter()
    text = list(tokens)
    return text, time.perf_counter() - began


def main(model: str, recipe: str, blocks: list[str]) -> None:
    graph = load(model)
    result = optimize(graph, recipe, samples=(graph.source.samples or [])[:1] or None)
    last = len(last_tower(recognize(result.graph))) - 1
    every_other = ",".join(map(str, sorted({*range(0, last, 2), last})))
    blocks = blocks or [f"0-{last - 2},{last}", every_other, f"0,{last}"]
    paths = {f"p{number}": text for number, text in enumerate(blocks)}
    tokenizer = read_tokenizer(Path(graph.source.folder or ""))
    texts = [tokenizer.encode(text).ids[:PROMPT_TOKENS] for text in shipped_text("test")]
    prompts = [ids for ids in texts if len(ids) == PROMPT_TOKENS][:PROMPTS]
    with tempfile.TemporaryDirectory() as place:
        out = export(result.graph, Path(place) / "out", paths=paths)
        whole = compile_model(out, threads=1)
        drafts = {n: compile_model(out, path=n, threads=1) for n in paths}
    speculators = {n: Speculator(whole, run, always=True) for n, run in drafts.items()}
    speculators["auto"] = Speculator(whole, drafts["p0"], always=False)
    equal = dict.fromkeys(speculators, 0)
    seconds = dict.fromkeys([*speculators, ""], 0.0)
    counts = {name: [0, 0, 0, 0] for name in speculators}
    written = 0
    for prompt in prompts:
        steps = Decoder(whole).decode([prompt], max_new_tokens=NEW)
        expected, spent = timed(token for (token,) in steps if token is not None)
        written, seconds[""] = written + len(expected), seconds[""] + spent
        for name, speculator in speculators.items():
            text, spent = timed(speculator.write(prompt, len(prompt) + NEW, Sampling(), ()))
            equal[name] += text == expected
            seconds[name] += spent
            done = speculator.done
            row = (done.drafted, done.accepted, done.rounds, done.written)
            counts[name] = [a + b for a, b in zip(counts[name], row, strict=True)]
    print(f"{model} {recipe}: whole {written / seconds['']:.0f} tokens/s")
    for name, speculator in speculators.items():
        drafted, accepted, rounds, tokens = counts[name]
        share = accepted / max(1, drafted)
        costs = speculator.measured(prompts[0])
        count, forecast = costs.best(share)
        print(
            f"{name:5} {paths.get(name, ''):14} equal {equal[name]} of {len(prompts)}, accepted "
            f"{share:.2f}, {tokens / max(1, rounds):.2f} tokens a call, speed "
            f"{seconds[''] / seconds[name]:.2f}, forecast {forecast:.2f} ({count} drafted); ms: "
            f"step {1000 * costs.step:.2f}, draft {1000 * costs.draft:.2f}, call of "
            + ", ".join(f"{n} {1000 * s:.2f}" for n, s in costs.calls.items())
        )


if __name__ == "__main__":
    words = [*sys.argv[1:3], *["zoo:tiny-llama", "quantize{bits=4 group=32}"][len(sys.argv) - 1 :]]
    main(words[0], words[1], sys.argv[3:])

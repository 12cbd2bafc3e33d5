"""What drafts save: ``python -m graphwright.tools.bench.speculation [MODEL [RECIPE [PATH ...]]]``.

64 prompts of English, 48 new tokens each, greedy, one thread, by the whole model and with each
draft, in turns on each prompt: texts that are equal, the share of drafted tokens that was accepted,
tokens a call of the whole model, the ratio of tokens a second to the whole model's alone, and the
ratio that the costs of single calls forecast. Drafts are the paths, and ``recycle`` with trees of
the size that costs least and of 8 and 80; ``auto`` drafts by the first path or by ``recycle``,
where one of them is faster than steps. Speeds are by the processor's clock; ``itself`` is the
whole model once more, which says what they are worth. Before it the costs of calls by their
tokens, for each target, which is what the size of a tree follows from.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ...backends import Executable, export
from ...backends import compile as compile_model
from ...backends.generation.decode import Decoder
from ...backends.generation.draft_costs import Costs
from ...backends.generation.draft_path import PathDraft
from ...backends.generation.draft_recycle import Recycled
from ...backends.generation.drafts import Drafter
from ...backends.generation.sampling import Sampling
from ...backends.generation.speculate import Speculator
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer, shipped_text
from ...ir.run.batches import table_rows
from ...ir.structure.recognize import last_tower, recognize
from ...passes.manager import optimize
from ..run.machine import processor

PROMPTS, PROMPT_TOKENS, NEW = 64, 24, 48
TARGETS = ("cpu", "portable")


def plainly(whole: Executable, prompt: list[int]) -> Iterator[int]:
    """The tokens that the whole model writes behind a prompt, step by step."""
    for (token,) in Decoder(whole).decode([prompt], max_new_tokens=NEW):
        if token is not None:
            yield token


def timed(tokens: Iterable[int]) -> tuple[list[int], float]:
    began = time.thread_time()
    text = list(tokens)
    return text, time.thread_time() - began


def of_size(costs: Costs, count: int) -> Costs:
    """Costs by which every guess is of ``count`` tokens."""
    return replace(costs, calls={1: 1.0, count: 1.0, count + 1: 1e-3}, draft=0.0)


def print_curves(graph: View, words: int, prompt: list[int], place: Path) -> None:
    """For each target what calls cost, in steps of the model."""
    print(f"{processor()}, one thread: ms of a step, and calls in steps by their tokens")
    for target in TARGETS:
        run = compile_model(export(graph, place / target, target=target), threads=1)
        recycled = Recycled(run, words)
        costs = Speculator(run, {"": recycled}, always=False).measured(prompt)[""]
        count, gain = costs.best(recycled.written, recycled.most)
        curve = " ".join(f"{n}:{s / costs.step:.2f}" for n, s in costs.calls.items())
        print(f"{target:9} {1000 * costs.step:.2f} {curve}; trees of {count}, {gain:.2f}")


def main(model: str, recipe: str, blocks: list[str]) -> None:
    graph = load(model)
    samples = (graph.source.samples or [])[:1] or None
    done = optimize(graph, f"{recipe},tree-mask", samples=samples).graph
    last = len(last_tower(recognize(done))) - 1
    every_other = ",".join(map(str, sorted({*range(0, last, 2), last})))
    blocks = blocks or [f"0-{last - 2},{last}", every_other, f"0,{last}"]
    paths = {f"p{number}": text for number, text in enumerate(blocks)}
    tokenizer = read_tokenizer(Path(graph.source.folder or ""))
    texts = [tokenizer.encode(text).ids[:PROMPT_TOKENS] for text in shipped_text("test")]
    prompts = [ids for ids in texts if len(ids) == PROMPT_TOKENS][:PROMPTS]
    words = table_rows(done)["input_ids"]
    with tempfile.TemporaryDirectory() as place:
        out = export(done, Path(place) / "out", paths=paths)
        whole = compile_model(out, threads=1)
        drafts = {n: PathDraft(whole, compile_model(out, path=n, threads=1)) for n in paths}
        print_curves(done, words, prompts[0], Path(place))
    recycled = Recycled(whole, words)
    both: dict[str, Drafter] = {**drafts, "recycle": recycled}
    costs = Speculator(whole, both, always=True).measured(prompts[0])
    speculators = {n: Speculator(whole, {n: d}, always=True, costs=costs)
                   for n, d in drafts.items()}  # fmt: skip
    tree = costs["recycle"]
    for name, own in (("recycle", tree), ("recycle 8", of_size(tree, 8)),
                      ("recycle 80", of_size(tree, 80))):  # fmt: skip
        fresh = {"recycle": Recycled(whole, words)}
        speculators[name] = Speculator(whole, fresh, always=True, costs={"recycle": own})
    of_auto: dict[str, Drafter] = {"p0": drafts["p0"], "recycle": recycled}
    speculators["auto"] = Speculator(whole, of_auto, always=False, costs=costs)
    equal = dict.fromkeys(speculators, 0)
    seconds = dict.fromkeys([*speculators, "itself", ""], 0.0)
    counts = {name: [0, 0, 0, 0] for name in speculators}
    written = 0
    for prompt in prompts:
        for name in ("", "itself"):
            expected, spent = timed(plainly(whole, prompt))
            seconds[name] += spent
        written += len(expected)
        for name, speculator in speculators.items():
            text, spent = timed(speculator.write(prompt, len(prompt) + NEW, Sampling(), ()))
            equal[name] += text == expected
            seconds[name] += spent
            result = speculator.done
            row = (result.drafted, result.accepted, result.rounds, result.written)
            counts[name] = [a + b for a, b in zip(counts[name], row, strict=True)]
    itself = seconds[""] / seconds["itself"]
    print(f"{model} {recipe}: whole {written / seconds['']:.0f} tokens/s, itself {itself:.2f}")
    for name, speculator in speculators.items():
        drafted, accepted, rounds, tokens = counts[name]
        print(
            f"{name:12} {paths.get(name, ''):14} equal {equal[name]} of {len(prompts)}, accepted "
            f"{accepted / max(1, drafted):.2f} of {drafted / max(1, rounds):.1f}, "
            f"{tokens / max(1, rounds):.2f} tokens a call, speed "
            f"{seconds[''] / seconds[name]:.2f}; {speculator.done.note}"
        )
    print("chances by rank:", *(f"{chance:.3f}" for chance in fresh["recycle"].chances))


if __name__ == "__main__":
    asked = [*sys.argv[1:3], *["zoo:tiny-llama", "quantize{bits=4 group=32}"][len(sys.argv) - 1 :]]
    main(asked[0], asked[1], sys.argv[3:])

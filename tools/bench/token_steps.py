"""Whether each way to prune image tokens decodes with a cache, and goes with the other passes.

``python -m graphwright.tools.bench.token_steps [--model zoo:NAME] [--only METHOD ...]`` prints two
columns. *steps*: 32 greedy tokens after a pruned prompt, one at a time with the cache in ONNX
Runtime, against one run over prompt and tokens; the greatest relative L2 distance of logits, of a
batch of 1 and of a padded batch of 4. Methods whose score is what the prompt's last token looks at
choose anew in that one run: of them the tests know the choice (``test_methods``). *together*: what
the check of ``METHOD,drop-blocks{count=1},quantize{bits=4},eora{rank=8}`` with its cache in ONNX
Runtime gives against the rewritten graph, on the prompt and on one step.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...backends import compile as compile_model
from ...ir.core.errors import GraphwrightError
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import scenes
from ...ir.load.zoo.text import read_tokenizer
from ...ir.run.sweep import sweep
from ...ir.structure.cache_slots import empty_past, next_step
from ...passes.manager import optimize
from .showing import ended, growing

STEPS = 32
METHODS = (
    "random-tokens{keep=25%}", "uniform-tokens{keep=25%}", "fastervlm{keep=25%}",
    "fastervlm{keep=25% background=damro}", "vispruner{keep=25%}", "vtc-cls{keep=25% layers=3}",
    "fopru{keep=25%}", "fopru{keep=25% strategy=row}", "diverse{keep=25%}", "similarity{keep=25%}",
    "similarity{keep=25% merge=true}", "ui-components{keep=25%}", "tome{r=8}",
    "visual-exit{layer=3}", "no-image", "fastv{layer=2 keep=25%}", "pyramid-drop", "aim",
)
BY_LAST_TOKEN = ("fastv", "pyramid-drop", "aim")
TOGETHER = "drop-blocks{count=1},quantize{bits=4},eora{rank=8}"
Batch = dict[str, torch.Tensor]


def rows(model: str, methods: Sequence[str]) -> Iterator[Sequence[str]]:
    graph = load(model, cache=True)
    prompts = _prompts(graph)
    for method in methods:
        yield method, _steps(graph, method, prompts), _together(graph, method, prompts[1])


def _prompts(graph: View) -> list[Batch]:
    """One prompt, and four of unequal length."""
    assert graph.source.folder is not None
    tokenizer = read_tokenizer(Path(graph.source.folder))
    size = scenes.LARGE if _takes_crops(graph) else scenes.IMAGE
    asked = scenes.questions("calibration", 4, size=size)
    types = {n: graph.type(v) for n, v in zip(graph.input_names(), graph.inputs(), strict=True)}
    batches = (scenes.prompt_batches(part, tokenizer)[0] for part in (asked[:1], asked))
    return [batch | empty_past(types, batch) for batch in batches]


def _takes_crops(graph: View) -> bool:
    return any(graph.type(value).rank == 5 for value in graph.inputs())


def _steps(graph: View, method: str, prompts: Sequence[Batch]) -> str:
    if method.startswith(BY_LAST_TOKEN):
        return "by tests"
    try:
        view = optimize(graph, method, samples=[prompts[1]]).graph
    except GraphwrightError as error:
        return f"refused: {error}"
    run = compile_model(view, backend="onnxruntime")
    worst = 0.0
    for prompt in prompts:
        outputs, batch = run(**prompt), prompt
        logits, words = [outputs["logits"][:, -1]], []
        for _ in range(STEPS):
            step = next_step(batch, outputs)
            assert step is not None
            words.append(logits[-1].argmax(-1, keepdim=True))
            batch = step | {"input_ids": words[-1]}
            outputs = run(**batch)
            logits.append(outputs["logits"][:, -1])
        more = torch.cat(words, 1)
        whole = prompt | {
            "input_ids": torch.cat([prompt["input_ids"], more], 1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(more)], 1),
        }
        at_once = run(**whole)["logits"][:, -STEPS - 1 :]
        worst = max(worst, _distance(torch.stack(logits, 1), at_once))
    return f"{worst:.1e}"


def _together(graph: View, method: str, prompt: Batch) -> str:
    # Without its empty caches, of which a block that is dropped takes one away.
    prompt = {name: tensor for name, tensor in prompt.items() if "past" not in name}
    try:
        result = optimize(graph, f"{method},{TOGETHER}", samples=[prompt], calibration=[prompt])
    except GraphwrightError as error:
        return f"refused: {error}"
    run = compile_model(result.graph, backend="onnxruntime")
    worst = 0.0
    batch: Mapping[str, torch.Tensor] | None = prompt
    for _ in range(2):
        assert batch is not None
        expected = sweep(result.graph, batch)
        actual = run(**batch)
        worst = max(worst, *(_distance(actual[name], value) for name, value in expected.items()))
        batch = next_step(batch, expected)
    return f"{worst:.1e}"


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    distance = float((actual - expected).norm() / expected.norm().clamp(min=1e-9))
    return math.inf if math.isnan(distance) else distance


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:tiny-llava")
    parser.add_argument("--only", nargs="*", default=METHODS, help="methods with their options")
    options = parser.parse_args(arguments)
    title, columns = f"cache and company, {options.model}", ("method", "steps", "together")
    table = rows(options.model, options.only)
    return ended(lambda console: console.print(growing(title, columns, table)))


if __name__ == "__main__":
    sys.exit(main())

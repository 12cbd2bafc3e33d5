"""What a call of several tokens costs beside a step: ``python -m graphwright.tools.bench.call_costs
MODEL [RECIPE]``, in 4 bits where no recipe is given.

MODEL is a folder or a name; weights may be random, as times do not depend on them. Behind a text of
``HELD`` tokens calls of ``SIZES`` tokens are timed in turns with a step, in the order of the sizes,
``ROUNDS`` times; a cost is the median of a call by the step right before it, so that what else the
machine does meets both. A draft of k guesses pays where a call writes more tokens than its cost
says: printed beside it is the share of guesses in a line that must be accepted for that, guesses
taken for free (those of ``recycle`` are), and whether the priors of ``recycle`` reach it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...backends import compile as compile_model
from ...backends import export
from ...backends.generation.draft_costs import steady
from ...backends.generation.draft_recycle import CHANCES, form
from ...backends.generation.drafts import Guess
from ...backends.generation.text_calls import cache_of, called
from ...ir.load.sources import load
from ...ir.structure.costs import weight_bytes
from ...passes.manager import optimize
from ..run.machine import processor

RECIPE = "quantize{bits=4 group=32}"
SIZES = (2, 4, 8, 16, 32, 81)
HELD, ROUNDS = 64, 15


def needed(cost: float, guesses: int) -> float | None:
    """The least share of guesses in a line by which a call writes ``cost`` tokens; ``None`` where
    even all of them do not."""
    low, high = 0.0, 1.0
    if steady(high, guesses) < cost:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if steady(middle, guesses) < cost else (low, middle)
    return high


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(model: str, recipe: str) -> None:
    graph = load(model)
    done = optimize(graph, recipe).graph
    size = weight_bytes(done)
    with tempfile.TemporaryDirectory() as place:
        run = compile_model(export(done, Path(place) / "out"), threads=1)
        del graph, done
        text = [1 + i % 50 for i in range(HELD)]
        cache = cache_of(run, called(run, text, {}), HELD)
        calls = {n: Guess.line([1] * (n - 1)) for n in (1, *SIZES)}
        for guess in calls.values():
            called(run, [*text, 1], cache, guess)
        ratios: dict[int, list[float]] = {n: [] for n in calls}
        steps = []
        for _ in range(ROUNDS):
            for n, guess in calls.items():
                step = seconds(partial(called, run, [*text, 1], cache))
                steps.append(step)
                ratios[n].append(seconds(partial(called, run, [*text, 1], cache, guess)) / step)
    written = form(CHANCES, max(SIZES))[1]
    print(f"{model}, {recipe}, {size / 1e6:.0f} MB of weights, {processor()}, one thread: a step "
          f"{1000 * statistics.median(steps):.1f} ms (least {1000 * min(steps):.1f})")  # fmt: skip
    print("tokens of a call, its cost in steps, share of a line that must be accepted, tokens that "
          "recycle writes before anything is known")  # fmt: skip
    for n, row in ratios.items():
        cost = statistics.median(row)
        share = needed(cost, n - 1)
        told = "never pays" if share is None else f"{share:.2f}"
        print(f"{n:4} {cost:7.2f} {told:>10} {written[n - 1]:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else RECIPE)

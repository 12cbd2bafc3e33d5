"""What the methods do to the zoo's models, each beside its baselines.

``python -m graphwright.tools.bench.method_tables TABLE [--samples N]`` prints one table, of
``tokens``, ``crops``, ``depth``, ``rank``, ``masks``, ``low-rank``, ``structure`` or ``recipes``.
Graphs are judged in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

from ...ir.core.view import View
from ...ir.load.sources import load
from ...passes.manager import optimize
from ...passes.recipe import Recipe
from ..data import calibration
from ..evaluate import EvalResult, Subject, evaluate
from .showing import ended, growing

KEPT = ("100%", "50%", "25%", "12.5%")
TOKEN_PASSES = (
    "random-tokens", "uniform-tokens", "fastervlm", "fastervlm{background=damro}",
    "vtc-cls{layers=5}", "fopru", "diverse", "similarity", "similarity{merge=true}",
    "fastv{layer=2}",
)  # fmt: skip
STAGED = ("aim{merge=KEPT}", "globalcom2{ratio=SHARE}")
"""Methods whose number of tokens has another name; what they keep, they keep before the text."""
SCHEDULES = ("pyramid-drop", "visual-exit{layer=2}", "visual-exit{layer=4}", "no-image")
"""What keeps no share of its own; ``tome`` is among them by its own numbers."""
MERGES = ("tome{r=5}", "tome{r=10}", "tome{r=20}")
SCORES = ("influence", "angular", "random")
MOST_DROPPED = 5
BITS, RANKS = (4, 3, 2), (8, 16, 32)
MASKS = ("sparsity=0.5", "sparsity=0.6", "sparsity=0.7", "pattern=2:4")
MASK_PASSES = ("magnitude", "wanda", "wanda compare=matrix", "sparsegpt")
MASK_RANK = 16
STRUCTURE = {
    "10%": ("flap{ratio=0.1}", "flap{ratio=0.1 repair=regression}", "ziplm{speedup=1.11}",
            "drop-blocks{count=1}"),
    "20%": ("flap{ratio=0.2}", "flap{ratio=0.2 repair=regression}", "ziplm{speedup=1.25}",
            "drop-blocks{count=2}"),
    "30%": ("flap{ratio=0.3}", "flap{ratio=0.3 repair=regression}", "ziplm{speedup=1.43}",
            "drop-blocks{count=3}"),
}  # fmt: skip
"""Passes that take about one share of the blocks' weights away; ziplm counts the head's too."""
SHARES = (0.1, 0.3, 0.5)
"""Of all numbers of the matrices, what goes."""
LOW_RANK = ("low-rank{{ratio={0} {1}}}", "welore{{target={0} {1}}}",
            "low-rank{{ratio={0} whiten=gram {1}}}")  # fmt: skip
NO_HEAD = "exclude=[*lm_head*]"
RECIPES = {
    "zoo:tiny-llama": ("w8", "w4", "w4-eora"),
    "zoo:tiny-llava": ("w4", "vlm-fast", "vlm-small"),
}
"""Built-in recipes, by the model that their descriptions speak of."""

Rows = Iterable[Sequence[str]]
Judge = Callable[[View], str]


class Bench:
    """One zoo model, its calibration data, and one figure to judge rewritten graphs by."""

    def __init__(self, name: str, task: str, samples: int | None) -> None:
        self.graph = load(name, cache=False)
        self.task, self.samples = task, samples
        self.value = math.nan
        """The first figure of what was judged last."""
        self.data = calibration.read(name, self.graph).batches

    def figure(self, recipe: str | Recipe | None) -> str:
        graph = self.graph
        if recipe:
            graph = optimize(graph, recipe, calibration=self.data).graph
        return self.judge(graph)

    def judge(self, graph: View) -> str:
        folder = self.graph.source.folder
        subject = Subject.of(graph, backend="onnxruntime", tokenizer=folder)
        by_task = evaluate(subject, self.task, samples=self.samples)
        self.value = next(iter(next(iter(by_task.values())).figures.values()))
        return "  ".join(_figure(result) for result in by_task.values())

    def repaired(self, recipe: str, source: float) -> Sequence[str]:
        """The figures of a mask alone, of it refined, of it compensated, and what share of its loss
        in log perplexity the compensation recovers."""
        alone, value = self.figure(recipe), self.value
        refined = self.figure(f"{recipe},dsnot")
        compensated = self.figure(f"{recipe},eora{{rank={MASK_RANK}}}")
        share = math.log(value / self.value) / math.log(value / source)
        return alone, refined, compensated, f"{share:.0%}"


def tokens(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    return _pruned("zoo:tiny-llava", samples, (*TOKEN_PASSES, STAGED[0]))


def crops(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    return _pruned("zoo:tiny-llava-next", samples, (*TOKEN_PASSES, *STAGED))


def _pruned(
    name: str, samples: int | None, methods: Sequence[str]
) -> tuple[str, Sequence[str], Rows]:
    bench = Bench(name, "vqa", samples)

    def rows() -> Rows:
        yield "source", "100%", bench.figure(None)
        for method in methods:
            for keep in KEPT[1:]:
                yield method, keep, bench.figure(_with_keep(method, keep))
        for method in (*SCHEDULES, *MERGES):
            yield method, "", bench.figure(method)

    return f"right answers of {name}", ("method", "keep", "accuracy"), rows()


def depth(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    bench = Bench("zoo:tiny-llama", "perplexity", samples)

    def rows() -> Rows:
        source = bench.figure(None)
        yield "0", *[source] * len(SCORES)
        for count in range(1, MOST_DROPPED + 1):
            yield str(count), *(
                bench.figure(f"drop-blocks{{count={count} score={score}}}") for score in SCORES
            )

    return "perplexity by blocks left out", ("blocks", *SCORES), rows()


def rank(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    bench = Bench("zoo:tiny-llama", "perplexity", samples)

    def rows() -> Rows:
        yield "source", "", bench.figure(None), "", "", ""
        for bits in BITS:
            base = f"quantize{{bits={bits} group=32}}"
            alone = bench.figure(base)
            for r in RANKS:
                yield (
                    str(bits), str(r), alone, bench.figure(f"{base},svd-compensate{{rank={r}}}"),
                    bench.figure(f"{base},eora{{rank={r}}}"),
                    bench.figure(f"{base},eora{{rank={r} factor_bits=4}}"),
                )  # fmt: skip

    columns = ("bits", "rank", "quantize", "svd-compensate", "eora", "eora, factors in 4 bits")
    return "perplexity by bits and rank of the path beside them", columns, rows()


def masks(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    bench = Bench("zoo:tiny-llama", "perplexity", samples)

    def rows() -> Rows:
        yield "source", "", bench.figure(None), "", "", ""
        source = bench.value
        for how in MASKS:
            # Gradients take several times as long as all else: once, where it is said of gblm.
            for pass_ in (*MASK_PASSES, *(["gblm"] if how == MASKS[-1] else [])):
                method, _, option = pass_.partition(" ")
                if option and not how.startswith("sparsity"):
                    continue
                recipe = f"{method}{{{how} {option} {NO_HEAD}}}"
                yield how, pass_, *bench.repaired(recipe, source)

    columns = (
        "zeros", "mask", "alone", "with dsnot", f"with eora {MASK_RANK}", "of the loss recovered"
    )  # fmt: skip
    return "perplexity by mask, the head left out", columns, rows()


def low_rank(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    bench = Bench("zoo:tiny-llama", "perplexity", samples)

    def rows() -> Rows:
        yield "0", *[bench.figure(None)] * len(LOW_RANK)
        for share in SHARES:
            yield f"{share:.0%}", *(bench.figure(how.format(share, NO_HEAD)) for how in LOW_RANK)

    columns = ("numbers gone", "uniform SVD", "welore", "whitened")
    return "perplexity by ranks, the head left out", columns, rows()


def structure(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    bench = Bench("zoo:tiny-llama", "perplexity", samples)

    def rows() -> Rows:
        yield "0", *[bench.figure(None)] * 4
        for share, passes in STRUCTURE.items():
            yield share, *(bench.figure(one) for one in passes)

    columns = ("weights gone", "flap", "flap, regression", "ziplm", "drop-blocks")
    return "perplexity by what is taken away", columns, rows()


def recipes(samples: int | None) -> tuple[str, Sequence[str], Rows]:
    def rows() -> Rows:
        for name, chosen in RECIPES.items():
            task = "vqa" if name == "zoo:tiny-llava" else "perplexity,recall"
            bench = Bench(name, task, samples)
            yield name, "source", bench.figure(None)
            for recipe in chosen:
                yield name, recipe, bench.figure(Recipe.load(recipe))

    return "built-in recipes", ("model", "recipe", "figures"), rows()


TABLES = {
    "tokens": tokens, "crops": crops, "depth": depth, "rank": rank, "masks": masks,
    "low-rank": low_rank, "structure": structure, "recipes": recipes,
}  # fmt: skip


def _with_keep(method: str, keep: str) -> str:
    if "KEPT" in method or "SHARE" in method:
        share = float(keep.rstrip("%")) / 100
        return method.replace("KEPT", keep).replace("SHARE", f"{share:g}")
    return f"{method[:-1]} keep={keep}}}" if method.endswith("}") else f"{method}{{keep={keep}}}"


def _figure(result: EvalResult) -> str:
    parts = []
    for name, value in result.figures.items():
        if name in result.interval:
            low, high = result.interval[name]
            parts.append(f"{value:.4g} ({low:.4g} to {high:.4g})")
    return parts[0] if result.task != "recall" else "recall " + " ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--samples", type=int, help="questions or windows of text to judge by")
    options = parser.parse_args(arguments)
    return ended(lambda console: console.print(growing(*TABLES[options.table](options.samples))))


if __name__ == "__main__":
    raise SystemExit(main())

"""``optimize-model compare-tokens``: the methods that prune image tokens side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...backends import compile as compile_model
from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, Refusal
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.structure.costs import graph_costs, sample_sizes
from ...ir.structure.recognize import recognize
from ...ir.structure.vision import ImageTokens, find_image_tokens
from ...passes.manager import optimize
from ...passes.tokens.token_pass import counted
from ..data import calibration
from ..evaluate.stats import Interval, wilson
from ..report.token_picture import draw, kept_tokens
from .frame_recipes import frame_recipes, has_frames
from .prefill import Prefill, Stopwatch, clock_words
from .token_judges import Verdict, agreement, right_answers

Progress = Callable[[str, int, int], None]
BASELINE, BLIND = "random-tokens", "no-image"
PROMPTS = 64
"""Prompts that methods are compared on where none is said."""


@dataclass(frozen=True)
class Row:
    """One method at one share of image tokens; ``recipe`` is empty for the source."""

    method: str
    keep: str
    recipe: str
    tokens: tuple[int, ...]
    """Image tokens before the first cut and behind each."""
    macs: int
    kv_bytes: int
    quality: float
    interval: Interval
    prefill_ms: float
    prefill_ratio: float = 1.0
    """To the source's prefill; of the source, what it takes once more, in another session."""
    by_type: Mapping[str, float] = field(default_factory=dict)
    """The quality on each type of question, where they have types."""
    warning: str = ""


@dataclass(frozen=True)
class Pruned:
    """A graph with fewer image tokens, or the source."""

    method: str
    keep: str
    recipe: str
    view: View
    tokens: tuple[int, ...]


@dataclass
class Comparison:
    """All rows, the source's first, and the methods that do not fit."""

    model: str
    quality: str
    """What is measured, in words."""
    prompts: int
    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clock: str = ""
    """What prefill is timed by, in words."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    model: str, data: str, keeps: Sequence[str], *, vqa: bool, samples: int | None, rounds: int,
    progress: Progress, threads: int | None = None, trust_remote_code: bool = False,
    picture: Path | None = None, only: Collection[str] = (),
) -> Comparison:  # fmt: skip
    """Prune ``model`` by every method that fits it, or by the passes ``only``, at each share of
    ``keeps``.

    ``data`` are prompts with their images (``--calib``). All graphs run in ONNX Runtime; prefill is
    the median of ``rounds`` runs of one prompt, in turns with the source: by the clock, or on one
    of ``threads`` by the processor's time, which other work hardly disturbs. ``picture`` is an SVG
    to write: that prompt's image with the tokens marked that each method keeps. Raises ``BadInput``
    for a model without image tokens and a share that keeps none.
    """
    graph = load(model, cache=False, trust_remote_code=trust_remote_code)
    images = find_images(graph)
    batches = calibration.read(data, graph, samples=samples or PROMPTS).batches
    prompt = one_prompt(batches[0])
    compiled = partial(compile_model, backend="onnxruntime", threads=threads)
    source = compiled(graph)
    judge = right_answers(graph, samples) if vqa else agreement(source, batches)
    stopwatch = Stopwatch(source, prompt, threads, rounds)
    comparison = Comparison(model, judge.words, judge.count, clock=clock_words(threads))
    graphs = prune(graph, images, keeps, batches[:1], comparison.refused, progress=progress,
                   only=only)  # fmt: skip
    for number, pruned in enumerate(graphs):
        progress(f"judging {pruned.method}", number, len(graphs))
        run = compiled(pruned.view)
        comparison.rows.append(_row(pruned, prompt, stopwatch(run), judge(run, pruned.view)))
    _warn(comparison)
    if picture is not None:
        kept = [
            entry for pruned in graphs[1:]
            for entry in kept_tokens(pruned.view, prompt, f"{pruned.method} at {pruned.keep}")
        ]  # fmt: skip
        picture.write_text(draw(graphs[-1].view, prompt["pixel_values"][0], kept))
        comparison.notes.append(f"kept tokens are marked in {picture}")
    return comparison


# --- which methods -------------------------------------------------------------------------------


def prune(
    graph: View, images: ImageTokens, keeps: Sequence[str],
    samples: Sequence[Mapping[str, torch.Tensor]], refused: list[tuple[str, str]], *,
    progress: Progress, only: Collection[str] = (),
) -> list[Pruned]:  # fmt: skip
    """``graph`` as it is, and by every method at each share, each checked on ``samples``; recipes
    that do not fit, and why, are added to ``refused``."""
    graphs = [Pruned("source", "", "", graph, (images.count,))]
    recipes = [r for r in _recipes(images, keeps) if not only or r[2].partition("{")[0] in only]
    truth = None
    for number, (method, keep, recipe) in enumerate(recipes):
        progress(f"pruning by {method}", number, len(recipes))
        try:
            result = optimize(graph, recipe, samples=samples, truth=truth)
        except BadInput as error:
            refused.append((recipe, str(error)))
            continue
        truth = result.truth
        sites = result.report.passes[0].result.sites
        tokens = (sites[0].shape[0], *(site.shape[1] for site in sites))
        graphs.append(Pruned(method, keep, recipe, result.graph, tokens))
    return graphs


def find_images(graph: View) -> ImageTokens:
    """The image tokens of a graph as it was loaded. Raises ``BadInput`` where it has none."""
    view = graph.copy()
    canonicalize(view)
    try:
        return find_image_tokens(view, recognize(view))
    except Refusal as refusal:
        raise BadInput(
            f"{refusal}: compare-tokens is for vision-language models, of which the tower, the "
            "projector and the language model are in one graph"
        ) from None


def _recipes(images: ImageTokens, keeps: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Method, share and recipe; every share is of the image's patches, or of the tokens that a
    block sees on average; newlines between patches stay besides."""
    blocks, tower = len(images.language), len(images.tower)
    layers = min(7, tower)
    once = (
        BASELINE, "uniform-tokens", "fastervlm", "vispruner", f"vtc-cls{{layers={layers}}}",
        "fopru", "diverse", "similarity", "similarity{merge=true}", "ui-components",
    )  # fmt: skip
    patches = images.count - images.newlines
    for keep in keeps:
        count = counted("compare-tokens", keep, patches, "keep")
        count = max(images.pictures, count - count % images.pictures)
        tokens = count + images.newlines
        for method in once:
            yield method, keep, _with(method, f"keep={count}")
        yield "fastv{layer=1}", keep, f"fastv{{layer=1 keep={tokens}}}"
        share = tokens / images.count
        if has_frames(images):
            for recipe in frame_recipes(images, count):
                yield recipe, keep, recipe
        elif images.pictures > 1:
            yield "globalcom2", keep, f"globalcom2{{ratio={count / patches:.4g}}}"
        yield "aim", keep, f"aim{{merge={count}}}"
        if blocks >= 4 and share > 0.3:
            yield "pyramid-drop", keep, f"pyramid-drop{{ratio={_ratio(share):.3g}}}"
        merged = (images.patches - count // images.pictures) // tower
        if 0 < merged <= count // images.pictures:
            yield "tome", keep, f"tome{{r={merged}}}"
        if 0 < round(share * blocks) < blocks:
            yield "visual-exit", keep, f"visual-exit{{layer={round(share * blocks)}}}"
    yield BLIND, "0%", BLIND


def _with(method: str, option: str) -> str:
    return f"{method[:-1]} {option}}}" if method.endswith("}") else f"{method}{{{option}}}"


def _ratio(share: float) -> float:
    """The ratio at which four stages keep ``share`` on average: (1 + r + r² + r³) / 4."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        kept = sum(middle**stage for stage in range(4)) / 4
        low, high = (middle, high) if kept < share else (low, middle)
    return low


# --- what is said of them ------------------------------------------------------------------------


def _row(
    pruned: Pruned, prompt: Mapping[str, torch.Tensor], time: Prefill, verdict: Verdict
) -> Row:
    raised = pruned.view.copy()
    canonicalize(raised)
    costs = graph_costs(raised, sample_sizes(raised, prompt))
    return Row(
        pruned.method, pruned.keep, pruned.recipe, pruned.tokens, costs.macs or 0,
        costs.kv_bytes or 0, verdict.right / verdict.count, wilson(verdict.right, verdict.count),
        time.ms, time.ratio, verdict.by_type,
    )  # fmt: skip


def one_prompt(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first prompt of a batch."""
    return {name: tensor[:1] for name, tensor in batch.items()}


def _warn(comparison: Comparison) -> None:
    """Say of each row whether it beats random tokens, and of the blind answers how many are right.

    A method beats random ones where their quality is below its interval.
    """
    random = {row.keep: row for row in comparison.rows if row.method == BASELINE}
    for place, row in enumerate(comparison.rows):
        rival = random.get(row.keep)
        if rival is None or row.method == BASELINE or row.interval[0] > rival.quality:
            continue
        comparison.rows[place] = Row(**{**asdict(row), "warning": "does not beat random tokens"})
    source = comparison.rows[0]
    blind = next((row for row in comparison.rows if row.method == BLIND), None)
    if blind is None or not source.quality:
        return
    share = blind.quality / source.quality
    note = f"without the image: {blind.quality:.3f}, {share:.0%} of the source's"
    if share > 0.5:
        note += ". Most points need no image: these prompts say little about image tokens"
    comparison.notes.append(note)

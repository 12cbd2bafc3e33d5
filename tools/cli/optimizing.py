"""``optimize-model run`` and ``explain``: a recipe or a budget, and a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.core.errors import BadInput
from ...ir.core.heap import uncollected
from .options import (
    Json,
    Model,
    Part,
    Passes,
    Trust,
    Verbose,
    check_choice,
    make_console,
    print_json,
    said,
)

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_RECIPE = "w8"
"""The recipe where none is given and no data either: it cuts linears to about a quarter at the
smallest error."""
DEFAULT_BUDGET = "loss=1%"
"""What is searched for where neither is given, but data: the smallest within that loss."""


def run(
    model: Model,
    recipe: Annotated[
        str, typer.Option(
            "-r", "--recipe", help="A recipe's name, or a TOML or YAML file.", callback=said
        ),
    ] = "",
    passes: Passes = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", "--output", help="Artifact folder.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Runtime that checks the artifact.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    target: Annotated[
        str, typer.Option(help="Written for: cpu, genai, cuda, or portable (standard ONNX).")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Float to load MODEL in: fp32, fp16 or bf16; default: its own.")
    ] = "",
    max_error: Annotated[
        float | None, typer.Option(help="Bound on relative L2 of any output.")
    ] = None,
    calib: Annotated[
        str, typer.Option(
            metavar="DATA", help="Data for passes that learn: a file or zoo:NAME.", callback=said
        ),
    ] = "",
    calib_samples: Annotated[int | None, typer.Option(help="Most samples; 128.")] = None,
    calib_length: Annotated[int | None, typer.Option(help="Tokens of a text; 512.")] = None,
    calib_select: Annotated[
        str, typer.Option(metavar="HOW", help="Which samples: zip-fit=FILE or most-moved.")
    ] = "",
    calib_windows: Annotated[
        str, typer.Option(metavar="HOW", help="Texts cut from their beginnings, or joined.")
    ] = "beginnings",
    original: Annotated[
        str, typer.Option(metavar="MODEL", help="What a quantized MODEL was made from, for eora.")
    ] = "",
    budget: Annotated[
        str,
        typer.Option(help="Search a recipe: bytes=25%,ms=0.5x,kv=50%,loss=1%.", callback=said),
    ] = "",
    using: Annotated[
        str,
        typer.Option(help="Knobs: tokens,layers,heads,bits,rank,cache.", callback=said),
    ] = "",
    workers: Annotated[
        str, typer.Option(metavar="N|ray", help="Processes that a search measures in.")
    ] = "",
    refine: Annotated[
        float, typer.Option(metavar="SECONDS", help="Try neighbours of what a search found.")
    ] = 0.0,
    times: Annotated[
        Path | None, typer.Option(help="Table of times for ms=, of bench --times FILE.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(
            "--eval", "--tasks", metavar="TASKS", help="Judge source and artifact: a,b.",
            callback=said,
        ),
    ] = "",
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labels of your own for it.")
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option("--cache/--no-cache", help="Key-value cache; default: if MODEL writes text."),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BLOCKS", help="A further entry graph: fast=0-3,5-9."),
    ] = None,
    part: Part = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast; read no weight.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a foreign folder.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    trust_remote_code: Trust = False,
) -> None:
    """Optimize MODEL and write the artifact to OUT."""
    from . import terminal

    console = make_console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        steps("starting", 0, 1)
        with uncollected():
            if out is not None and not (recipe or passes or budget or dry_run or original):
                calib = calib or (model if model.startswith("zoo:") else "")
                budget = DEFAULT_BUDGET if calib else ""
                if calib and not as_json:
                    _say_default(console, calib)
            # First, so that what is wrong with it is told before the rest is imported.
            chosen = _choose_recipe(recipe, passes, console, quiet=as_json or bool(budget))
            asked, knobs = _budget(budget, using, recipe=recipe or passes)
            from ...ir.core.types import FLOATS
            from ...ir.vocab.targets import TARGETS
            from ..run import pipeline
            from ..search.times import Times

        _check_backend(backend)
        check_choice("device", device, ("cpu", "cuda"))
        check_choice("target", target, tuple(TARGETS))
        if dtype:
            check_choice("dtype", dtype, tuple(FLOATS))
        if workers and asked is None:
            raise BadInput("--workers is how many processes search: give --budget too")
        if refine and asked is None:
            raise BadInput("--refine goes on from what a search found: give --budget too")
        if times is not None and (asked is None or "ms" not in asked.bounded):
            raise BadInput("--times is the table by which time is bounded: give --budget ms=0.5x")
        if max_error is not None and not max_error > 0:
            raise BadInput(f"--max-error {max_error} must be above 0")
        request = pipeline.Request(
            model, chosen, out, max_error=max_error, device=device, force=force,
            trust_remote_code=trust_remote_code, eval_tasks=_tasks(tasks), eval_data=eval_data,
            calibration=calib, calibration_samples=calib_samples, calibration_length=calib_length,
            calibration_select=calib_select, calibration_windows=calib_windows, cache=cache,
            backend=backend, resume=resume,
            target=target, original=original, budget=asked, using=knobs, dtype=dtype, part=part,
            paths=_paths(path or []),
            workers=int(workers) if workers.isdecimal() else workers or 0,
            times=None if times is None else Times.read(times), refine=refine,
        )  # fmt: skip
        if dry_run and asked is not None:
            done = pipeline.dry_search(request, steps)
        else:
            done = pipeline.dry_run(request) if dry_run else pipeline.run(request, steps)
    if as_json:
        print_json(done.to_json())
    elif dry_run:
        terminal.print_plan(make_console(), done)
    else:
        terminal.print_result(make_console(), done, str(out) if out is not None else "")
    if not as_json and done.search is not None:
        from .front_table import print_front

        print_front(make_console(), done)


def explain(
    model: Model,
    passes: Passes = "",
    recipe: Annotated[str, typer.Option("-r", "--recipe", callback=said)] = "",
    part: Part = "",
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Say what the passes would do to MODEL, at which sites, and why not at the others."""
    with uncollected():
        from ..run import pipeline
    from . import terminal

    console = make_console(stderr=True)
    chosen = _choose_recipe(recipe, passes, console, quiet=False)
    request = pipeline.Request(
        model, chosen, None, trust_remote_code=trust_remote_code, part=part
    )
    done = pipeline.dry_run(request)
    terminal.print_plan(make_console(), done)


def _paths(texts: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [text.partition("=") for text in texts]
    wrong = next((text for text, (_, sign, _) in zip(texts, pairs, strict=True) if not sign), None)
    if wrong is not None:
        raise BadInput(f"--path {wrong} has no blocks: give NAME=BLOCKS, as fast=0-3,5-9")
    names = [name for name, _, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BadInput(f"--path {twice} is given twice")
    return tuple((name, blocks) for name, _, blocks in pairs)


def _budget(text: str, using: str, *, recipe: str) -> tuple[Any, tuple[str, ...]]:
    """The budget, if any, and the knobs. Raises ``BadInput`` where a recipe is given too."""
    from ..search.budget import Budget
    from ..search.search import KNOBS

    if using and not text:
        raise BadInput("--using names the knobs of a search: give --budget too")
    if text and recipe:
        raise BadInput("--budget searches for a recipe: give it, or a recipe by -r or -p, not both")
    knobs = tuple(part.strip() for part in using.split(",")) if using else KNOBS
    return (Budget.parse(text) if text else None), knobs


def _tasks(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    from ..evaluate import task_names

    return tuple(task_names(text))


def _say_default(console: Console, calib: str) -> None:
    console.print(
        f"No recipe and no budget given: searching for the smallest artifact with a measured loss "
        f"below 1 % on {calib} (--budget {DEFAULT_BUDGET}), which takes minutes; "
        f"-r {DEFAULT_RECIPE} takes seconds.", markup=False, highlight=False,
    )  # fmt: skip


def _choose_recipe(name: str, text: str, console: Console, *, quiet: bool) -> Any:
    from ...passes.recipe import Recipe, recipe_summary

    if name and text:
        raise BadInput("give either -r or -p, not both")
    if text:
        return Recipe.parse(text)
    if name:
        return Recipe.load(name)
    chosen = Recipe.load(DEFAULT_RECIPE)
    if not quiet:
        summary = recipe_summary(DEFAULT_RECIPE)
        console.print(f"No recipe given: using {DEFAULT_RECIPE} ({chosen}). {summary} With --calib "
                      f"DATA and -o OUT the smallest within a loss of 1 % is searched for.",
                      markup=False, highlight=False)  # fmt: skip
    return chosen


def _check_backend(name: str) -> None:
    """Refuse a backend that is not there, and the one that the others are held against."""
    from ...backends import backend_names, find_backend

    check_choice("backend", name, backend_names())
    if find_backend(name).is_reference:
        raise BadInput(
            f"--backend {name}: it is what the artifact is compared with; name another one"
        )

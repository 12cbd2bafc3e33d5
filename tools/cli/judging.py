"""Commands that measure: times, tasks, and the methods that prune image tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...ir.core.errors import BadInput
from .options import (
    Model,
    Trust,
    TrustSource,
    Verbose,
    check_choice,
    checked_model,
    make_console,
    print_json,
)

LIST_TASKS = "list"
"""What ``eval --tasks`` stands for where no task is named."""


def bench(
    artifacts: Annotated[list[Path] | None, typer.Argument(metavar="OUT...")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,32",
    length: Annotated[
        int | None, typer.Option(help="Sequence length; 128, or what the model takes.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 7,
    ziplm_table: Annotated[
        Path | None,
        typer.Option(help="Write what heads and units of a MODEL cost here, for ziplm{table=}."),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(help="Write what forms of a MODEL's linears cost here, for --budget ms=."),
    ] = None,
    trust_source: TrustSource = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Time artifacts side by side with their source model; ratios, in one run."""
    if times is not None:
        _write_times(artifacts or [], times, length, device, trust_remote_code)
        return
    if ziplm_table is not None:
        _write_table(artifacts or [], ziplm_table, length, repeats, device, trust_remote_code)
        return
    from . import benchmark

    if not artifacts:
        raise BadInput("name at least one artifact folder")
    sizes = _integers("--batches", batches)
    benchmark.main(
        artifacts, sizes, length, device=device, repeats=repeats, trust_source=trust_source
    )


def _write_table(
    models: list[Path], file: Path, length: int | None, repeats: int, device: str, trust: bool
) -> None:
    from . import latency_table

    if len(models) != 1 or device != "cpu":
        raise BadInput("--ziplm-table takes one MODEL, and times it on this machine's cpu")
    name = checked_model(str(models[0]))
    latency_table.write(name, file, length=length, repeats=repeats, trust=trust)
    make_console().print(f"{file}: times of {name} for ziplm{{table={file}}}", markup=False)


def _write_times(
    models: list[Path], file: Path, length: int | None, device: str, trust: bool
) -> None:
    from . import latency_table, terminal

    if len(models) != 1 or device != "cpu":
        raise BadInput("--times takes one MODEL, and times it on this machine's cpu")
    name = checked_model(str(models[0]))
    with terminal.Steps(make_console(stderr=True), silent=False) as steps:
        latency_table.write_times(name, file, length=length, trust=trust, progress=steps)
    make_console().print(f"{file}: times of {name} for --budget ms= --times {file}", markup=False)


def evaluate(
    subjects: Annotated[list[str] | None, typer.Argument(metavar="OUT|MODEL...")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks: a,b; by itself lists them. Default: by the model's kind.")
    ] = "",
    reference: Annotated[str, typer.Option(help="The original; default: the first one.")] = "",
    samples: Annotated[int | None, typer.Option(help="Samples, in each task's unit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text, lines, inputs: see --tasks.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json.")] = "",
    window: Annotated[int | None, typer.Option(help="Tokens in a window of text.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows.")] = None,
    batch: Annotated[int, typer.Option(help="Batch of latency and memory.")] = 1,
    length: Annotated[int | None, typer.Option(help="Length of latency and memory.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of latency.")] = 15,
    interval: Annotated[
        float | None, typer.Option(help="Widest half-width of a 95 % interval that will do.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and intervals.")] = 0,
    backend: Annotated[str, typer.Option(help="Where all of them run.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="SVG of the Pareto plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data only, on stdout.")] = False,
    verbose: Verbose = False,
    trust_remote_code: Trust = False,
) -> None:
    """Judge artifacts and models side by side: quality, latency, memory, with 95 % intervals.

    With several, a Pareto plot is written (eval.svg; with --json only where --plot asks for it),
    and the comparison into the report of each artifact.
    """
    if tasks == LIST_TASKS:
        from . import listing

        listing.print_tasks(make_console())
        return
    for name in (*(subjects or ()), *((reference,) if reference else ())):
        checked_model(name)
    from ...backends import backend_names
    from ..evaluate import Setting, too_wide
    from ..run import evaluation
    from . import terminal

    check_choice("backend", backend, backend_names())
    check_choice("device", device, ("cpu", "cuda"))
    if interval is not None and not interval > 0:
        raise BadInput(f"--interval {interval} must be above 0")
    with terminal.Steps(make_console(stderr=True), silent=as_json) as steps:
        setting = Setting(
            samples=samples, data=data, window=window, stride=stride, batch=batch, length=length,
            rounds=rounds, seed=seed, progress=steps,
        )  # fmt: skip
        judged, results, original = evaluation.judge(
            subjects or [], tasks, reference, setting, tokenizer=tokenizer, backend=backend,
            device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    rows = evaluation.rows_of(judged, results)
    target = plot if plot is not None or as_json else evaluation.DEFAULT_PLOT
    written, failed = evaluation.publish(rows, original.name, target)
    if as_json:
        print_json(evaluation.to_json(rows, original.name, setting))
    else:
        terminal.print_eval(make_console(), rows, original.name)
        terminal.print_written(make_console(stderr=True), written, failed)
    wide = [] if interval is None else too_wide(judged, results, interval)
    if wide:
        raise BadInput("\n".join(wide))


def compare_tokens(
    model: Model,
    calib: Annotated[str, typer.Option(metavar="DATA", help="Prompts to compare on.")],
    keep: Annotated[str, typer.Option(help="Shares of image tokens.")] = "50%,25%,12%",
    task: Annotated[str, typer.Option("--eval", help="vqa: judge by right answers.")] = "",
    samples: Annotated[int | None, typer.Option(help="Prompts, or questions of vqa.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of a prompt.")] = 7,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="All cores otherwise; 1: prefill in processor time."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="SVG of one image with the tokens kept by each method.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data only, on stdout.")] = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Compare the methods that prune image tokens and fit MODEL: quality, cost, measured prefill.

    Quality is how often the next token is the source's, or with --eval vqa the share of right
    answers, beside what the model says without the image.
    """
    from ..run import comparing_tokens
    from . import terminal, token_table

    if task not in ("", "vqa"):
        raise BadInput(f"--eval {task} is unknown here; vqa is what image tokens are judged by")
    with terminal.Steps(make_console(stderr=True), silent=as_json) as steps:
        comparison = comparing_tokens.compare(
            model, calib, [part.strip() for part in keep.split(",")], vqa=bool(task),
            samples=samples, rounds=rounds, progress=steps, threads=threads,
            trust_remote_code=trust_remote_code, picture=picture,
        )  # fmt: skip
    if as_json:
        print_json(comparison.to_json())
    else:
        token_table.print_compared(make_console(), comparison)


def _integers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option} {text!r} must be numbers separated by commas") from None
    if min(numbers) < 1:
        raise BadInput(f"{option} {text!r} must be above 0")
    return numbers

"""What a person sees in the terminal: tables and lines from a manifest, errors, progress.

Each function writes to the ``rich`` console that it is given and fits 80 columns; a line that goes
into a pipe is not broken. Names and messages are printed as they are, never read as markup.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..report.manifest import ComparedEntry, ErrorEntry, EvaluatedEntry, ForecastEntry, Manifest
from ..report.manifest_diff import Row
from ..report.meaning import kept, meaning
from ..report.summary import (
    counted,
    duration,
    error_text,
    evaluated_text,
    heard,
    judged_on,
    magnitude,
    merged_sites,
    number,
    pass_text,
    runs,
    site_groups,
    size,
    size_change,
    split_name,
    tokens_text,
    with_weights,
    worst,
)
from ..report.visible import visible


class VisibleConsole(Console):
    """A console on which no text does anything but stand there: names come out of files."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            # Rich's own moves of the cursor are marked as such.
            plain = segment.control is not None
            yield segment if plain else segment._replace(text=visible(segment.text))


def print_result(console: Console, manifest: Manifest, folder: str = "") -> None:
    """The final message: sites, passes, refusals, verification, sizes; ``folder`` is what was
    written, if anything was."""
    print_notes(console, manifest.source.notes)
    if with_weights(merged_sites(manifest)):
        console.print(site_table(manifest))
        whole = kept(manifest)
        if whole is not None and whole.advice:
            _say(console, whole.advice)
    print_passes(console, manifest)
    print_notes(console, manifest.notes)
    print_refused(console, manifest)
    print_costs(console, manifest)
    print_verification(console, manifest)
    print_before_after(console, manifest)
    if manifest.sizes.tensors:
        print_tensors(console, manifest)
    before, after, where = manifest.sizes.source_bytes, manifest.sizes.artifact_bytes, folder
    if not after and manifest.passes:
        before, after = manifest.passes[0].bytes_before, manifest.passes[-1].bytes_after
    line = f"{'size' if folder else 'weights'}: {size(before)} -> {size(after)}"
    if before > 0 and after > 0:
        line += f" ({size_change(before, after, 'x')})"
    _say(console, f"{line}, in {where}" if where else
         f"{line}; nothing was written: -o OUT writes it", "bold")  # fmt: skip


def site_table(manifest: Manifest) -> Table:
    """One row for all changed weights of equal role, their sums, and what was kept."""
    groups = site_groups(with_weights(merged_sites(manifest)))
    timed = any(group.seconds is not None for group in groups)
    table = _table("site group", "sites", "before", "after", "bits/w", "rel. L2")
    if timed:
        table.add_column("s", justify="right", no_wrap=True)
    block = ""
    for group in groups:
        block, label = _named_row(table, block, group.name)
        cells = [
            str(group.count),
            size(group.bytes_before),
            size(group.bytes_after),
            number(group.bits_per_weight, 2),
            error_text(group.rel_l2),
        ]
        table.add_row(label, *cells, *[number(group.seconds, 1)] * timed)
    table.add_section()
    before, after = (sum(g.bytes_before for g in groups), sum(g.bytes_after for g in groups))
    total = str(sum(group.count for group in groups))
    table.add_row("all changed weights", total, size(before), size(after), style="bold")
    whole = kept(manifest)
    if whole is not None:
        table.add_row("kept as they were", "", size(whole.bytes_before), size(whole.bytes_after))
    return table


def print_tensors(console: Console, manifest: Manifest) -> None:
    """Where the artifact's bytes are, by role; why tensors are wider than they were."""
    table = _table("tensors of 1 % and more", "dtype", "count", "bytes", "share")
    block, whole = "", max(manifest.sizes.artifact_bytes, 1)
    wider: dict[str, list[str]] = {}
    for entry in manifest.sizes.tensors:
        block, label = _named_row(table, block, entry.name)
        share = f"{entry.bytes / whole:.1%}"
        table.add_row(label, entry.dtype, str(entry.count), size(entry.bytes), share)
        if entry.wider:
            wider.setdefault(entry.wider, []).append(entry.name)
    console.print(table)
    # Beside the names, reasons would leave them no room.
    for reason, names in wider.items():
        _say(console, f"takes more bytes than in the model ({reason}): {', '.join(names)}")


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """A line for each thing that a person should know of how the source was read, or the artifact
    written."""
    for note in notes:
        _say(console, f"note: {note}", "yellow")


def print_passes(console: Console, manifest: Manifest) -> None:
    """Two lines a pass: its text; then what it changed, at what error, in what time."""
    for order, step in enumerate(manifest.passes, 1):
        kind, error = "exact" if step.exact else "lossy", step.error
        changed = [counted(len(step.sites), "site")] if step.sites else []
        changed += [counted(step.edits, "rewrite")] if step.edits else []
        facts = [", ".join(changed) or "nothing changed"]
        sizes = size(step.bytes_before), size(step.bytes_after)
        if sizes[0] != sizes[1]:
            facts.append(" -> ".join(sizes))
        if error is not None:
            total = step.error_to_source
            beside = "" if total is None else f" ({error_text(total.rel_l2)} to the source)"
            facts.append(f"rel. L2 {error_text(error.rel_l2)}{beside}")
        if step.seconds is not None:
            facts.append(f"{step.seconds:.1f} s")
        _say(console, f"{order}. {pass_text(step)} ({kind})", "cyan")
        for line in ["; ".join(facts), *step.notes]:
            _say(console, f"   {line}")


def print_costs(console: Console, manifest: Manifest) -> None:
    """What one sample costs, of the source and behind each pass; what calibrated the passes."""
    data, costs = manifest.calibration, manifest.costs
    if data:
        tokens = "" if data.tokens is None else f", {data.tokens:,} tokens"
        chosen = f", chosen by {data.select}" if data.select else ""
        cut = f", {data.windows} texts" if data.windows else ""
        pairs = f", {data.pairs} of them pairs of texts" if data.pairs else ""
        _say(console,
             f"calibrated on {data.name}: {data.samples} samples{pairs}{tokens}{cut}{chosen}")
    if not costs:
        return
    table = _table("costs of one sample", "MACs", "weights", "KV cache", "tokens by block")
    for row in costs.rows:
        cache = "-" if row.kv_bytes == 0 else size(row.kv_bytes)
        cells = magnitude(row.macs), size(row.weight_bytes), cache
        table.add_row(Text(row.name), *cells, tokens_text(row.tokens))
    console.print(table)
    sizes = ", ".join(f"{name}={count}" for name, count in costs.sizes.items())
    _say(console, f"with {sizes}; {costs.convention}" if sizes else costs.convention)


def print_refused(console: Console, manifest: Manifest, *, names: int = 3) -> None:
    """Refused sites by pass and reason, with the first few names of each."""
    for order, step in enumerate(manifest.passes, 1):
        reasons: dict[str, list[str]] = {}
        for refusal in step.refused:
            reasons.setdefault(refusal.reason, []).append(refusal.site)
        for reason, sites in reasons.items():
            more = f" and {len(sites) - names} more" if len(sites) > names else ""
            listed = ", ".join(sites[:names])
            line = f"left alone by {order}. {step.name}: {listed}{more}: {reason}"
            _say(console, line, "yellow")


def print_verification(console: Console, manifest: Manifest) -> None:
    """One line on the outputs against the source, one on each run of the artifact or the graph."""
    checks = manifest.verification
    error = worst(checks.outputs)
    if error is not None:
        over = f"judged on {judged_on(checks)}" if checks.samples else "judged"
        _say(console, f"{over}: {_error_line(error)}", "green")
    if meaning(manifest):
        _say(console, meaning(manifest))
    if heard(checks):
        _say(console, heard(checks), "green" if checks.source and checks.source.by else "yellow")
    for label, difference in runs(checks):
        if difference is not None:
            _say(console, f"{label}: {_error_line(difference)}", "green")


def print_before_after(console: Console, manifest: Manifest) -> None:
    """What ``--eval`` found: a row a figure, the source and the artifact beside each other."""
    evaluations = manifest.eval
    if not evaluations:
        return
    table = _table("evaluation", "samples", "before", "after", "change")
    for task, sides in evaluations.items():
        before, after = sides.before, sides.after
        for i, name in enumerate(after.figures):
            label = f"{task}: {name}" if name != task else task
            count = f"{after.samples} {after.unit}" if i == 0 else ""
            old, new = (evaluated_text(side, name) for side in (before, after))
            table.add_row(Text(label), count, old, new, _change(before, after, name))
    console.print(table)
    _say(console, "below a figure: its 95 % interval; before and after both in ONNX Runtime")
    notes = [n for sides in evaluations.values() for n in (*sides.before.notes, *sides.after.notes)]
    for note in dict.fromkeys(notes):
        _say(console, f"note: {note}", "yellow")


def _change(before: EvaluatedEntry, after: EvaluatedEntry, name: str) -> str:
    old, new = before.figures.get(name), after.figures[name]
    return "-" if not old or new is None else f"{100 * (new / old - 1):+.1f} %"


_FIGURE_WIDTH = 18
"""A column of figures: two numbers of up to seven signs, and what lies between columns."""


def print_eval(console: Console, rows: Sequence[ComparedEntry], reference: str) -> None:
    """One row for each judged subject, one column for each headline figure; as many tables as
    the width asks for."""
    from ..evaluate import TASKS

    columns = [(task, name) for task in rows[0].results for name in TASKS[task].headlines]
    room = console.width - 10 - min(30, max(len(row.name) for row in rows))
    fitting = max(1, room // _FIGURE_WIDTH)
    for start in range(0, len(columns), fitting):
        part = columns[start : start + fitting]
        heads = [name if name == task else f"{task}\n{name}" for task, name in part]
        table = _table("", "size", *heads)
        for row in rows:
            cells = [evaluated_text(row.results[task], name) for task, name in part]
            style = "bold" if row.name == reference else ""
            table.add_row(Text(row.name), size(row.bytes), *cells, style=style)
        console.print(table)
    sizes = {t: f"{r.samples} {r.unit}" for t, r in rows[0].results.items()}
    listed = ", ".join(f"{task} on {count}" for task, count in sizes.items())
    _say(console, f"{listed}; below a figure its 95 % interval; the original is {reference}")
    notes = [note for row in rows for r in row.results.values() for note in r.notes]
    for note in dict.fromkeys(notes):
        _say(console, f"note: {note}", "yellow")


def print_written(console: Console, written: Sequence[str], failed: Sequence[str]) -> None:
    """Files that were written, and what was not."""
    if written:
        _say(console, f"written: {', '.join(written)}")
    for line in failed:
        _say(console, line, "yellow")


def print_plan(console: Console, plan: Manifest) -> None:
    """The dry run: ``plan`` is a manifest of predicted sites, with its forecast."""
    print_notes(console, plan.source.notes)
    for order, step in enumerate(plan.passes, 1):
        _say(console, f"{order}. {pass_text(step)}", "cyan")
        if not step.sites:
            continue
        table = _table("site", "kind", "shape", "before", "after", "bits/w")
        block = ""
        for site in step.sites:
            block, label = _named_row(table, block, site.name)
            shape = "x".join(str(dim) for dim in site.shape)
            amounts = site.bytes_before, site.bytes_after
            sizes = [size(amount if any(amounts) else None) for amount in amounts]
            bits = number(site.bits_per_weight, 2)
            table.add_row(label, site.kind, shape, *sizes, bits)
        console.print(table)
    print_refused(console, plan)
    if plan.predicted is not None:
        _say(console, f"predicted: {', '.join(_forecast(plan.predicted))}", "bold")
    weights = "no weights were read" if plan.search is None else "no recipe was run"
    _say(console, f"dry run: {weights} and nothing was written")


def _forecast(predicted: ForecastEntry) -> list[str]:
    facts = []
    if predicted.artifact_bytes is not None:
        facts.append(f"artifact {size(predicted.artifact_bytes)}")
    if predicted.peak_rss_bytes is not None:
        facts.append(f"peak memory {size(predicted.peak_rss_bytes)}")
    if predicted.seconds is not None:
        facts.append(f"time {duration(predicted.seconds)}")
    return facts


_LEAST_SIDE = 12
"""Letters of each side of a comparison that a name must leave."""


def print_diff(console: Console, rows: Sequence[Row], a: str, b: str) -> None:
    """The rows of ``manifest_diff.diff``, a table for each section with a column for each side."""
    if not rows:
        _say(console, f"{a} and {b} agree in all but times and memory")
        return
    _say(console, f"a: {a}")
    _say(console, f"b: {b}")
    # Names stand whole, what is left of the width is for the two sides, in all sections alike: a
    # name that would leave them none has a line of its own.
    room = console.width - 2 * _LEAST_SIDE - 4
    names = max((len(row.name) for row in rows if len(row.name) <= room), default=0)
    side = min(30, (console.width - names - 4) // 2)
    for section, members in itertools.groupby(rows, key=lambda row: row.section):
        _say(console, Text(f"\n{section}", style="bold"))
        for row in members:
            if len(row.name) > names:
                _say(console, f"  {row.name}")
            console.print(_sides(row, names, side))


def _sides(row: Row, names: int, side: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(width=names + 2)
    for _ in ("a", "b"):
        table.add_column(width=side, justify="right", overflow="fold")
    label = f"  {row.name}" if len(row.name) <= names else ""
    table.add_row(Text(label), Text(_cell(row.a)), Text(_cell(row.b)))
    return table


def bench_table(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float | None]],
    baseline: str,
    unit: str = "ms",
) -> Table:
    """Times, each with how many times faster than that of the row ``baseline`` it is.

    ``rows`` maps a label to one time for each column, ``None`` where it did not run. A cell reads
    ``2.41x 5.10``, and breaks into two lines where the terminal is narrow.
    """
    table = _table(title, *columns, fold=True)
    for label, times in rows.items():
        pairs = zip(times, rows[baseline], strict=True)
        cells = [_bench_cell(value, base) for value, base in pairs]
        table.add_row(Text(label), *cells, style="bold" if label == baseline else "")
    table.caption = Text(f"times faster than {baseline}, and {unit}", justify="left")
    return table


def _bench_cell(value: float | None, base: float | None) -> str:
    if value is None:
        return "-"
    return f"{base / value:.2f}x {value:.3g}" if base is not None and value > 0 else f"{value:.3g}"


def print_error(console: Console, error: BaseException | str, hint: str = "") -> None:
    """``error: ...`` in red; further lines of the message and ``hint`` below it, plain."""
    head, *rest = str(error).strip().splitlines() or [type(error).__name__]
    text = Text("error: ", style="bold red").append(head, style="red")
    _say(console, text)
    for line in [*rest, *hint.splitlines()]:
        _say(console, line)


class _Clock(ProgressColumn):
    """The time since the work began: rich's own stands still where a bar is full."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._began = clock, clock()

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(int(self._clock() - self._began), 60)
        return Text(f"{minutes}:{seconds:02d}")


class Steps:
    """Progress of long work: ``steps(label, done, total)`` as often as one likes.

    Nothing shows before ``after`` seconds. A terminal then gets a bar; anything else gets a plain
    line at most every ``every`` seconds. ``silent`` shows nothing at all. Use it in a ``with``.
    """

    def __init__(
        self,
        console: Console,
        *,
        silent: bool = False,
        after: float = 1.0,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._silent = console, silent
        self._after, self._every, self._clock = after, every, clock
        self._next_line = clock() + after
        self._lock = threading.Lock()
        self._closed = False
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            _Clock(clock),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None, count="")
        # The bar appears by a timer, so that one long first step does not look like a hang.
        self._timer = threading.Timer(after, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Steps:
        if not self._silent and self._console.is_terminal:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._closed = True
            self._timer.cancel()
            if self._bar.live.is_started:
                self._bar.stop()

    def __call__(self, label: str, done: int, total: int | None = None) -> None:
        """``done`` of ``total`` steps of ``label`` are over; ``total`` is ``None`` if unknown.

        The bar of one step, or of an unknown number, runs to and fro: how far it is, nobody knows.
        """
        if self._silent:
            return
        known = total if total is not None and total > 1 else None
        count = "" if known is None else f"{done}/{known}"
        self._bar.update(self._task, description=label, completed=done, total=known, count=count)
        now = self._clock()
        if self._console.is_terminal or now < self._next_line:
            return
        self._next_line = now + self._every
        _say(self._console, label if known is None else f"{label}: {done} of {known}")

    def _show(self) -> None:
        with self._lock:
            if not self._closed:
                self._bar.start()


def _error_line(error: ErrorEntry) -> str:
    rel_l2, max_abs = error_text(error.rel_l2), error_text(error.max_abs)
    return f"cosine {number(error.cosine, 6)}, rel. L2 {rel_l2}, max abs {max_abs}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else str(value)


def _say(console: Console, text: str | Text, style: str = "") -> None:
    line = text if isinstance(text, Text) else Text(text, style=style)
    console.print(line, soft_wrap=not console.is_terminal)


_LONGEST_NAME = 47
"""Letters that four columns of figures leave a name in a terminal of 80."""


def _named_row(table: Table, block: str, name: str) -> tuple[str, Text]:
    """The block and the label of a name; a row of its own tells where a new block begins.

    A long name outside of all blocks is cut at its last dot, lest it break anywhere."""
    prefix, rest = split_name(name)
    if not prefix and len(name) > _LONGEST_NAME:
        prefix, _, rest = name.rpartition(".")
    if prefix and prefix != block:
        table.add_row(Text(prefix, style="dim"))
    return prefix, Text(f"  {rest}" if prefix else rest)


def _table(first: str, *others: str, fold: bool = False) -> Table:
    """A plain table whose first column folds long names; the others do so only with ``fold``."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text(first), overflow="fold")
    for name in others:
        table.add_column(Text(name), justify="right", overflow="fold", no_wrap=not fold)
    return table

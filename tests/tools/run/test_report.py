"""The report in a real browser, and the terminal's words, from the same manifests."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.tools.cli import terminal
from graphwright.tools.report import manifest as mf
from graphwright.tools.report import plots
from graphwright.tools.report.manifest import (
    CutEntry,
    ForecastEntry,
    ImageTokensEntry,
    Manifest,
    SiteEntry,
    TensorsEntry,
    parse,
)
from graphwright.tools.report.manifest_diff import diff
from graphwright.tools.report.summary import duration, error_text, magnitude
from graphwright.tools.run import report
from rich.console import Console

Make = Callable[..., Manifest]
HOSTILE = (
    "</code></script><script>document.title='pwned';console.error('pwned')</script><img src=x>"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--v=0",
]
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Reads HTML, notes tags that do not close, attributes with addresses, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


def browser() -> str | None:
    """Path of a Chromium; ``None`` on a person's machine without one. CI must have it."""
    paths = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    path = next(filter(None, paths), None)
    if path is None and os.environ.get("CI"):
        pytest.fail("CI is set and no chromium is on PATH: apt-get install chromium")
    return path


def visit(path: str, page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    command = [path, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def shown(html: str, tmp_path: Path) -> tuple[str, list[str]]:
    """What a browser makes of the page; without a browser, the page itself and no messages."""
    chromium = browser()
    if chromium is None:
        return html, []
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    return visit(chromium, page, tmp_path / "profile")


@pytest.mark.parametrize(
    ("steps", "layers"), [(("quantize",), 6), (("clean", "quantize", "eora"), 12), (("clean",), 1)]
)
def test_page_shows_all_parts_without_console_errors(
    make_manifest: Make, tmp_path: Path, steps: tuple[str, ...], layers: int
) -> None:
    manifest = make_manifest(*steps, layers=layers)
    dom, messages = shown(report.render(manifest), tmp_path)
    assert messages == []
    page = Page(dom)
    text = " ".join(page.text.split())
    assert "zoo:minilm" in text
    assert "0.999561" in text
    assert "0.0298" in text
    assert manifest.recipe in text
    assert f"optimize-model zoo:minilm -p '{manifest.recipe}'" in text or steps == ("clean",)
    assert "ONNX Runtime, optimisation off, against the rewritten graph" in text
    for heading in ("What was done", "Error by pass", "Verification", "Graph before and after"):
        assert heading in text
    sites = 6 * layers + 1
    assert (f"All {sites} sites as a table" in text) == ("quantize" in steps)
    assert page.tags.count("svg") == (2 if "quantize" in steps else 1)
    if "quantize" in steps:
        assert page.tags.count("circle") == len(steps) - steps.count("clean") + 1 + sites
        assert text.count("linear_nbit") == sites


def test_console_errors_are_seen(tmp_path: Path) -> None:
    """The check above can fail: a page that does write an error is caught."""
    page = "<!doctype html><title>x</title><script>console.error('seen'); missing()</script>"
    _, messages = shown(page, tmp_path)
    expected = 2 if browser() else 0
    assert len(messages) == expected


def test_hostile_strings_stay_text(
    make_json: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    manifest = make_json("clean", "quantize")
    manifest["source"]["name"] = manifest["recipe"] = HOSTILE
    step = manifest["passes"][1]
    step["text"], step["notes"] = HOSTILE, [HOSTILE]
    step["sites"][0]["name"] = step["sites"][1]["kind"] = HOSTILE
    step["refused"] = [{"site": HOSTILE, "reason": HOSTILE}]
    manifest["verification"]["outputs"][0]["name"] = HOSTILE
    manifest["notes"] = [HOSTILE]
    manifest["graph_after"]["children"][0]["name"] = HOSTILE
    manifest["graph_before"]["ops"] = {HOSTILE: 1}
    manifest["versions"][HOSTILE] = HOSTILE
    manifest["machine"]["cpu"] = HOSTILE
    side = {"figures": {HOSTILE: 1.0}, "interval": {HOSTILE: [0.5, 1.5]}, "samples": 3,
            "unit": HOSTILE, "detail": {}, "notes": [HOSTILE], "seconds": 1.0}  # fmt: skip
    manifest["eval"] = {HOSTILE: {"before": side, "after": side}}
    row = {"name": HOSTILE, "kind": "", "backend": HOSTILE, "bytes": 5, "results": {}}
    manifest["comparison"] = {"reference": HOSTILE, "this": HOSTILE, "rows": [row]}
    html = report.render(parse(manifest))
    dom, messages = shown(html, tmp_path)
    assert messages == []
    page = Page(dom)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.text.count("console.error('pwned')") >= 12
    assert "<title>pwned" not in dom


def test_page_is_well_formed_and_alone(make_manifest: Make) -> None:
    html = report.render(make_manifest("clean", "quantize", "eora"))
    page = Page(html)
    assert page.wrong == []
    assert page.open == []
    assert page.links == ["data:,"]
    assert re.findall(r"https?:|//[a-z]|@import|url\(", html) == []
    assert len(html) < 200_000


def test_page_is_the_same_for_a_loaded_manifest(make_manifest: Make, tmp_path: Path) -> None:
    manifest = make_manifest("quantize")
    mf.write(tmp_path, manifest)
    path = report.write(tmp_path, manifest)
    assert path.read_text(encoding="utf-8") == report.render(mf.load(tmp_path))


def test_only_required_fields_are_needed(make_json: Callable[..., dict[str, Any]]) -> None:
    manifest = make_json("quantize")
    for key in ("created", "machine", "structure", "graph_before", "graph_after"):
        del manifest[key]
    manifest["passes"][0]["error"] = None
    manifest["verification"] = {"outputs": [], "runtime": {"optimized": None, "unoptimized": None}}
    text = Page(report.render(parse(manifest))).text
    assert "not measured" in text
    assert text.count("not run") == 2
    assert "Graph before and after" not in text


def test_tree_marks_what_changed(make_manifest: Make) -> None:
    manifest = make_manifest("quantize", layers=1)
    tree = report._tree(manifest)
    assert tree is not None
    embeddings, block, _ = tree.children
    assert (embeddings.name, embeddings.changed) == ("embeddings", False)
    assert (block.name, block.changed, block.own_changed) == ("encoder.layer.0", True, False)
    query = block.children[0].children[0].children[0]
    assert query.own_changed
    assert query.before.chips == [("linear", 1, True)]
    assert query.after.chips == [("linear_nbit", 1, True)]
    assert tree.before.nodes == tree.after.nodes
    assert manifest.graph_after is not None
    del manifest.graph_after.children[0]
    gone = report._tree(manifest)
    assert gone is not None
    assert not gone.children[0].after.present
    assert gone.children[0].changed


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.03], ["0.02", "0.05", "0.1", "0.2"]),
        ([0.0], ["0.1", "0.2", "0.5", "1"]),
        ([1e-9, 0.5], ["10⁻⁹", "10⁻⁷", "10⁻⁵", "0.001", "0.1"]),
        ([3e-7, 2e-6], ["2·10⁻⁷", "5·10⁻⁷", "10⁻⁶", "2·10⁻⁶"]),
    ],
)
def test_log_axis(values: list[float], labels: list[str]) -> None:
    axis = plots.LogAxis.over(values, 0, 100)
    ticks = axis.ticks()
    assert [tick["label"] for tick in ticks] == labels
    assert all(0 <= axis.at(v) <= 100 for v in values if v > 0)
    assert all(0 <= tick["at"] <= 100 for tick in ticks)


def test_more_groups_than_bars_are_summed(make_manifest: Make) -> None:
    manifest = make_manifest("quantize", layers=12)
    sites = manifest.passes[0].sites
    for i, site in enumerate(sites):
        site.name = f"module_{'x' * i}.dense"
    bars = report._bars(report.merged_sites(manifest))
    assert len(bars) == report.BAR_ROWS
    assert bars[-1].label == f"{len(sites) - report.BAR_ROWS + 1} smaller groups"
    assert sum(bar.count for bar in bars) == len(sites) == 73
    assert sum(bar.bytes_after for bar in bars) == sum(s.bytes_after for s in sites)


def test_bars_are_of_roles_and_cards_say_the_result(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    bars = report._bars(report.merged_sites(manifest))
    assert [(bar.heading, bar.label, bar.count) for bar in bars[-2:]] == [
        ("encoder.layer.*", "output.dense", 6), ("", "pooler.dense", 1),
    ]  # fmt: skip
    assert len(bars) == 7
    cards = {card["label"]: card["value"] for card in report._headlines(manifest)}
    assert cards == {
        "Verdict": "Close to the source", "Quality": "cosine 0.999561",
        "Size": "90.7 MB → 53.8 MB", "Speed": "not measured",
    }  # fmt: skip
    sides = [
        mf.EvaluatedEntry(
            figures={"median_ms": ms}, interval={}, samples=9, unit="rounds", detail={}, notes=[],
            seconds=1.0,
        )
        for ms in (12.0, 8.0)
    ]  # fmt: skip
    manifest.eval = {"latency": mf.BeforeAfterEntry(before=sides[0], after=sides[1])}
    *_, speed = report._headlines(manifest)
    assert (speed["value"], speed["note"][:19]) == ("12 → 8 ms", "1.50× as fast as th")


# --- the terminal --------------------------------------------------------------------------------


def console(width: int = 80, terminal_: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal_, color_system=None)


def said(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_result_fits_eighty_columns(make_manifest: Make) -> None:
    manifest = make_manifest("clean", "quantize", "eora")
    manifest.passes[1].sites[0].name = "a_very_long_module_name." * 6 + "dense"
    out = console(terminal_=True)
    terminal.print_result(out, manifest, "out4")
    text = said(out)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "encoder.layer.*",
        "  output.dense",
        "2. quantize{bits=4 group=32} (lossy)",
        "37 sites; 90.7 MB -> 53.7 MB; rel. L2 0.0160; 2.5 s",
        "3 rewrites",
        "left alone by 2. quantize: embeddings.word_embeddings: not a linear: embedding",
        "judged on 256 sentences of the model's own: cosine 0.999561, rel. L2 0.0298",
        "rel. L2 is small",
        "ONNX Runtime, optimisation off: cosine 1.000000",
        "size: 90.7 MB -> 56.5 MB (1.61x smaller), in out4",
    ):
        assert part in text, part


def test_a_result_larger_than_its_source_is_said_to_be(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    for after, said_ in ((2 * manifest.sizes.source_bytes, "2.00{} larger"),
                         (manifest.sizes.source_bytes + 1, "no smaller")):  # fmt: skip
        manifest.sizes.artifact_bytes = after
        out = console()
        terminal.print_result(out, manifest, "out4")
        assert f"({said_.format('x')}), in out4" in said(out)
        card = {card["label"]: card["note"] for card in report._headlines(manifest)}["Size"]
        assert card.startswith(said_.format("×"))


def test_notes_of_the_whole_run_stand_behind_the_passes(make_manifest: Make) -> None:
    manifest = make_manifest("quantize", "eora")
    manifest.notes = ["writing ONNX: a part of it is left out"]
    out = console()
    terminal.print_result(out, manifest, "out4")
    lines = said(out).splitlines()
    assert "note: writing ONNX: a part of it is left out" in lines
    page = Page(report.render(manifest))
    assert "writing ONNX: a part of it is left out" in page.text


def test_kept_image_tokens_are_shown(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    manifest.image_tokens = ImageTokensEntry(
        rows=1, columns=3, pictures=["QUJD", "REVG"],
        cuts=[CutEntry(name="quantize", block=2, kept=[0, 4])],
    )  # fmt: skip
    html = report.render(manifest)
    assert "from block 2: 2 of 6" in Page(html).text
    assert html.count("data:image/jpeg;base64,QUJD") == 1
    assert 'href="#picture-1"/><path class="veil" d="M0 0h1v1h-1zM2 0h1v1h-1z"' in html


def test_a_place_without_weights_has_no_row_of_sizes(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    place = SiteEntry(
        name="image tokens before block 0", kind="tokens", shape=[144, 72], bytes_before=0,
        bytes_after=0,
    )  # fmt: skip
    manifest.passes[0].sites.append(place)
    out = console()
    terminal.print_result(out, manifest, "out4")
    assert "38 sites" in said(out) and "0 bytes" not in said(out)
    page = Page(report.render(manifest)).text
    assert "changed 38 sites" in page and "All 37 sites as a table" in page
    assert "image tokens" not in page
    out = console()
    terminal.print_plan(out, manifest)
    assert "144x72" in said(out) and "0 bytes" not in said(out)


def test_plan_lists_every_site(make_manifest: Make) -> None:
    plan = make_manifest("quantize")
    plan.predicted = ForecastEntry(artifact_bytes=1000, peak_rss_bytes=2_000_000, seconds=200.2)
    out = console()
    terminal.print_plan(out, plan)
    text = said(out)
    assert text.count("384x1536") == 6
    assert text.count("attention.self.query") == 6
    assert "predicted: artifact 1.0 kB, peak memory 2.0 MB, time 3 min 21 s" in text
    assert "no weights were read" in text


def test_diff_shows_both_sides(make_manifest: Make) -> None:
    a, b = make_manifest("quantize"), make_manifest("quantize", "eora")
    out = console()
    terminal.print_diff(out, diff(a, b), "out4", "out8")
    lines = said(out).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["2", "eora:", "rank", "-", "32"] for line in lines)
    assert "sites encoder.layer.*.attention.output.dense" in lines
    out = console()
    terminal.print_diff(out, diff(a, a), "out4", "out8")
    assert "agree" in said(out)


def test_long_names_stand_whole_in_80_columns(make_manifest: Make) -> None:
    joined = "vit.layers.*.attention.q_proj+k_proj+v_proj.scales"
    patches = "vit.embeddings.patch_embeddings.projection.weight"
    a, b = make_manifest("quantize"), make_manifest("quantize")
    b.sizes.tensors = [
        TensorsEntry(name=name, dtype="f32", count=6, bytes=1000, wider="f16 before")
        for name in (joined, patches)
    ]
    out = console()
    terminal.print_tensors(out, b)
    lines = [line.strip() for line in said(out).splitlines()]
    assert any(line.startswith("attention.q_proj+k_proj+v_proj.scales ") for line in lines)
    assert "vit.embeddings.patch_embeddings.projection" in lines
    note = f"takes more bytes than in the model (f16 before): {joined}, {patches}"
    assert note in " ".join(lines)
    out = console()
    terminal.print_diff(out, diff(a, b), "out4", "out8")
    lines = said(out).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[lines.index(f"  {joined} f32") + 1].split() == ["-", "1,000"]


def test_bench_table_gives_ratios() -> None:
    out = console()
    rows = {"torch fp32": [30.0, 800.0], "artifact": [12.0, None]}
    out.print(terminal.bench_table("MiniLM", ["batch 1", "batch 32"], rows, "torch fp32"))
    text = said(out)
    assert re.search(r"torch fp32 +1\.00x 30 +1\.00x 800", text)
    assert re.search(r"artifact +2\.50x 12 +-", text)
    assert "times faster than torch fp32, and ms" in " ".join(text.split())


def test_error_is_plain_text_and_unbroken_in_a_pipe() -> None:
    out = console()
    message = "option [bold]`group`[/bold]: " + ", ".join(["48 does not divide 384"] * 8)
    terminal.print_error(out, BadInput(message + "\nuse 32 or 64"), "see `passes quantize`")
    lines = said(out).splitlines()
    assert lines[0] == "error: " + message
    assert lines[1:] == ["use 32 or 64", "see `passes quantize`"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_into_a_pipe_is_a_line_now_and_then() -> None:
    out, clock = console(), Clock()
    with terminal.Steps(out, clock=clock) as steps:
        for done in range(1, 13):
            clock.now += 1.0
            steps("quantize [x]", done, 12)
    assert said(out).splitlines() == [
        "quantize [x]: 1 of 12",
        "quantize [x]: 6 of 12",
        "quantize [x]: 11 of 12",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_of_short_or_silent_work_shows_nothing(is_terminal: bool) -> None:
    out, clock = console(terminal_=is_terminal), Clock()
    with terminal.Steps(out, clock=clock, after=3600.0) as steps:
        steps("trace", 1, 2)
    with terminal.Steps(out, silent=True, after=0.0, clock=clock) as steps:
        clock.now += 1000.0
        steps("trace", 1, 2)
    assert said(out) == ""


def test_progress_bar_on_a_terminal() -> None:
    out = console(terminal_=True)
    with terminal.Steps(out, after=0.0) as steps:
        steps("quantize [x]", 3, 7)
        steps._timer.join()
    text = said(out)
    assert "quantize [x]" in text
    assert "3/7" in text


def test_the_clock_of_a_full_bar_runs_on_and_one_step_is_not_counted() -> None:
    out, clock = console(terminal_=True), Clock()
    with terminal.Steps(out, after=0.0, clock=clock) as steps:
        steps._timer.join()
        for label, done, total in (("quantize", 7, 7), ("checking", 0, 1)):
            steps(label, done, total)
            clock.now += 61.0
            steps._bar.refresh()
    text = said(out)
    assert "7/7 1:01" in text
    assert "2:02" in text and "0/1" not in text


def test_numbers_as_text() -> None:
    assert [duration(s) for s in (0.2, 59.5, 200.2, 7500)] == [
        "1 s",
        "1 min 00 s",
        "3 min 21 s",
        "2 h 05 min",
    ]
    assert [magnitude(v) for v in (None, 999, 1_360_000_000)] == ["-", "999", "1.36 G"]
    assert [error_text(v) for v in (None, 0.0, 0.1, 123.4, 2.8e-7)] == [
        "-", "0", "0.100", "123", "2.80e-07",
    ]  # fmt: skip

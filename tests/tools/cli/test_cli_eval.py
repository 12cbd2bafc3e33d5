"""``optimize-model eval`` and ``--eval``: tables, data, files, refusals."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphwright.ir.load.zoo.text import english_sentences, read_tokenizer
from graphwright.tools.cli import terminal
from graphwright.tools.report import manifest
from graphwright.tools.report.manifest_diff import diff
from graphwright.tools.run import pipeline
from rich.console import Console


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": sentence}) for sentence in english_sentences(12)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def judged(language_model: Path, text: Path, publish: Callable[..., Path]) -> Path:
    """An artifact with before and after of three tasks, one of them on a person's own text."""
    return publish(language_model, "quantize{bits=4 group=32}", "--eval",
                   "recall,latency,perplexity", "--eval-data", str(text))  # fmt: skip


def test_before_and_after_stand_in_the_manifest(judged: Path) -> None:
    done = manifest.load(judged)
    assert done.eval is not None and set(done.eval) == {"recall", "latency", "perplexity"}
    for sides in done.eval.values():
        assert sides.before.samples == sides.after.samples > 0
    assert done.eval["recall"].before.interval["copy"][0] >= 0
    own = sum(len(read_tokenizer(judged).encode(t).ids) for t in english_sentences(12))
    assert done.eval["perplexity"].before.detail["tokens"] == own - 1
    assert done.eval["latency"].after.detail["backend"] == "onnxruntime"
    page = (judged / "report.html").read_text()
    assert '<section id="eval">' in page and "median_ms" in page
    unjudged = done.model_copy(update={"eval": None})
    assert [row.section for row in diff(done, unjudged)] == ["eval"] * 4


def test_the_final_table_shows_before_and_after(judged: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    done = manifest.load(judged)
    unwritten = done.sizes.model_copy(update={"artifact_bytes": 0})
    terminal.print_result(console, done.model_copy(update={"sizes": unwritten}))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    table = out[out.index("evaluation") :]
    assert "before" in table and "after" in table and "change" in table
    assert "latency: median_ms" in table and "15 rounds" in table
    assert "x smaller); nothing was written: -o OUT writes it" in out and " 0 bytes" not in out
    assert max(map(len, table.partition("below a figure")[0].splitlines())) <= 80


@pytest.mark.parametrize(
    ("tasks", "code", "message"),
    [("vqa", 2, "vqa does not fit"), ("perplexty", 2, "did you mean perplexity?"),
     ("recall,,embed", 2, "do: perplexity, agreement, recall, generate, outputs, latency, memory"),
     (",", 2, "name at least one task")],
)  # fmt: skip
def test_tasks_are_checked_before_any_work(
    tasks: str, code: int, message: str, language_model: Path, command: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(pipeline, "optimize", never)
    monkeypatch.setattr(pipeline, "fingerprint", never)
    status, out, err = command(str(language_model), "-p", "quantize", "-o", "o", "--eval", tasks)
    assert (status, out) == (code, "") and message in err
    assert not list(tmp_path.iterdir())


def test_eval_needs_an_artifact_and_a_tokenizer(
    language_model: Path, command: Any, tmp_path: Path
) -> None:
    code, _, err = command(str(language_model), "-p", "quantize", "--eval", "recall")
    assert code == 2 and "give its folder with -o" in err
    code, _, err = command(str(language_model), "-p", "quantize", "-o", "o", "--eval-data", "a")
    assert code == 2 and "--eval-data is what --eval TASKS judge on: name them too" in err
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((language_model / name).read_bytes())
    code, _, err = command(str(bare), "-p", "quantize", "-o", "o", "--eval", "recall")
    assert code == 3 and "no tokenizer.json in" in err
    code, _, err = command("eval", str(bare), "--tasks", "recall", "--tokenizer", str(tmp_path))
    assert code == 3 and "holds no tokenizer.json" in err
    assert not (tmp_path / "o").exists()


def test_several_side_by_side(
    language_model: Path, judged: Path, text: Path, command: Any, tmp_path: Path
) -> None:
    code, out, err = command(
        "eval", str(language_model), str(judged), "--tasks", "perplexity,agreement,latency",
        "--data", str(text), "--rounds", "3",
    )  # fmt: skip
    assert code == 0, err
    for part in ("perplexity", "agreement", "top1", "kl", "median_ms", "3 rounds"):
        assert part in out
    assert re.search(r"perplexity on \d+ windows, agreement on", out)
    assert (tmp_path / "eval.svg").is_file() and "eval.svg" in err and "report.html" in err
    done = manifest.load(judged)
    assert done.comparison is not None
    first, second = done.comparison.rows
    assert first.results["agreement"].figures == {"top1": 1.0, "kl": 0.0}
    divergence = second.results["agreement"].figures["kl"]
    assert divergence is not None and 0 < divergence < 1
    assert first.bytes is not None and second.bytes is not None and second.bytes < first.bytes
    page = (judged / "report.html").read_text()
    assert "Side by side" in page and 'aria-label="Quality against size and latency"' in page
    assert done.eval is not None and not list(judged.glob(".eval-*"))


def test_json_is_all_of_stdout(language_model: Path, text: Path, command: Any) -> None:
    arguments = ("eval", str(language_model), "--tasks", "perplexity", "--data", str(text))
    code, out, err = command(*arguments, "--json", "--samples", "6")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    (subject,) = printed["subjects"]
    assert printed["reference"] == str(language_model) == subject["name"]
    assert (subject["kind"], subject["backend"]) == ("text-generation", "onnxruntime")
    onnx = subject["results"]["perplexity"]
    assert onnx["samples"] == 6 and onnx["unit"] == "windows"
    code, out, _ = command(*arguments, "--json", "--samples", "6", "--backend", "eager")
    eager = json.loads(out)["subjects"][0]["results"]["perplexity"]
    assert eager["figures"] == pytest.approx(onnx["figures"], rel=1e-5)
    assert not Path("eval.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("eval",), 2, "name at least one artifact folder or model"),
        (("eval", "MODEL", "--tasks", "classify"), 2, "classify does not fit"),
        (("eval", "MODEL", "--backend", "eagr"), 2, "eager"),
        (("eval", "MODEL", "--interval", "0"), 2, "must be above 0"),
        (("eval", "MODEL", "--window", "97"), 2, "--window 97 is more than the 96 tokens"),
        (("eval", "MODEL", "--tasks", "perplexity", "--data", "gone.txt"), 3, "gone.txt"),
        (("eval", "nowhere/at/all", "--tasks", "recall"), 3, "nowhere/at/all"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], code: int, message: str, language_model: Path, command: Any
) -> None:
    named = [str(language_model) if part == "MODEL" else part for part in arguments]
    status, out, err = command(*named)
    assert message in err
    assert (status, out) == (code, "") and "Traceback" not in err


def test_an_interval_that_is_too_wide_is_said_after_the_table(
    language_model: Path, command: Any
) -> None:
    code, out, err = command(
        "eval", str(language_model), "--tasks", "recall", "--samples", "6", "--interval", "0.05"
    )
    assert code == 2 and "6 prompts" in out
    assert "6 prompts give" in err and "more than the ±0.05 asked for" in err


def test_tasks_are_listed_with_the_kinds_that_they_fit(command: Any) -> None:
    from graphwright.tools.evaluate import TASKS

    code, out, _ = command("eval", "--tasks")
    assert code == 0 and {*TASKS} <= {*out.splitlines()}
    assert "for: text-embedding" in out and "for: every kind of model" in out


def test_a_bench_is_as_long_as_the_model_takes(
    language_model: Path, publish: Callable[..., Path], command: Any
) -> None:
    """By itself; more is refused before anything is timed."""
    out = str(publish(language_model, "clean{optional=true}"))
    code, shown, err = command("bench", out, "--batches", "1", "--repeats", "1")
    assert code == 0 and "sequence 96, " in shown, err
    code, _, err = command("bench", out, "--length", "97")
    assert code == 2 and "--length 97 is more than the 96 tokens that" in err

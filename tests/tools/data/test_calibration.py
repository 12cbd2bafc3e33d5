"""``--calib``: what is read becomes batches of the graph's inputs, or is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.tools.cli.main import main
from graphwright.tools.data import calibration
from graphwright.tools.data.calibration import read
from graphwright.tools.report import manifest

from .conftest import FACTORY, WORDS, jsonl


@pytest.mark.parametrize(
    ("name", "content", "options", "reason"),
    [
        ("a.txt", b" \n ", {}, "empty: it holds no text"),
        ("a.txt", b"x", {}, "empty: it holds no text of 2 tokens"),
        ("a.txt", b"\xff\xfe\xff", {}, "not UTF-8 text"),
        ("a.jsonl", b"", {}, "empty: it holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}', {}, "line 2: has no string `text`"),
        ("a.jsonl", b"[1]", {}, "line 1: is a list, and each line of the file is an object"),
        ("a.jsonl", b'{"text"', {}, "line 1: not JSON"),
        ("a.doc", b"a,b", {}, "not a kind of data that is read; --calib takes FILE.txt"),
        ("a.png", b"", {}, "an image; --calib takes"),
        ("a.npz", b"nonsense", {}, "not an .npz file"),
        ("a.safetensors", b"nonsense", {}, "not a safetensors file"),
        ("a.txt", b"The fox", {"samples": 0}, "--calib-samples 0 must be above 0"),
        ("a.txt", b"The fox", {"windows": "whole"}, "there are beginnings and joined"),
        ("a.txt", b"The fox", {"length": 97}, "--calib-length 97 is more than the 96 tokens"),
    ],
)
def test_refused(
    tmp_path: Path, llama: View, name: str, content: bytes, options: dict[str, Any], reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=reason):
        read(str(tmp_path / name), llama, **options)


def test_what_is_not_there_is_missing(tmp_path: Path, llama: View) -> None:
    with pytest.raises(Missing, match="no such file or folder; --calib takes"):
        read(str(tmp_path / "gone.txt"), llama)
    with pytest.raises(BadInput, match="unknown data zoo:tiny-lama; did you mean tiny-llama"):
        read("zoo:tiny-lama", llama)


def test_text_for_models_of_images(tmp_path: Path, vit: View, llava: View) -> None:
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    with pytest.raises(BadInput, match=r"text alone, and zoo:tiny-llava takes .*give a folder"):
        read(str(file), llava)
    with pytest.raises(BadInput, match="text alone, and zoo:tiny-vit takes pixel_values"):
        read("zoo:tiny-llama", vit)
    with pytest.raises(BadInput, match="images with questions, and zoo:tiny-vit takes"):
        read("zoo:tiny-llava", vit)
    with pytest.raises(BadInput, match="images alone, and zoo:tiny-llava takes"):
        read("zoo:tiny-vit", llava)


def test_the_zoo_gives_other_samples_than_runs_are_verified_on(vit: View, llava: View) -> None:
    for view in (vit, llava):
        samples = read(view.source.name, view, samples=9)
        assert samples.entry().samples == 9
        shown = torch.cat([b["pixel_values"] for b in samples.batches])
        known = torch.cat([b["pixel_values"] for b in view.source.samples])
        assert torch.cdist(shown.flatten(1), known.flatten(1)).min() > 1


def test_the_zoo_s_text_is_tokenized_by_the_model(llama: View) -> None:
    samples = read("zoo:tiny-llama", llama, samples=8, length=32)
    assert samples.entry().tokens == 8 * 32
    assert calibration.SAMPLES == 128


def test_the_manifest_says_what_was_used_and_replay_refuses_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("graphwright_calib_factory.py").write_text(FACTORY)
    model, recipe = "graphwright_calib_factory:make", "quantize{bits=2 group=16},eora{rank=2}"
    x = np.random.default_rng(0).standard_normal((30, 32)).astype(np.float32)
    np.savez("a.npz", x=x)

    def command(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leave:
            main(list(arguments))
        return int(leave.value.code or 0), " ".join("".join(capsys.readouterr()).split())

    code, message = command(model, "-p", recipe)
    assert (code, "eora needs calibration data: give --calib DATA" in message) == (2, True)
    options = ("--calib", "a.npz", "--calib-samples", "21")
    code, message = command(model, "-p", recipe, "-o", "out", *options)
    assert code == 0 and "calibrated on a.npz: 21 samples" in message, message
    written = manifest.load("out")
    entry = read("a.npz", load(model, cache=False), samples=21).entry()
    assert written.calibration == entry.model_copy(update={"beside": "../a.npz"})
    assert written.calibration.tokens is None and written.calibration.samples == 21
    assert "byte-identical" in command("replay", "out", "--trust-source")[1]
    np.savez("a.npz", x=np.where(np.arange(30)[:, None] < 21, x, 0))
    # The rows that were used are the same.
    assert "byte-identical" in command("replay", "out", "--trust-source")[1]
    np.savez("a.npz", x=x + 1)
    code, message = command("replay", "out", "--trust-source")
    assert (code, "a.npz has changed: the batches" in message) == (2, True)


def test_too_few_tokens_are_said_and_marked(tmp_path: Path, llama: View) -> None:
    gw: Any = importlib.import_module("graphwright")
    view = llama
    data = jsonl(tmp_path / "a.jsonl", {"text": WORDS})
    recipe = "quantize{bits=2 group=16 kinds=[q down]},eora{rank=40}"
    for length, short in ((40, {"down"}), (20, {"q", "down"})):
        batches = read(data, view, samples=1, length=length).batches
        result = gw.optimize(view, recipe, calibration=batches)
        step = result.report.to_dict()["passes"][1]
        marked = {site["kind"] for site in step["sites"] if "fewer" in site.get("note", "")}
        assert marked == short
        note = f"{2 * len(short)} sites: {length} tokens, and up to 64 inputs"
        assert any(note in line for line in step["notes"])
    enough = gw.optimize(view, recipe, calibration=read(data, view, samples=1, length=70).batches)
    assert not any("too little" in line for line in enough.report.passes[1].result.notes)

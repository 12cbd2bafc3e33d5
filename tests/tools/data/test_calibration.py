"""``--calib``: data of every kind becomes batches of the graph's inputs, or is refused."""

from __future__ import annotations

import importlib
import json
import os
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.zoo.text import english_sentences
from graphwright.ir.run.sweep import sweep
from graphwright.ir.text.graph import parse_graph
from graphwright.tools.cli.main import main
from graphwright.tools.data import calibration
from graphwright.tools.data.calibration import read
from graphwright.tools.data.selecting import nearest
from graphwright.tools.data.text import LENGTH, read_texts
from graphwright.tools.report import manifest
from graphwright.tools.run.most_moved import PROBE, most_moved

from ...models import NET_SOURCE

WORDS = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def llama(language_graph: View) -> View:
    return language_graph


def jsonl(path: Path, *entries: Any) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(path)


def picture(path: Path, size: tuple[int, int] = (30, 20), level: int = 128) -> Path:
    image: Any = importlib.import_module("PIL.Image")
    image.new("RGB", size, (level, 255 - level, 7)).save(path)
    return path


# --- text ----------------------------------------------------------------------------------------


def test_text_is_cut_into_windows_that_fit_the_model(tmp_path: Path, llama: View) -> None:
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    whole = read(str(file), llama)
    assert whole.length == 96 < LENGTH  # the model's max_position_embeddings
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in whole.batches])
    entry = whole.entry()
    assert entry.tokens == len(ids)
    assert entry.samples == -(-len(ids) // 96)
    assert read(str(file), llama, samples=3, length=17).entry().tokens == 3 * 17
    assert read(str(file), llama).sha256 == whole.sha256
    assert read(str(file), llama, samples=3).sha256 != whole.sha256


def test_every_text_gives_its_first_window_before_any_gives_a_second(
    tmp_path: Path, llama: View
) -> None:
    texts = [f"{i} {WORDS}" for i in range(5)]
    data = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in (*texts, "x", " ")))
    firsts = read(data, llama, samples=5, length=9).batches
    assert [len(b["input_ids"]) for b in firsts] == [5]
    alone = [read(jsonl(tmp_path / f"{i}.jsonl", {"text": t}), llama, samples=1, length=9)
             for i, t in enumerate(texts)]  # fmt: skip
    assert torch.equal(
        firsts[0]["input_ids"], torch.cat([c.batches[0]["input_ids"] for c in alone])
    )


def test_shorter_texts_are_padded_on_the_right_under_the_mask(tmp_path: Path, llama: View) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"text": "The fox"}, {"text": WORDS})
    (batch,) = read(data, llama, samples=2, length=11).batches
    mask = batch["attention_mask"]
    assert mask[0].all() and 2 <= int(mask[1].sum()) < 11
    assert torch.equal(mask[1], mask[1].sort(descending=True).values)


def test_joined_texts_are_cut_as_one(tmp_path: Path, llama: View, vit: View) -> None:
    """One behind the other, each with the token that begins it, no token is lost; what chooses
    windows reads their text."""
    tokenizers: Any = importlib.import_module("tokenizers")
    folder = Path(llama.source.folder or "")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = english_sentences(9)
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    joined = read(data, llama, length=20, windows="joined")
    rows = [row for b in joined.batches for row in b["input_ids"]]
    masks = [row.bool() for b in joined.batches for row in b["attention_mask"]]
    ids = torch.cat([row[mask] for row, mask in zip(rows, masks, strict=True)])
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text).ids]
    assert {len(row) for row in rows[:-1]} == {20}
    assert (joined.entry().windows, read(data, llama).entry().windows) == ("joined", "")
    (tmp_path / "task.txt").write_text(tokenizer.decode(rows[3].tolist()))
    task = f"zip-fit={tmp_path / 'task.txt'}"
    chosen = read(data, llama, samples=1, length=20, windows="joined", select=task)
    assert torch.equal(chosen.batches[0]["input_ids"][0], rows[3])
    with pytest.raises(BadInput, match="joined is for text, and zoo:tiny-vit is none"):
        read("zoo:tiny-vit", vit, samples=2, windows="joined")


def test_joined_texts_are_not_for_models_of_whole_texts(tmp_path: Path, llama: View) -> None:
    """Of a tokenizer that sets a text between tokens of its own, windows have neither."""
    tokenizers: Any = importlib.import_module("tokenizers")
    folder = Path(llama.source.folder or "")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="a $A b", special_tokens=[("a", 1), ("b", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    view = llama.copy()
    view.source = replace(llama.source, folder=str(tmp_path))
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(BadInput, match="reads a text between tokens of its own"):
        read(str(tmp_path / "a.txt"), view, windows="joined")


@pytest.mark.parametrize(
    ("name", "content", "options", "reason"),
    [
        ("a.txt", b" \n ", {}, "empty: it holds no text"),
        ("a.txt", b"x", {}, "empty: it holds no text of 2 tokens"),
        ("a.txt", b"\xff\xfe\xff", {}, "not UTF-8 text"),
        ("a.jsonl", b"", {}, "empty: it holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}', {}, "line 2: has no string `text`"),
        ("a.jsonl", b"[1]", {}, "line 1: has no string `text`"),
        ("a.jsonl", b'{"text"', {}, "line 1: not JSON"),
        ("a.csv", b"a,b", {}, "not a kind of data that is read; --calib takes FILE.txt"),
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


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "The cat\xe2\x80\xa8sat"}', "The cat\u2028sat"),
        (b'{"text": "The cat\xe2\x80\xa9sat"}', "The cat\u2029sat"),
        (b'{"text": "The cat\xc2\x85sat"}', "The cat\x85sat"),
        (b'\xef\xbb\xbf{"text": "The cat sat"}', "The cat sat"),
        (b'{"text": "The \\ud83d cat"}', "The \ufffd cat"),
        (b'{"text": "The \\ud83d\\ude00 cat"}', "The \U0001f600 cat"),
        (b'{"text": "The cat"}\r', "The cat"),
    ],
)
def test_lines_of_text_as_they_are_written(
    tmp_path: Path, llama: View, line: bytes, text: str
) -> None:
    """``json.dumps(ensure_ascii=False)`` writes line ends of Unicode as they are."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(line + b"\n" + line + b"\n")
    assert read_texts(file) == [text, text]
    assert read(str(file), llama).entry().samples == 2


def test_what_is_not_there_is_missing(tmp_path: Path, llama: View) -> None:
    with pytest.raises(Missing, match="no such file or folder; --calib takes"):
        read(str(tmp_path / "gone.txt"), llama)
    with pytest.raises(BadInput, match="unknown data zoo:tiny-lama; did you mean tiny-llama"):
        read("zoo:tiny-lama", llama)


def test_a_model_without_a_tokenizer_is_told_where_to_put_one(tmp_path: Path, llama: View) -> None:
    bare = llama.copy()
    bare.source = type(llama.source)(name="bare", folder=str(tmp_path))
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    with pytest.raises(Missing, match=r"text needs the model's tokenizer\.json, and there is none"):
        read(str(file), bare)
    with pytest.raises(BadInput, match="the model knows ids 0 to 699: is this another model's"):
        read("zoo:tiny-llama", bare, samples=8)


# --- the graph's own inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_arrays_are_cut_into_batches(tmp_path: Path, vit: View, kind: str) -> None:
    pixels = torch.randn(11, 3, 48, 48)
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, pixel_values=pixels.numpy())
    else:
        importlib.import_module("safetensors.torch").save_file({"pixel_values": pixels}, path)
    samples = read(str(path), vit)
    assert [len(b["pixel_values"]) for b in samples.batches] == [8, 3]
    assert torch.equal(torch.cat([b["pixel_values"] for b in samples.batches]), pixels)
    assert samples.entry().tokens is None
    five = read(str(path), vit, samples=5).batches
    assert torch.equal(torch.cat([b["pixel_values"] for b in five]), pixels[:5])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "empty: it holds no array"),
        ({"pixels": np.zeros((2, 3))}, "it holds pixels, and zoo:tiny-vit takes pixel_values"),
        ({"pixel_values": np.zeros((2, 3, 48, 48))}, r"f32\[.*\], got f64\[2, 3, 48, 48\]"),
        ({"pixel_values": np.zeros((2, 3, 96, 96), "f4")}, r"got f32\[2, 3, 96, 96\]"),
        ({"pixel_values": np.zeros((0, 3, 48, 48), "f4")}, "do not hold equally many samples"),
        ({"pixel_values": np.full((2, 3, 48, 48), np.nan, "f4")}, "13824 of 13824 numbers are NaN"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, vit: View, arrays: dict[str, Any], reason: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=reason):
        read(str(tmp_path / "a.npz"), vit)


def test_an_array_that_lacks_is_named(tmp_path: Path, llama: View) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, input_ids=np.ones((2, 5), np.int64))
    with pytest.raises(BadInput, match="attention_mask is missing"):
        read(str(path), llama)
    np.savez(path, input_ids=np.ones((2, 5), np.int64), attention_mask=np.ones((3, 5), np.int64))
    with pytest.raises(BadInput, match=r"equally many samples: input_ids \[2, 5\], attention_mask"):
        read(str(path), llama)


def test_what_a_graph_takes_once_goes_into_each_batch(tmp_path: Path) -> None:
    lines = """onnx graph
ir_version 10
opset "" 20
input %x: f32[b, 5]
input %state: f32[2, 1, 3]
input %rate: i64[]
%y: f32[b, 5] = neg(%x)
output y = %y
"""
    state, rate = np.ones((2, 1, 3), "f4"), np.array(16000)
    x = np.arange(55, dtype="f4").reshape(11, 5)
    np.savez(tmp_path / "a.npz", x=x, state=state, rate=rate)
    batches = read(str(tmp_path / "a.npz"), parse_graph(lines)).batches
    assert [len(b["x"]) for b in batches] == [8, 3]
    assert all(b["state"].shape == (2, 1, 3) and int(b["rate"]) == 16000 for b in batches)


@pytest.mark.parametrize("order", ["C", "F"])
def test_no_more_of_an_array_is_unpacked_than_is_used(
    tmp_path: Path, vit: View, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros pack a thousand to one: 27 GB of them are 27 MB, and here a part of that."""
    fortran = order == "F"
    header = {"descr": "<f4", "fortran_order": fortran, "shape": (10**6, 3, 48, 48)}
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("pixel_values.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(8 * 4 * 3 * 48 * 48))
    monkeypatch.setattr("graphwright.ir.core.memory.available_bytes", lambda: 10**9)
    if not fortran:
        (batch,) = read(str(tmp_path / "a.npz"), vit, samples=8).batches
        assert batch["pixel_values"].shape == (8, 3, 48, 48)
        with pytest.raises(BadInput, match="truncated: 221184 of 248832 bytes"):
            read(str(tmp_path / "a.npz"), vit, samples=9)
        return
    with pytest.raises(BadInput, match=r"\[1000000, 3, 48, 48\] of float32 would take 55\.\d GB"):
        read(str(tmp_path / "a.npz"), vit, samples=8)


def test_arrays_in_the_order_of_columns(tmp_path: Path, vit: View) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 48, 48)).astype("f4")
    np.savez(tmp_path / "a.npz", pixel_values=np.asfortranarray(pixels))
    (batch,) = read(str(tmp_path / "a.npz"), vit).batches
    assert np.array_equal(batch["pixel_values"].numpy(), pixels)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([{}], object), np.zeros(1, "f4,i4")])
def test_arrays_that_hold_no_numbers(tmp_path: Path, vit: View, array: Any) -> None:
    np.savez(tmp_path / "a.npz", pixel_values=array)
    with pytest.raises(BadInput, match=r"not an \.npz file of numbers"):
        read(str(tmp_path / "a.npz"), vit)


@pytest.mark.parametrize("header", ["{'descr': ('<f4',", "  {}\n 1"], ids=["open", "indented"])
def test_headers_that_are_no_python_are_refused(tmp_path: Path, vit: View, header: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        archive.writestr("pixel_values.npy", array)
    with pytest.raises(BadInput, match=r"not an \.npz file of numbers.*no header of an array"):
        read(str(tmp_path / "a.npz"), vit)


# --- images --------------------------------------------------------------------------------------


def test_images_are_resized_and_scaled_as_the_model_wants(tmp_path: Path, vit: View) -> None:
    picture(tmp_path / "b.png", level=51)
    picture(tmp_path / "a.JPG", (96, 200), level=51)
    (tmp_path / "notes.txt").write_text("no image")
    (batch,) = read(str(tmp_path), vit).batches
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    expected = (torch.tensor([51, 204, 7]) / 255 - 0.5) / 0.25
    assert torch.allclose(batch["pixel_values"][1].mean((1, 2)), expected, atol=1e-5)


def test_prompts_hold_a_placeholder_for_each_feature(tmp_path: Path, llava: View) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    jsonl(
        tmp_path / "prompts.jsonl",
        {"image": "a.png", "prompt": "how many digits are there ?"},
        {"image": "b.png", "prompt": "is there a 3 ?"},
        {"image": "b.png", "prompt": "<image> is there a 3 ?"},
    )
    (batch,) = read(str(tmp_path), llava).batches
    marks = batch["input_ids"] == 3
    assert marks.sum(1).tolist() == [144, 144, 144]
    assert torch.equal(batch["input_ids"][1], batch["input_ids"][2])
    mask = batch["attention_mask"]
    assert mask[:, -1].all() and not mask[1, 0] and mask[0].all()
    assert batch["pixel_values"].shape == (3, 3, 96, 96)


def test_folders_that_do_not_fit(tmp_path: Path, llama: View, vit: View, llava: View) -> None:
    with pytest.raises(BadInput, match="empty: it holds no image"):
        read(str(tmp_path), vit)
    with pytest.raises(BadInput, match=r"a folder of images, and .* takes input_ids, attent"):
        read(str(tmp_path), llama)
    with pytest.raises(BadInput, match=r"it holds no prompts.jsonl, and .*: give one, a line"):
        read(str(tmp_path), llava)
    listing = jsonl(tmp_path / "prompts.jsonl", {"image": "gone.png", "prompt": "why ?"})
    with pytest.raises(Missing, match=r"gone\.png: no such image"):
        read(str(tmp_path), llava)
    (tmp_path / "gone.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match="not an image that can be read"):
        read(str(tmp_path), llava)
    picture(tmp_path / "gone.png")
    jsonl(Path(listing), {"image": "gone.png", "prompt": "<image> <image> why ?"})
    with pytest.raises(BadInput, match="2 image tokens in one prompt"):
        read(str(tmp_path), llava)
    Path(listing).write_text("\n")
    with pytest.raises(BadInput, match="empty: it holds no prompt"):
        read(str(tmp_path), llava)


def test_images_that_are_none(tmp_path: Path, vit: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript by the name of a picture starts no program; a picture may claim any size."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(BadInput, match=r"a\.png: not an image that can be read"):
        read(str(tmp_path), vit)
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")
    with pytest.raises(BadInput, match="could be decompression bomb"):
        read(str(tmp_path), vit)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BadInput, match="a pipe or a device, not a regular file"):
        read(str(tmp_path), vit)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": "x"}, {"image_mean": [0.5]}, {"image_std": [1, 1, None]},
        {"image_std": [0, 1, 1]}, {"resample": "cubic"}, {"resample": 9},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_images_that_make_no_sense(
    tmp_path: Path, vit: View, settings: dict[str, Any]
) -> None:
    bare = vit.copy()
    bare.source = type(vit.source)(name="bare", folder=str(tmp_path))
    picture(tmp_path / "a.png")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": [48]} | settings))
    with pytest.raises(BadInput, match=rf"preprocessor_config\.json: {next(iter(settings))} is"):
        read(str(tmp_path), bare)


def test_a_tokenizer_that_is_none(tmp_path: Path, llama: View) -> None:
    bare = llama.copy()
    bare.source = type(llama.source)(name="bare", folder=str(tmp_path))
    (tmp_path / "a.txt").write_text(WORDS)
    words = {"type": "WordLevel", "vocab": {"The": 0}, "unk_token": "[UNK]"}
    for content, reason in (
        ("[" * 10_000, "the tokenizer fails"),
        (json.dumps({"model": words}), "the tokenizer fails: .*[UNK]"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BadInput, match=rf"tokenizer\.json: {reason}"):
            read(str(tmp_path / "a.txt"), bare)


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


# --- the zoo -------------------------------------------------------------------------------------


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


# --- the command ---------------------------------------------------------------------------------


FACTORY = f"""{NET_SOURCE}
def make():
    return Net(), (torch.randn(2, 32),), None, {{"x": {{0: torch.export.Dim("batch")}}}}
"""


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


def test_samples_that_move_most_are_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more rows than are used, those whose outputs few bits move most, each measured by itself;
    the manifest says how they were chosen, and a replay chooses them again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("graphwright_moved_factory.py").write_text(FACTORY)
    model = "graphwright_moved_factory:make"
    x = np.random.default_rng(0).standard_normal((30, 32)).astype(np.float32)
    np.savez("a.npz", x=x)

    def command(*arguments: str) -> str:
        with pytest.raises(SystemExit) as leave:
            main(list(arguments))
        assert not leave.value.code
        return " ".join("".join(capsys.readouterr()).split())

    said = command(
        model, "-p", "gptq{group=16}", "-o", "out", "--calib", "a.npz", "--calib-samples", "5",
        "--calib-select", "most-moved",
    )  # fmt: skip
    assert "calibrated on a.npz: 5 samples, chosen by most-moved" in said
    entry = manifest.load("out").calibration
    assert entry is not None and entry.select == "most-moved"
    assert "byte-identical" in command("replay", "out", "--trust-source")

    view = load(model, cache=False)
    gw: Any = importlib.import_module("graphwright")
    rounded = gw.optimize(view, PROBE, samples=[{"x": torch.from_numpy(x)}]).graph
    moves = []
    for row in torch.from_numpy(x).split(1):
        before, after = (next(iter(sweep(g, {"x": row}).values())) for g in (view, rounded))
        moves.append(float((after - before).norm() / before.norm()))
    most = sorted(sorted(range(30), key=moves.__getitem__)[-5:])
    chosen = torch.cat([b["x"] for b in most_moved(view, read("a.npz", view).batches, 5)])
    assert torch.equal(chosen, torch.from_numpy(x)[most])


def test_windows_near_a_task_by_compression(tmp_path: Path, llama: View) -> None:
    """Lines of a log among prose: a task of other such lines picks them, without a model."""
    prose = english_sentences(24)
    log = [f"2026-11-{i:02d} 10:{i}7 GET /{i * 37}.html 200 bytes={i * 911}" for i in range(9)]
    texts = [*prose[:20], *log[:5], *prose[20:]]
    data = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    (tmp_path / "task.txt").write_text(" ".join(log[5:]))
    chosen = read(data, llama, samples=5, length=64, select=f"zip-fit={tmp_path / 'task.txt'}")
    alone = read(jsonl(tmp_path / "b.jsonl", *({"text": t} for t in log[:5])), llama, length=64)
    rows = {tuple(r.tolist()) for b in chosen.batches for r in b["input_ids"]}
    first = {tuple(r.tolist()) for b in alone.batches for r in b["input_ids"]}
    assert {r[:48] for r in rows} == {r[:48] for r in first}
    assert chosen.entry().select.startswith("zip-fit=")
    assert nearest(prose, 24, prose[3:4])[0] == 3, "nothing is nearer than the text itself"


@pytest.mark.parametrize(
    ("select", "error", "reason"),
    [
        ("zipfit=a.txt", BadInput, "there is no such way; --calib-select takes zip-fit=FILE"),
        ("zip-fit=gone.txt", Missing, r"gone\.txt: no such file"),
        ("zip-fit=a.csv", BadInput, r"a\.csv: not a kind of text"),
    ],
)
def test_ways_to_choose_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: View, select: str, error: Any,
    reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.csv"):
        Path(name).write_text(WORDS)
    with pytest.raises(error, match=reason):
        read("a.txt", llama, select=select)


def test_images_are_not_chosen_by_text(tmp_path: Path, vit: View) -> None:
    (tmp_path / "task.txt").write_text(WORDS)
    with pytest.raises(BadInput, match="is for text, and zoo:tiny-vit is none"):
        read("zoo:tiny-vit", vit, samples=2, select=f"zip-fit={tmp_path / 'task.txt'}")


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

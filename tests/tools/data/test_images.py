"""``--calib``: folders of images, and of prompts about them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.tools.data.calibration import read

from .conftest import jsonl, picture


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

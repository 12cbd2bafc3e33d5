"""``--calib``: arrays of the graph's own inputs."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.text.graph import parse_graph
from graphwright.tools.data.calibration import read


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


@pytest.mark.parametrize("rows", [1, 11])
def test_a_state_is_cut_along_the_dimension_that_counts_samples(tmp_path: Path, rows: int) -> None:
    """As recurrent models take theirs: [layers, batch, width]."""
    graph = parse_graph("""onnx graph
ir_version 10
opset "" 20
input %state: f32[2, b, 3]
input %x: f32[b, 5]
input %rate: i64[]
%y: f32[b, 5] = neg(%x)
output y = %y
""")
    x, state = np.arange(5 * rows, dtype="f4").reshape(rows, 5), np.ones((2, rows, 3), "f4")
    state[:] = np.arange(rows)[:, None]
    np.savez(tmp_path / "a.npz", state=state, x=x, rate=np.array(16000))
    data = read(str(tmp_path / "a.npz"), graph)
    assert torch.equal(torch.cat([b["state"] for b in data.batches], 1), torch.from_numpy(state))
    assert torch.equal(torch.cat([b["x"] for b in data.batches]), torch.from_numpy(x))
    assert data.entry().samples == rows


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

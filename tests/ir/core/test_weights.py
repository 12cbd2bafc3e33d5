"""Weights as lazy handles: round trips, identity, damage."""

from __future__ import annotations

import gc
import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from graphwright.ir.core.errors import BadInput, DiskFull, Missing
from graphwright.ir.core.types import DTYPES
from graphwright.ir.core.weights import (
    SAFETENSORS_DTYPES,
    AbsentWeight,
    CastWeight,
    ComputedWeight,
    FileWeight,
    MemoryWeight,
    Spool,
    read_safetensors_header,
    tensor_bytes,
)
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode


def numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (
        (torch.arange(count) % 2 if dtype == torch.bool else torch.arange(count) % 13)
        .to(dtype)
        .reshape(shape)
    )


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_safetensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "one": (1,), "odd": (5, 123), "empty": (0, 3)}
    tensors = {name: numbers(dtype, shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    handles = dict(read_safetensors_header(tmp_path / "model.safetensors"))
    assert set(handles) == set(shapes)
    for name, handle in handles.items():
        assert (handle.shape, handle.dtype) == (shapes[name], dtype)
        assert bytes(tensor_bytes(handle.read())) == bytes(tensor_bytes(tensors[name]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_bytes_are_those_of_the_tensor(dtype: torch.dtype) -> None:
    tensor = numbers(dtype, (3, 5))
    data = bytes(tensor_bytes(tensor))
    assert len(data) == 15 * dtype.itemsize
    assert torch.equal(
        torch.frombuffer(bytearray(data), dtype=dtype).reshape(3, 5).view(torch.uint8),
        tensor.view(torch.uint8),
    )


def header(path: Path, table: object, body: bytes = b"") -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (b"{]", "header is not JSON"),
        (b"\xff\xfe\xfd", "header is not JSON"),
        (b"[" * 100_000, "header is not JSON"),
        (b'{"w": ' + b"9" * 5000 + b"}", "header is not JSON"),
        ([1, 2], "header is not an object"),
        ({"w": [1]}, "malformed header entry"),
        ({"w": {"dtype": "F32"}}, "malformed header entry"),
        (entry(dtype="F33"), "'w' is of dtype F33, which is not read"),
        (entry(shape=[2, None]), "malformed header entry"),
        (b'{"w": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 24]}}', "malformed"),
        (entry(data_offsets=[0]), "malformed header entry"),
        (entry(data_offsets=[0, 20]), "20 bytes do not hold"),
        (entry(shape=[-2, -3]), "do not hold"),
        (entry(data_offsets=[8, 32]), "truncated: tensor 'w' ends at byte"),
        (entry(data_offsets=[-24, 0]), "truncated"),
        (entry(dtype=["F32"]), "malformed header entry"),
        (entry(shape=["2", "3"]), "safetensors does not take it"),
        (entry() | {"v": entry()["w"]}, "safetensors does not take it"),
        (entry(shape=[1], data_offsets=[20, 24]), "safetensors does not take it"),
        (b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}',
         "safetensors does not take it"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, table: object, reason: str) -> None:
    path = header(tmp_path / "model.safetensors", table, b"\0" * 24)
    with pytest.raises(BadInput, match=reason):
        list(read_safetensors_header(path))


@pytest.mark.parametrize("data", [b"", b"\x05", b"\x80\x04garbage, not a header", b"\0" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match="not a safetensors file"):
        list(read_safetensors_header(tmp_path / "x.safetensors"))


def test_a_file_that_shrank_or_went_away(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"\0" * 23)
    weight = FileWeight(path, 0, (2, 3), torch.float32)
    with pytest.raises(BadInput, match="truncated: a tensor of 24 bytes at offset 0"):
        weight.read()
    path.unlink()
    with pytest.raises(Missing, match="are gone"):
        weight.read()


def test_a_file_that_was_written_to_since(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(torch.arange(6.0).numpy().tobytes())
    weight = FileWeight(path, 0, (2, 3), torch.float32)
    assert torch.equal(weight.read(), torch.arange(6.0).reshape(2, 3))
    path.write_bytes(torch.ones(6).numpy().tobytes())
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    with pytest.raises(BadInput, match=r"w\.bin: changed since it was opened"):
        weight.read()
    assert torch.equal(FileWeight(path, 0, (6,), torch.float32).read(), torch.ones(6))


def test_a_file_that_another_took_the_place_of(tmp_path: Path) -> None:
    """Of the same size and time, by a rename: as a folder is replaced as a whole."""
    tensors = {"w": torch.arange(6.0)}
    for name in ("old", "new"):
        save_file(tensors, tmp_path / name)
        os.utime(tmp_path / name, ns=(0, 0))
    ((_, weight),) = read_safetensors_header(tmp_path / "old")
    (tmp_path / "new").replace(tmp_path / "old")
    with pytest.raises(BadInput, match="old: changed since it was opened"):
        weight.read()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match="a pipe or a device, not a regular file"):
        list(read_safetensors_header(tmp_path / "w.safetensors"))
    with pytest.raises(BadInput, match="not a regular file"):
        FileWeight(tmp_path / "w.safetensors", 0, (2,), torch.float32).read()
    with pytest.raises(BadInput, match="a folder, not a regular file"):
        FileWeight(tmp_path, 0, (2,), torch.float32).read()


def test_identity_follows_the_stored_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert MemoryWeight(tensor).key == MemoryWeight(tensor).key
    assert MemoryWeight(tensor).key != MemoryWeight(tensor.clone()).key
    assert MemoryWeight(tensor).key != MemoryWeight(tensor[:1]).key
    square = torch.arange(4.0).reshape(2, 2)
    assert MemoryWeight(square).key != MemoryWeight(square.t()).key
    assert MemoryWeight(torch.empty(0)).key != MemoryWeight(torch.empty(0)).key
    file = FileWeight(tmp_path / "a", 0, (2, 3), torch.float32)
    assert file.key == FileWeight(tmp_path / "a", 0, (2, 3), torch.float32).key
    assert file.key != FileWeight(tmp_path / "a", 0, (3, 2), torch.float32).key
    assert file.transposed().transposed() is file
    assert file.transposed().key != file.key
    assert CastWeight(file, torch.float16).key != file.key


def test_derived_weights_read_right() -> None:
    base = MemoryWeight(torch.arange(6.0).reshape(2, 3))
    assert torch.equal(base.transposed().read(), base.read().t())
    assert base.transposed().shape == (3, 2)
    cast = CastWeight(base, torch.bfloat16)
    assert (cast.dtype, cast.nbytes, cast.read().dtype) == (torch.bfloat16, 12, torch.bfloat16)
    with pytest.raises(ValueError, match="only matrices"):
        MemoryWeight(torch.zeros(2)).transposed()


def test_a_computed_weight_keeps_its_promise() -> None:
    right = ComputedWeight(lambda: torch.ones(2), (2,), torch.float32, "right")
    assert torch.equal(right.read(), torch.ones(2))
    wrong = ComputedWeight(lambda: torch.ones(3), (2,), torch.float32, "wrong")
    with pytest.raises(ValueError, match="declared"):
        wrong.read()


def test_tensors_without_data_are_no_weights() -> None:
    with pytest.raises(ValueError, match="without data"):
        MemoryWeight(torch.empty(2, device="meta"))
    with FakeTensorMode():
        fake = torch.empty(2)
    with pytest.raises(ValueError, match="without data"):
        MemoryWeight(fake)
    absent = AbsentWeight("w", (2, 3), torch.float16, "the folder holds no weights")
    assert absent.nbytes == 12
    with pytest.raises(Missing, match="'w' cannot be read: the folder holds no weights"):
        absent.read()


def test_spool_goes_to_disk_beyond_its_budget() -> None:
    spool = Spool(budget_bytes=100)
    tensors = [numbers(torch.float32, (5, 5)), numbers(torch.int8, (7, 3)), torch.zeros(0, 4)]
    weights = [spool.store(t) for t in tensors]
    assert [type(w) for w in weights] == [MemoryWeight, FileWeight, MemoryWeight]
    more = spool.store(numbers(torch.bfloat16, (3, 41)))
    assert all(torch.equal(w.read(), t) for w, t in zip(weights, tensors, strict=True))
    assert torch.equal(more.read(), numbers(torch.bfloat16, (3, 41)))
    assert isinstance(more, FileWeight)
    path = more.path
    del spool, weights
    gc.collect()
    assert more.read().shape == (3, 41), "the handle alone keeps the file"
    del more
    gc.collect()
    assert not path.exists()


def test_a_disk_that_runs_full_is_named_and_what_was_stored_stays() -> None:
    spool = Spool(budget_bytes=0)
    first = spool.store(torch.ones(5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFull, match=r"disk of .* ran full: .* set TMPDIR") as caught:
            spool.store(torch.ones(1 << 19))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 3
    assert torch.equal(first.read(), torch.ones(5))


@pytest.mark.parametrize("turned", [False, True])
def test_pieces_are_the_numbers_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    monkeypatch.setattr("graphwright.ir.core.weights._PIECE", 10)
    tensor = torch.randn(7, 5).bfloat16()
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    ((_, stored),) = read_safetensors_header(tmp_path / "w.safetensors")
    weight = CastWeight(stored, torch.float32)
    handle = weight.transposed() if turned else weight
    pieces = list(handle.pieces())
    assert len(pieces) > 1 and max(p.numel() for p in pieces) <= 10
    joined = torch.cat([p.reshape(-1) for p in pieces]).reshape(handle.shape)
    assert torch.equal(joined, handle.read())


def test_what_is_written_to_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    ((_, weight),) = read_safetensors_header(tmp_path / "w.safetensors")
    weight.read().zero_()
    assert torch.equal(weight.read(), torch.ones(3))


def test_spool_does_not_keep_what_a_slice_was_cut_from() -> None:
    big = torch.zeros(1000, 10)
    stored = Spool().store(big[:2])
    assert stored.read().untyped_storage().nbytes() == 80

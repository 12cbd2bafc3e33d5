"""The model files of an artifact are compared with what its manifest says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load import intact
from graphwright.ir.load.intact import check_files, facts, open_whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in intact.FILES:
        (tmp_path / name).write_bytes(b"weights" if name.endswith(".data") else b"graph")
    record(tmp_path, facts(tmp_path))
    return tmp_path


def record(folder: Path, files: Any) -> None:
    (folder / "graphwright.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("name", intact.FILES)
def test_another_file_is_told_by_its_name(folder: Path, name: str) -> None:
    check_files(folder)
    right = (folder / name).read_bytes()
    (folder / name).write_bytes(right[:-1])
    with pytest.raises(BadInput, match=rf"{name}: {len(right) - 1} bytes, but {len(right)} were"):
        check_files(folder)
    (folder / name).write_bytes(right[::-1])
    with pytest.raises(BadInput, match=f"{name}: not as it was written"):
        check_files(folder)
    (folder / name).unlink()
    with pytest.raises(BadInput, match=f"{name}: not there"):
        check_files(folder)


def test_a_large_file_is_hashed_where_all_of_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intact, "HASHED_BYTES", 6)
    (folder / "model.onnx.data").write_bytes(b"WEIGHTS")
    check_files(folder)
    with pytest.raises(BadInput, match=r"model\.onnx\.data: not as it was written"):
        check_files(folder, whole=True)


def test_a_manifest_without_hashes_is_an_older_one(folder: Path) -> None:
    (folder / "graphwright.json").write_text("{}")
    check_files(folder)


@pytest.mark.parametrize("files", [[], 3, None, {"model.onnx": 3}, {"model.onnx": {}}, "x" * 9])
def test_a_manifest_that_is_damaged(folder: Path, files: Any) -> None:
    record(folder, files)
    with pytest.raises(BadInput, match=r"`files` should hold sizes and hashes|but None were"):
        check_files(folder)
    (folder / "graphwright.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="not JSON"):
        check_files(folder)


def test_what_is_opened_is_of_one_artifact(folder: Path, tmp_path: Path) -> None:
    """Another takes its place between the two files, once; then it stays."""
    place, other = tmp_path / "place", tmp_path / "other"
    for artifact, text in ((place, b"1"), (other, b"2")):
        artifact.mkdir()
        for name in intact.FILES:
            (artifact / name).write_bytes(text)
        record(artifact, facts(artifact))
    reads = []

    def opened() -> bytes:
        first = (place / "model.onnx").read_bytes()
        if other.exists():
            place.rename(tmp_path / "away")
            other.rename(place)
        reads.append(first + (place / "model.onnx.data").read_bytes())
        return reads[-1]

    assert open_whole(place, opened) == b"22" and reads == [b"12", b"22"]

    def refused() -> None:
        raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        open_whole(place, refused)


def test_an_artifact_that_is_replaced_meanwhile_is_no_damaged_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = facts(folder)
    record(folder, {"model.onnx": {"bytes": 1, "sha256": ""}})
    inner = intact._wrong

    def wrong(*arguments: Any) -> str:
        digest = inner(*arguments)
        record(folder, right)
        return digest

    monkeypatch.setattr(intact, "_wrong", wrong)
    check_files(folder)

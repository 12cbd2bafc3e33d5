"""``.pt2`` files: loaded where they are data, refused where anything in them could run code."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn
from torch.export import Dim

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        y = self.linear(x) + torch.tensor([1.0, 2.0, 3.0])
        return {"y": y.repeat(2, 1), "long": torch.cat([ids, ids], 1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    module = Net().eval()
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = Dim("rows")
    shapes = {"x": {0: batch}, "ids": {0: batch, 1: Dim("length")}}
    args = (torch.randn(3, 4), torch.ones(3, 5, dtype=torch.int64))
    torch.export.save(torch.export.export(module, args, dynamic_shapes=shapes), path)
    return path, module


def test_a_saved_program_loads(saved: tuple[Path, nn.Module]) -> None:
    path, module = saved
    view = load(path)
    assert [str(view.type(v)) for v in view.inputs()] == ["f32[batch, 4]", "i64[batch, seq]"]
    assert (view.output_names(), view.source.kind) == (("y", "long"), "pt2")
    assert {str(view.type(v)) for v in view.outputs()} == {"f32[2*batch, 3]", "i64[batch, 2*seq]"}
    x, ids = torch.randn(5, 4), torch.arange(15).reshape(5, 3)
    out, expected = sweep(view, {"x": x, "ids": ids}), module(x, ids)
    torch.testing.assert_close(out["y"], expected["y"])
    assert torch.equal(out["long"], expected["long"])


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 60])
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(BadInput, match=r"the file is empty|not a \.pt2 archive"):
        load(tmp_path / "m.pt2")


def test_a_truncated_archive(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    whole = saved[0].read_bytes()
    for size in range(100, len(whole), 997):
        (tmp_path / "m.pt2").write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"not a \.pt2 archive"):
            load(tmp_path / "m.pt2")


@pytest.mark.parametrize("place", ["the header of a record", "a name in the list of records"])
def test_a_damaged_archive(place: str, saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """torch's reader finds the one at its first use, and says the other in a text of no UTF-8."""
    damaged = bytearray(saved[0].read_bytes())
    with zipfile.ZipFile(saved[0]) as archive:
        header = next(i.header_offset for i in archive.infolist() if i.filename.endswith(MODEL))
    at = header if place.startswith("the header") else damaged.rindex(MODEL.encode()) + 2
    damaged[at] = 0xFE
    (tmp_path / "m.pt2").write_bytes(damaged)
    with pytest.raises(BadInput, match=r"m\.pt2: not a \.pt2 archive, or damaged"):
        load(tmp_path / "m.pt2")


def test_a_state_dict_is_no_program(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt2")
    with pytest.raises(BadInput, match=r"refused: it holds data\.pkl"):
        load(tmp_path / "m.pt2")


class Sliced(nn.Module):
    """Buffers of every kind of storage: a slice, a transpose, one without elements, one number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("places", torch.randn(1, 50, 4)[:, 3:7])
        self.register_buffer("turned", torch.randn(4, 4).t())
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("same", torch.randn(1).expand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.places[0] + self.turned + self.same + self.none.sum()


def test_records_that_hold_more_than_their_tensors(tmp_path: Path) -> None:
    module = Sliced().eval()
    torch.export.save(torch.export.export(module, (torch.ones(4, 4),)), tmp_path / "m.pt2")
    view, x = load(tmp_path / "m.pt2"), torch.randn(4, 4)
    torch.testing.assert_close(sweep(view, {"x": x})["output"], module(x))


@pytest.mark.parametrize(
    ("edit", "size"), [(lambda v: b"", 0), (lambda v: v[:24], 24), (lambda v: v * 100, 4800)]
)
def test_records_of_another_length_than_their_tensors(
    edit: Callable[[bytes], bytes], size: int, saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    """Torch reads an empty record as zeros, and a part of one that is too long."""
    path = rewritten(saved[0], tmp_path / "m.pt2", {"data/weights/weight_0": edit})
    with pytest.raises(BadInput, match=rf"weights/weight_0 has {size} bytes, .* take 48"):
        load(path)


def test_a_compressed_archive_is_not_unpacked(
    saved: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    with (
        zipfile.ZipFile(saved[0]) as source,
        zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name) + b" " * 100_000 * name.endswith("model.json"))
    with pytest.raises(BadInput, match=r"records claim \d+ bytes, and the file holds \d+"):
        load(tmp_path / "m.pt2")


# --- archives that would run code -----------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def rewritten(source: Path, target: Path, edits: dict[str, Callable[[bytes], bytes]]) -> Path:
    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    writer.set_min_version(6)
    kept = {n: reader.get_record(n) for n in reader.get_all_records() if ".data" not in n}
    for name, edit in edits.items():
        kept[name] = edit(kept.get(name, b""))
    for name, data in kept.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return target


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        text, count = re.subn(old, lambda _: json.dumps(new)[1:-1], data.decode())
        assert count, "the edit found its place"
        return text.encode()

    return edit


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Touch(marker),), buffer)
    return buffer.getvalue()


SYMBOL = r"Symbol\('s\d+', positive=True, integer=True\)"
EVIL = "__import__('pathlib').Path('MARKER').touch()"
EDITS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "pickled weight": (WEIGHTS, replaced("false", "true"), "is pickled"),
    "pickled constant": (CONSTANTS, replaced("false", "true"), "is pickled"),
    "expression": (MODEL, replaced(SYMBOL, EVIL), "expr_str"),
    "attribute": (MODEL, replaced(SYMBOL, "Symbol.__class__.mro"), "expr_str"),
    "call of a call": (MODEL, replaced(SYMBOL, "Symbol('s1')('s2')"), "expr_str"),
    "text in a symbol": (MODEL, replaced(SYMBOL, "Integer('exit()')"), "expr_str"),
    "target": (MODEL, replaced("torch.ops.aten.linear.default", "torch.os.system"), "target"),
    "loader": (MODEL, replaced("torch.ops.aten.linear.default", "torch.ops.load_library"), ""),
    "placeholder": (MODEL, replaced("p_linear_weight", f"a={EVIL}"), "name"),
    "tree": (MODEL, replaced("builtins.tuple", "collections.defaultdict"), "in_spec"),
    "library": ("data/aotinductor/model/x.so", lambda _: b"\x7fELF", "aotinductor"),
    "old weights": ("data/weights/model.pt", lambda _: b"\x80\x04.", "data/weights/model.pt"),
    "opaque": ("data/constants/opaque_obj_0", lambda _: b"\x80\x04.", "opaque_obj_0"),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_could_run_code_is_refused(
    case: str, saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, edit, reason = EDITS[case]
    opened = "torch.export.pt2_archive._package.load_pt2"
    monkeypatch.setattr(opened, lambda *_: pytest.fail("the archive was opened"))
    path = rewritten(saved[0], tmp_path / "m.pt2", {record: edit})
    with pytest.raises(BadInput, match=f"refused: .*{reason}"):
        load(path)


def test_pickled_sample_inputs_never_run(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = pickled(marker)
    path = rewritten(saved[0], tmp_path / "m.pt2", {SAMPLES: lambda _: evil})
    with pytest.raises(BadInput, match=r"sample_inputs.* a pickle of more than tensors"):
        load(path)
    assert not marker.exists()
    torch.load(io.BytesIO(evil), weights_only=False)
    assert marker.exists(), "the payload works, where it is let"


def test_guards_are_not_run(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def edit(data: bytes) -> bytes:
        model = json.loads(data)
        model["guards_code"] = [EVIL.replace("MARKER", str(marker)) + " is None"]
        return json.dumps(model).encode()

    path = rewritten(saved[0], tmp_path / "m.pt2", {MODEL: edit})
    load(path)
    assert not marker.exists()


def test_a_program_of_another_version(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    def edit(data: bytes) -> bytes:
        model = json.loads(data)
        model["schema_version"]["major"] += 1
        return json.dumps(model).encode()

    path = rewritten(saved[0], tmp_path / "m.pt2", {MODEL: edit})
    with pytest.raises(BadInput, match=r"torch 2\.\d+.* cannot load it"):
        load(path)

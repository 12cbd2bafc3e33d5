"""``optimize-model resize``: an artifact of any size in a smaller one; the sizes of the curve."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.artifacts.artifact import model_bytes
from graphwright.backends.artifacts.entries import Entry
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.bitstack_size import possible_sizes
from graphwright.ir.run.verify import Difference
from graphwright.tools.bench import bitstack_curve
from graphwright.tools.report import manifest
from graphwright.tools.run import resize


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(48, 123)
        self.down = torch.nn.Linear(123, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.down(torch.nn.functional.relu(self.up(x)))
        return x + wide


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = gw.trace(Layers().eval(), (torch.randn(4, 48),))
    return gw.export(graph, tmp_path_factory.mktemp("source") / "out") / "model.onnx"


@pytest.fixture(scope="module")
def artifact(source: Path, publish: Callable[..., Path]) -> Path:
    return publish(source, "bitstack{blocks=5 scaling=none}")


def files(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def test_each_size_is_an_artifact(artifact: Path, tmp_path: Path, command: Any) -> None:
    known = possible_sizes(artifact / "model.onnx")
    whole = (artifact / "model.onnx.data").read_bytes()
    assert known[-1] == files(artifact)
    sizes = []
    for target in (known[0] + 500, known[3] + 500, known[-1] + 10**6):
        out = tmp_path / str(target)
        code, text, err = command("resize", str(artifact), "--max-bytes", str(target),
                                  "-o", str(out))  # fmt: skip
        assert code == 0, err
        assert text == f"{out}: {files(out)} bytes of {known[-1]}\n"
        done = manifest.load(out)
        assert done.sizes.artifact_bytes == files(out) <= target
        assert done.sizes.whole_bytes == known[-1]
        optimized = done.verification.runtime.optimized
        assert optimized is not None and optimized.rel_l2 is not None and optimized.rel_l2 < 1e-5
        assert whole.startswith((out / "model.onnx.data").read_bytes())
        assert (out / "report.html").is_file()
        sizes.append(files(out))
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_smaller_size_can_be_cut_again(artifact: Path, tmp_path: Path, command: Any) -> None:
    known = possible_sizes(artifact / "model.onnx")
    first, second = tmp_path / "first", tmp_path / "second"
    command("resize", str(artifact), "--max-bytes", str(known[5]), "-o", str(first))
    assert len(possible_sizes(first / "model.onnx")) < len(known)
    least = possible_sizes(first / "model.onnx")[0]
    code, _, err = command("resize", str(first), "--max-bytes", str(least + 1000),
                           "-o", str(second))  # fmt: skip
    assert code == 0, err
    assert files(second) < files(first)


def test_the_run_repeats_byte_by_byte(artifact: Path, command: Any) -> None:
    code, out, err = command("replay", str(artifact))
    assert code == 0, err
    assert "byte-identical" in out


def test_bad_sizes(artifact: Path, source: Path, tmp_path: Path, command: Any) -> None:
    out = tmp_path / "out"
    code, _, err = command("resize", str(artifact), "--max-bytes", "5", "-o", str(out))
    least = possible_sizes(artifact / "model.onnx")[0]
    assert code == 2 and "max_bytes=5 is too small" in err and str(least) in err
    code, _, err = command("resize", str(source.parent), "--max-bytes", "5", "-o", str(out))
    assert code == 2 and "its weights are not stacked" in err
    code, _, err = command("resize", str(tmp_path), "--max-bytes", "5", "-o", str(out))
    assert code == 2 and "not a Graphwright artifact" in err
    code, _, err = command("resize", str(artifact), "--max-bytes", "99999999", "-o", str(artifact))
    assert code == 2 and "is the artifact itself" in err
    code, _, err = command("resize", str(artifact), "-o", str(out))
    assert code == 2 and "--max-bytes" in err
    assert not out.exists()


def test_rounding_is_given_no_more_bytes(source: Path) -> None:
    graph = gw.load(source)

    def judge(view: View) -> bitstack_curve.Quality:
        return bitstack_curve.Quality(1.0, 0.0, 1.0)

    weights = 2 * 48 * 123
    sizes = [int(weights * bits / 8) for bits in (1.5, 2.4, 4.0, 9.0)]
    points = bitstack_curve.rounded(graph, sizes, judge)
    assert points[0] is None
    used = [(point.name, point.linear_bytes) for point in points[1:] if point is not None]
    for (name, stored), size, bits in zip(used, sizes[1:], (2, 3, 8), strict=True):
        assert f"bits={bits} " in name
        assert 0.7 * size < stored <= size


def test_graphs_beside_the_model_are_written_and_counted(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts for another runtime and further paths, in whatever size they are."""
    whole = tmp_path / "whole"
    shutil.copytree(artifact, whole)
    (whole / "text.onnx").write_bytes(bytes(3000))
    done = manifest.load(whole)
    fields: Any = {"file": "path-fast.onnx", "weight_bytes": 1, "added_bytes": 0,
                   "error": {"rel_l2": 0.0, "max_abs": 0.0, "cosine": 1.0}}  # fmt: skip
    done.paths = {"fast": manifest.PathEntry(blocks="0-1", **fields)}
    done.files = manifest.files(whole)
    manifest.write(whole, done)

    def written(view: View, onnx: View, folder: Path, target: object) -> list[str]:
        (folder / "text.onnx").write_bytes(bytes(3500))
        return []

    def entries(view: View, folder: Path, texts: dict[str, str], target: object) -> dict[str, Any]:
        assert texts == {"fast": "0-1"}
        (folder / "path-fast.onnx").write_bytes(bytes(1000))
        error = Difference(0.0, 0.0, 1.0)
        return {"fast": Entry("path-fast.onnx", texts["fast"], 1, 0, error)}

    monkeypatch.setattr(resize, "write_genai", written)
    monkeypatch.setattr(resize, "write_entries", entries)
    most = model_bytes(whole) - 100  # less than the model's own files need to be cut by
    cut = resize.resize(whole, most, tmp_path / "out", lambda *_: None)
    assert cut.sizes.artifact_bytes == model_bytes(tmp_path / "out") <= most
    assert files(tmp_path / "out") <= most - 4500
    assert cut.sizes.whole_bytes == model_bytes(whole)
    assert {"text.onnx", "path-fast.onnx"} < {*cut.files}
    with pytest.raises(BadInput, match="no size fits in 4000 bytes; try"):
        resize.resize(whole, 4000, tmp_path / "none", lambda *_: None)

"""The artifact: streamed, published whole or not at all, and runnable with next to nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from graphwright.backends import export
from graphwright.backends.artifacts import artifact
from graphwright.backends.artifacts.artifact import check_target, publish
from graphwright.backends.onnx.model_files import write_model
from graphwright.ir.core.errors import BadInput, DiskFull
from graphwright.ir.core.tensors import tensor_of, weight_of
from graphwright.ir.core.weights import (
    ComputedWeight,
    FileWeight,
    MemoryWeight,
    Weight,
    tensor_bytes,
)
from graphwright.ir.fx.view import FxView

MEGABYTE = 1 << 20


def model_of(weights: dict[str, Weight]) -> onnx_ir.Model:
    """A model with one Identity for each weight."""
    values = [
        onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(tensor_of(w, name).dtype),
            shape=onnx_ir.Shape(w.shape),
            const_value=tensor_of(w, name),
        )
        for name, w in weights.items()
    ]
    nodes = [onnx_ir.node("Identity", [v], name=f"n{i}") for i, v in enumerate(values)]
    outputs = [node.outputs[0] for node in nodes]
    for i, (value, out) in enumerate(zip(values, outputs, strict=True)):
        out.name, out.type, out.shape = f"y{i}", value.type, value.shape
    graph = onnx_ir.Graph(
        [], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="g"
    )
    return onnx_ir.Model(graph, ir_version=10)


def loaded(folder: Path) -> dict[str, onnx_ir.TensorProtocol]:
    graph = onnx_ir.load(folder / "model.onnx").graph
    tensors = {name: v.const_value for name, v in graph.initializers.items()}
    return {name: t for name, t in tensors.items() if t is not None}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An artifact of ours that is already there."""
    out = tmp_path / "out"
    with publish(out) as folder:
        (folder / "graphwright.json").write_text("{}")
        (folder / "model.onnx").write_bytes(b"old")
    return out


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
     torch.uint8, torch.int64],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (123, 41), (0, 4)])
def test_bytes_of_every_dtype_come_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    write_model(model_of({"w": MemoryWeight(tensor)}), tmp_path)
    back = weight_of(loaded(tmp_path)["w"])
    assert (back.shape, back.dtype) == (shape, dtype)
    assert tensor_bytes(back.read()) == tensor_bytes(tensor)


def test_small_tensors_inside_large_ones_on_pages(tmp_path: Path) -> None:
    weights: dict[str, Weight] = {
        "small": MemoryWeight(torch.ones(256)),
        "odd": MemoryWeight(torch.ones(1025, dtype=torch.uint8)),
        "large": MemoryWeight(torch.randn(300, 300)),
    }
    write_model(model_of(weights), tmp_path)
    tensors = loaded(tmp_path)
    assert not isinstance(tensors["small"], onnx_ir.ExternalTensor)
    for name in ("odd", "large"):
        assert isinstance(weight_of(tensors[name]), FileWeight)
    large = tensors["large"]
    assert isinstance(large, onnx_ir.ExternalTensor)
    assert large.offset is not None and large.offset % 4096 == 0 and large.offset > 0
    assert torch.equal(weight_of(large).read(), weights["large"].read())


def test_each_tensor_is_read_once_the_model_stays_and_bytes_repeat(tmp_path: Path) -> None:
    reads: list[int] = []

    def weight(i: int) -> Weight:
        def make() -> torch.Tensor:
            reads.append(i)
            return torch.full((64, 64), float(i))

        return ComputedWeight(make, (64, 64), torch.float32, ("full", i))

    model = model_of({f"w{i}": weight(i) for i in range(5)})
    steps: list[tuple[str, int, int]] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(model, tmp_path / name, lambda *step: steps.append(step))
    assert sorted(reads) == sorted([*range(5), *range(5)])
    assert steps[:5] == [("writing weights", i, 5) for i in range(5)]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    kept = model.graph.initializers["w3"].const_value
    assert kept is not None and weight_of(kept).key == ("computed", ("full", 3))


def test_streaming_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """300 MB pass through while at most the tensor being written and the next one are alive."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def weight(i: int) -> Weight:
        shape = (1024, 3 * 1024)

        def make() -> torch.Tensor:
            nonlocal most
            tensor = torch.full(shape, float(i))
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

        return ComputedWeight(make, shape, torch.float32, i)

    write_model(model_of({f"w{i}": weight(i) for i in range(25)}), tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size >= 300 * MEGABYTE
    assert (tmp_path / "model.onnx").stat().st_size < MEGABYTE
    assert 1 <= most <= 2 and not alive


# --- publishing ---------------------------------------------------------------------------------


def test_an_artifact_replaces_an_older_one_whole(published: Path) -> None:
    with publish(published) as folder:
        (folder / "model.onnx").write_bytes(b"new")
        assert (published / "model.onnx").read_bytes() == b"old"
    assert contents(published) == {"model.onnx": b"new"}
    assert list(published.parent.iterdir()) == [published]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (RuntimeError("broken"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (BadInput("no"), BadInput),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
    ],
)
def test_a_failure_leaves_the_older_artifact_and_nothing_else(
    published: Path, failure: BaseException, error: type[BaseException]
) -> None:
    before = contents(published)
    with pytest.raises(error), publish(published) as folder:
        (folder / "model.onnx").write_bytes(b"half")
        raise failure
    assert contents(published) == before
    assert list(published.parent.iterdir()) == [published]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may not grow beyond a megabyte: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_runs_full_while_weights_are_written(published: Path, small_disk: None) -> None:
    before = contents(published)
    weights: dict[str, Weight] = {
        f"w{i}": MemoryWeight(torch.full((256, 512), float(i))) for i in range(5)
    }
    refused = pytest.raises(DiskFull, match="ran full; nothing was changed")
    with refused as caught, publish(published) as folder:
        write_model(model_of(weights), folder)
    assert caught.value.exit_code == 3
    assert contents(published) == before
    assert list(published.parent.iterdir()) == [published]


def test_a_folder_that_is_not_ours_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"theirs")
    with pytest.raises(BadInput, match="not a graphwright artifact; --force"), publish(out):
        pass
    assert contents(out) == {"model.onnx": b"theirs"}
    with publish(out, force=True) as folder:
        (folder / "model.onnx").write_bytes(b"new")
    assert contents(out) == {"model.onnx": b"new"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["chapter.txt", "1_Pooling/model.safetensors"])
def test_what_no_artifact_has_is_kept_whatever_is_asked(
    published: Path, name: str, force: bool
) -> None:
    (published / name).parent.mkdir(exist_ok=True)
    (published / name).write_text("years of work")
    before = contents(published)
    message = f"out holds what no artifact has \\({name}\\).*: move it, or choose another"
    with pytest.raises(BadInput, match=message), publish(published, force=force):
        raise AssertionError("published")
    (published / name).rename(published.parent / "away")
    with pytest.raises(BadInput, match=message), publish(published, force=force) as folder:
        (folder / "model.onnx").write_bytes(b"new")
        (published.parent / "away").rename(published / name)
    assert contents(published) == before


def test_an_artifact_does_not_replace_its_source(tmp_path: Path) -> None:
    out, link = tmp_path / "out", tmp_path / "link.onnx"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"the source")
    link.symlink_to(out / "model.onnx")
    for source in (out, out / "model.onnx", link):
        with pytest.raises(BadInput, match=r"out holds the source, .*, which the artifact w"):
            check_target(out, force=True, sources=[source])
    check_target(out, force=True, sources=["zoo:out", "", tmp_path / "elsewhere.onnx"])


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publish(tmp_path / "out") as folder:
        (folder / "model.onnx").write_bytes(b"new")
    assert contents(tmp_path / "out") == {"model.onnx": b"new"}


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for out, reason in [
        (file, "exists and is not a folder"),
        (link, "exists and is not a folder"),
        (file / "out", "is not writable"),
        (Path(), "holds the working or the home folder"),
        (tmp_path.parent, "holds the working or the home folder"),
        (Path("/proc/out"), "/proc"),
    ]:
        with pytest.raises(BadInput, match=reason), publish(out, force=True):
            raise AssertionError("published")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


# --- the whole folder ---------------------------------------------------------------------------

_STOCK = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "graphwright", "onnx", "onnx_ir", "onnxscript",
                                      "transformers", "triton", "safetensors", "ml_dtypes"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Only())
import numpy, onnxruntime
folder, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
names = [o.name for o in session.get_outputs()]
results = session.run(names, dict(numpy.load(inputs)))
numpy.savez(outputs, **dict(zip(names, results)))
assert "torch" not in sys.modules
"""


def test_the_artifact_runs_where_only_onnxruntime_and_numpy_are(
    encoder: torch.nn.Module, view: FxView, inputs_of: Callable[..., Any], tmp_path: Path
) -> None:
    out = export(view, tmp_path / "out")
    inputs = inputs_of(3, 5)
    np.savez(tmp_path / "in.npz", **{n: t.numpy() for n, t in inputs.items()})
    arguments = [str(out), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", _STOCK, *arguments], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"]}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = encoder(**inputs)["states"]
    actual = torch.from_numpy(np.load(tmp_path / "out.npz")["states"])
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_export_copies_side_files_and_writes_a_manifest(view: FxView, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    for name in ("tokenizer.json", "1_Pooling/config.json", "model.safetensors", "secret.key"):
        (source / name).write_text(name)
    view.source.folder = str(source)
    out = export(view, tmp_path / "deep" / "out")
    assert sorted(contents(out)) == [
        "1_Pooling/config.json", "graphwright.json", "model.onnx", "model.onnx.data",
        "tokenizer.json",
    ]  # fmt: skip
    sizes = json.loads((out / "graphwright.json").read_text())["sizes"]
    assert sizes["artifact_bytes"] == artifact.model_bytes(out) > 0
    again = export(view, out)
    assert again == out


def test_what_stands_behind_the_model_is_copied_and_replaced(view: FxView, tmp_path: Path) -> None:
    """``modules.json`` of sentence-transformers says what: a dense layer with its weights."""
    source, out = tmp_path / "source", tmp_path / "out"
    for name in ("2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/notes.txt", "a/b"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    modules = [{"path": ""}, {"path": "2_Dense"}, {"path": "../x"}, {"path": "a"}, {}]
    (source / "modules.json").write_text(json.dumps(modules))
    view.source.folder = str(source)
    for _ in range(2):
        export(view, out)
        assert sorted(contents(out)) == [
            "2_Dense/config.json", "2_Dense/model.safetensors", "graphwright.json", "model.onnx",
            "model.onnx.data", "modules.json",
        ]  # fmt: skip


def test_links_are_followed_within_the_models_own_files_only(tmp_path: Path) -> None:
    cache, private = tmp_path / "models--a--b", tmp_path / "private"
    snapshot, blobs, out = cache / "snapshots" / "rev", cache / "blobs", tmp_path / "out"
    for folder in (snapshot, blobs, private, out):
        folder.mkdir(parents=True)
    (private / "key").write_text("mine")
    (private / "config.json").write_text("mine")
    (blobs / "11").write_text("of the hub")
    (snapshot / "vocab.json").write_text("beside")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/11")
    (snapshot / "merges.txt").symlink_to("vocab.json")
    (snapshot / "vocab.txt").symlink_to(private / "key")
    (snapshot / "1_Pooling").symlink_to(private)
    links = artifact.copy_side_files(str(snapshot), out)
    assert links == ["vocab.txt", "1_Pooling/config.json"]
    assert contents(out) == {
        "merges.txt": b"beside", "tokenizer.json": b"of the hub", "vocab.json": b"beside",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in out.iterdir())


def test_metadata_of_the_graph_is_in_the_file(view: FxView, tmp_path: Path) -> None:
    model = onnx_ir.from_proto(onnx_ir.to_proto(model_of({"w": MemoryWeight(torch.ones(3))})))
    model.metadata_props["graphwright.recipe"] = "quantize{bits=4}"
    write_model(model, tmp_path)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    recipe = session.get_modelmeta().custom_metadata_map["graphwright.recipe"]
    assert recipe == "quantize{bits=4}"

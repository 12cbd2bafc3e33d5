"""Executables: the same numbers as torch, and a clear word where the inputs do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from graphwright.backends import Executable, backend_names, compile, export
from graphwright.backends.runtimes import onnxruntime as onnxruntime_backend
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.fx.view import FxView

Inputs = Callable[..., dict[str, torch.Tensor]]


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=2e-5, atol=2e-5)


@pytest.fixture
def executable(view: FxView) -> Executable:
    return compile(view, threads=1)


@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", {}), ("onnxruntime", {"optimize": False}), ("onnxruntime", {"threads": 2})],
)
def test_the_numbers_of_torch(
    encoder: torch.nn.Module, view: FxView, inputs_of: Inputs, backend: str, options: dict[str, Any]
) -> None:
    executable = compile(view, backend=backend, **options)
    assert executable.input_names == ("ids", "mask")
    assert executable.output_names == ("states", "kept")
    for batch, seq in [(1, 1), (5, 3), (1, 123)]:
        inputs = inputs_of(batch, seq)
        close(executable(**inputs), encoder(**inputs))


def test_positional_named_and_strided_inputs_agree(
    executable: Executable, inputs_of: Inputs
) -> None:
    inputs = inputs_of(3, 5)
    expected = executable(**inputs)
    close(executable(inputs["ids"], inputs["mask"]), expected)
    close(executable(inputs["ids"], mask=inputs["mask"]), expected)
    strided = {n: t.t().contiguous().t() for n, t in inputs.items()}
    assert not strided["ids"].is_contiguous()
    close(executable(**strided), expected)


def test_an_empty_batch(executable: Executable, inputs_of: Inputs) -> None:
    out = executable(**{n: t[:0] for n, t in inputs_of(2, 5).items()})
    assert out["states"].shape == (0, 5, 24)


def test_outputs_stay_when_the_session_runs_again_or_goes(view: FxView, inputs_of: Inputs) -> None:
    executable = compile(view, threads=1)
    batches = [inputs_of(2, 7, seed) for seed in range(8)]
    results = [executable(**b)["states"] for b in batches]
    copies = [r.clone() for r in results]
    for _ in range(8):
        executable(**inputs_of(2, 7, 99))
    del executable
    assert all(torch.equal(r, c) for r, c in zip(results, copies, strict=True))
    assert not torch.equal(copies[0], copies[1])


def test_a_folder_and_a_file_run_on_both_backends(
    encoder: torch.nn.Module, view: FxView, inputs_of: Inputs, tmp_path: Path
) -> None:
    out = export(view, tmp_path / "out")
    inputs = inputs_of(2, 5)
    for graph in (out, str(out / "model.onnx")):
        for backend in ("eager", "onnxruntime"):
            close(compile(graph, backend=backend)(**inputs), encoder(**inputs))


def test_inputs_that_do_not_fit(view: FxView, executable: Executable, inputs_of: Inputs) -> None:
    good = inputs_of(2, 5)
    ids, mask = good["ids"], good["mask"]
    for args, named, reason in [
        ((), {"ids": ids}, "missing mask"),
        ((), {**good, "token_ids": ids}, r"unknown token_ids \(the graph takes ids, mask\)"),
        ((ids, mask, mask), {}, "3 inputs given"),
        ((ids,), good, "given twice: ids"),
        ((), {"ids": ids.int(), "mask": mask}, "ids: expected int64, got int32"),
        ((), {"ids": ids, "mask": mask > 0}, "mask: expected int64, got bool"),
        ((), {"ids": ids[0], "mask": mask}, r"ids: expected shape .*, got \[5\]"),
        ((), {"ids": ids, "mask": mask[:1]}, "batch is 2 in input ids and 1 in input mask"),
        ((), {"ids": ids, "mask": mask[:, :4]}, "seq is 5 in input ids and 4 in input mask"),
    ]:
        with pytest.raises(BadInput, match=reason):
            executable(*args, **named)
    eager = compile(view, backend="eager")
    with pytest.raises(BadInput, match="missing mask"):
        eager(ids)
    with pytest.raises(BadInput, match="ids"):
        eager(ids=ids.float(), mask=mask)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_another_resolution_than_was_traced(backend: str, models: ModuleType) -> None:
    small = models.clip_vision(layers=1)
    view = models.plain(small)
    run = compile(view, backend=backend)
    message = r"pixel_values: expected .*3, 16, 16\], got (shape )?\[2, 3, 32, 32\]"
    with pytest.raises(BadInput, match=message):
        run(pixel_values=torch.zeros(2, 3, 32, 32))


def test_a_failure_inside_the_runtime_is_told_once(
    executable: Executable, inputs_of: Inputs, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(2, 5)
    with pytest.raises(BadInput, match=r"ONNX Runtime fails on these inputs.*(indices|bounds)"):
        executable(ids=torch.full_like(inputs["ids"], 10_000), mask=inputs["mask"])
    assert capfd.readouterr() == ("", ""), "the runtime's own line stays off the terminal"


def test_files_that_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="give an artifact's folder"):
        compile(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model at all")
    with pytest.raises(BadInput, match=r"model\.onnx: ONNX Runtime does not load it"):
        compile(tmp_path)


def test_names_and_options_that_are_wrong(view: FxView) -> None:
    assert {"eager", "onnxruntime"} <= set(backend_names())
    with pytest.raises(BadInput, match=r"no backend 'onnxruntim'.*did you mean onnxruntime"):
        compile(view, backend="onnxruntim")
    with pytest.raises(BadInput, match="device 'gpu' is unknown: cpu or cuda"):
        compile(view, device="gpu")
    with pytest.raises(BadInput, match=r"onnxruntime: .*'thread'"):
        compile(view, thread=2)
    with pytest.raises(BadInput, match="threads=0: give 1 or more"):
        compile(view, threads=0)
    with pytest.raises(BadInput, match="the eager backend runs on the CPU"):
        compile(view, backend="eager", device="cuda")


def test_a_silent_fall_back_to_the_cpu_is_refused() -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    onnxruntime_backend._refuse_fallback(providers, providers)
    with pytest.raises(Missing, match="could not start its CUDAExecutionProvider"):
        onnxruntime_backend._refuse_fallback(providers, providers[1:])


def test_export_stays_a_function_after_it_has_run(view: FxView, tmp_path: Path) -> None:
    import graphwright

    for name in ("a", "b"):
        assert graphwright.export(view, tmp_path / name) == tmp_path / name

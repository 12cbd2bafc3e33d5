"""ONNX Runtime: a session with IO binding, on the CPU or a CUDA device."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from ..ir.errors import BadInput, Missing
from ..ir.view import View
from .base import bind

MODEL_FILE = "model.onnx"


class OnnxRuntimeExecutable:
    """A session. Inputs are bound where they lie; outputs stay on the session's device."""

    def __init__(self, path: Path, *, device: str, optimize: bool, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        self._device = device
        try:
            self._session = ort.InferenceSession(path, options, providers=_providers(ort, device))
        except Exception as error:
            # The runtime's exceptions share no base class of their own below Exception.
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise BadInput(f"{path}: ONNX Runtime does not load it: {_first_line(error)}") from error
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._outputs = tuple(o.name for o in self._session.get_outputs())

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._outputs

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        bound = bind(self.input_names, args, inputs)
        binding = self._session.io_binding()
        kept = []
        for name, tensor in bound.items():
            self._check(name, tensor)
            tensor = tensor.detach().to(self._device).contiguous()
            kept.append(tensor)
            element = int(from_torch_dtype(tensor.dtype))
            binding.bind_input(
                name, self._device, 0, element, tuple(tensor.shape), tensor.data_ptr()
            )
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(binding)
        results = [_tensor(value) for value in binding.get_outputs()]
        return dict(zip(self._outputs, results, strict=True))

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        declared = self._inputs[name]
        wanted = declared.type.removeprefix("tensor(").removesuffix(")")
        given = _RUNTIME_NAMES.get(tensor.dtype, str(tensor.dtype))
        if wanted != given:
            raise BadInput(f"input {name}: expected {wanted}, got {given}")
        shape = declared.shape
        fixed = [(i, d) for i, d in enumerate(shape) if isinstance(d, int)]
        if len(shape) != tensor.dim() or any(tensor.shape[i] != d for i, d in fixed):
            raise BadInput(f"input {name}: expected shape {shape}, got {list(tensor.shape)}")


_RUNTIME_NAMES = {
    torch.float32: "float", torch.float64: "double", torch.float16: "float16",
    torch.bfloat16: "bfloat16", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16",
    torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip


def _tensor(value: Any) -> torch.Tensor:
    if value.device_name() == "cpu" and value.element_type() != onnx_ir.DataType.BFLOAT16:
        return torch.from_numpy(value.numpy())
    capsule = value._ortvalue.to_dlpack()
    return torch.utils.dlpack.from_dlpack(capsule)


def _providers(ort: Any, device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers() or not torch.cuda.is_available():
        raise Missing(
            "no CUDA device that ONNX Runtime can use: run with --device cpu, or on a machine with "
            "an NVIDIA driver and pip install onnxruntime-gpu"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def build(
    graph: View | str | Path | Mapping[str, Any],
    *,
    device: str = "cpu",
    optimize: bool = True,
    threads: int | None = None,
) -> OnnxRuntimeExecutable:
    """See ``base.compile``. A graph goes through a temporary folder, which the session outlives."""
    if isinstance(graph, str | Path):
        path = Path(graph)
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.is_file():
            raise Missing(f"{path} is not there: give an artifact's folder or an .onnx file")
        return OnnxRuntimeExecutable(path, device=device, optimize=optimize, threads=threads)
    from .artifact import write_model
    from .lowering import lowered

    assert isinstance(graph, View)
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        write_model(lowered(graph).model, Path(folder))
        path = Path(folder) / MODEL_FILE
        return OnnxRuntimeExecutable(path, device=device, optimize=optimize, threads=threads)

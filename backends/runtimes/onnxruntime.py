"""ONNX Runtime: a session with IO binding, on the CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from ...ir.core.errors import BadInput, Missing
from ...ir.core.mapped_pages import release_files, releasing_files
from ...ir.core.scratch import Scratch
from ...ir.core.size_bounds import check_sizes, read_sizes
from ...ir.core.types import UNKNOWN_DIM, Type
from ...ir.core.values import numbers, to_numpy, to_value
from ...ir.core.view import View
from ...ir.load.entry_files import entry_path
from ...ir.load.intact import check_files
from ...ir.onnx.bounded_memory import bound_memory, run_options, why_short
from ...ir.structure.cache_slots import (
    BOXES,
    ROWS_KEY,
    TOKEN_TYPES,
    check_shared,
    reread_at,
    slot_layers,
)  # fmt: skip
from ...ir.structure.cuts import COUNT_KEY
from ...ir.structure.pictured import check_pictured, read_prompt
from ...ir.structure.tree_input import TREE
from ...ir.structure.words import head_tokens
from ..base import Backend, Steps, bind
from ..generation.steps import BoundSteps, PlainSteps, SharedSteps
from ..onnx.model_files import MANIFEST_FILE, MODEL_FILE
from .runtime_packages import PROVIDER, mixed_builds, no_cuda

T = TypeVar("T")
_RUNTIME_NAMES = {
    torch.float32: "float", torch.float64: "double", torch.float16: "float16",
    torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "float8e4m3fn",
    torch.float8_e5m2: "float8e5m2", torch.int64: "int64", torch.int32: "int32",
    torch.int16: "int16", torch.int8: "int8", torch.uint64: "uint64", torch.uint32: "uint32",
    torch.uint16: "uint16", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeExecutable:
    """A session. Inputs are bound where they lie; outputs are views of the session's own memory.

    ``optimize`` switches the runtime's graph optimisation, ``threads`` the number of threads within
    one op (``None``: all cores). A ``lean`` session leaves the weights in the file that they are
    mapped from, where others repack them into memory of their own (of a 0.5B model in 4 bits: 96
    MB instead of 787): float sums then run in another order (1.5e-7 relative L2 in a 4-bit
    multiplication), and one that rounds activations to 8 bits (``accuracy_level=4``) has no such
    kernel without repacking, and computes in float32 (5e-3 apart). A ``sparing`` session keeps no
    memory between its runs, and its threads sleep where they wait for each other: slower by the
    clock, in fewer processor seconds. So is a lean one. ``instead`` is a model to load
    in the place of the file's, whose weights lie where the file says. A ``bounded`` session takes
    no more memory than this machine has: see ``ir.onnx.bounded_memory``. Raises ``BadInput`` where
    the runtime cannot load the file, and ``Missing`` where it cannot use the device.
    """

    def __init__(
        self, path: Path, *, device: str, optimize: bool, threads: int | None, lean: bool = False,
        instead: bytes | None = None, bounded: bool = False, sparing: bool = False,
    ) -> None:  # fmt: skip
        import onnxruntime as ort

        if threads is not None and threads < 1:
            raise BadInput(f"threads={threads}: give 1 or more")
        if mixed_builds():
            warnings.warn(mixed_builds(), RuntimeWarning, stacklevel=2)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it says is in the error that it raises
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        if threads is not None:
            options.intra_op_num_threads = threads
        if lean or sparing:
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if bounded:
            bound_memory(options)
        self._run_options = run_options() if bounded else None
        self._device = device
        providers = _providers(device)
        try:
            if instead is not None:
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.absolute().parent))
            self._session = ort.InferenceSession(instead or path, options, providers=providers)
        except Exception as error:
            if not _is_the_runtimes(error):
                raise
            advice = "".join(f"\n{line}" for line in [mixed_builds()] if line)
            message = f"{path}: ONNX Runtime does not load it: {_line(error)}"
            raise BadInput(f"{message}{advice}") from error
        _refuse_fallback(providers, self._session.get_providers())
        # What was repacked into memory of its own is read no more; a lean session reads it all.
        release_files(path.absolute().parent)
        self._mapped = path.absolute().parent if lean else None
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._types = {name: _type(declared) for name, declared in self._inputs.items()}
        optional = self._session.get_overridable_initializers()
        self._optional = {i.name: i for i in optional if i.name == TREE}
        outputs = self._session.get_outputs()
        self._outputs = tuple(o.name for o in outputs)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._prompt, self._cut = read_prompt(metadata), COUNT_KEY in metadata
        self._sizes = read_sizes(metadata)
        self.rows_begin = ROWS_KEY in metadata
        self._in_place = metadata.get(ROWS_KEY) == "shared"
        self.reread_at = reread_at(metadata)
        self.kv_layers = slot_layers(metadata)
        self.head_tokens = head_tokens(metadata)
        self._opaque = any(_type_name(o) not in _RUNTIME_NAMES.values() for o in outputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def takes_tree(self) -> bool:
        """Whether it has the optional input ``tree_mask``."""
        return bool(self._optional)

    @property
    def input_types(self) -> dict[str, Type]:
        """dtype and shape of each input by name."""
        return self._types

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._outputs

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``Executable``. Inputs are moved to the device where they are not there yet, and
        bfloat16 becomes float32 where the artifact does: see ``ir.onnx.widen``."""
        optional = {name: inputs.pop(name) for name in self._optional if name in inputs}
        bound = bind(self.input_types, args, inputs)
        for name, value in bound.items():
            if not isinstance(value, torch.Tensor):
                raise BadInput(f"input {name} is a {type(value).__name__}: give a tensor")
        bound = {name: _widened(t, self._types[name]) for name, t in bound.items()}
        bound |= optional
        self._check(bound)
        binding = self._session.io_binding()
        ready = {n: t.detach().to(self._device).contiguous() for n, t in bound.items()}
        for name, tensor in ready.items():
            element = int(from_torch_dtype(tensor.dtype))
            shape = tuple(tensor.shape)
            binding.bind_input(name, self._device, 0, element, shape, tensor.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        if self._opaque:
            return self._run(lambda: self._numbers(ready))
        if self._device == "cuda":
            # The session has a stream of its own, which does not wait for torch's.
            torch.cuda.current_stream().synchronize()
        self._run(lambda: self._session.run_with_iobinding(binding, self._run_options))
        binding.synchronize_outputs()
        values = binding.get_outputs()
        return {name: _tensor(v) for name, v in zip(self._outputs, values, strict=True)}

    def steps(self, outputs: Mapping[str, torch.Tensor]) -> Steps:
        """See ``Stepping``."""
        plain = PlainSteps(self, outputs)
        if self._opaque:
            return plain
        binding = self._session.io_binding()

        def run() -> None:
            if self._device == "cuda":
                torch.cuda.current_stream().synchronize()
            self._run(lambda: self._session.run_with_iobinding(binding))
            binding.synchronize_outputs()

        if self._in_place:
            return SharedSteps(binding, run, self._device, plain.cache, outputs["logits"])
        return BoundSteps(binding, run, self._device, plain, outputs["logits"])

    def _run(self, work: Callable[[], T]) -> T:
        mapped = self._mapped
        try:
            with contextlib.nullcontext() if mapped is None else releasing_files(mapped):
                return work()
        except Exception as error:
            if not _is_the_runtimes(error):
                raise
            reason = why_short(str(error)) or _line(error)
            raise BadInput(f"ONNX Runtime fails on these inputs: {reason}") from error

    def _numbers(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs of a graph that gives strings, sequences or maps: see ``ir.core.values``."""
        feeds = {name: to_numpy(t) for name, t in inputs.items()}
        outputs = self._session.run(None, feeds, self._run_options)
        return {n: numbers(to_value(x)) for n, x in zip(self._outputs, outputs, strict=True)}

    def _check(self, inputs: dict[str, torch.Tensor]) -> None:
        """Raise ``BadInput`` where a dtype, a rank, a fixed or a shared dimension is another, or of
        a size that the graph is not for, where a box or a kind of a token is below 0, and where a
        prompt lacks its image, or has padding where the graph takes none."""
        mask = inputs.get("attention_mask")
        if self.rows_begin and mask is not None and not bool((mask[:, :1] != 0).all()):
            raise BadInput(
                "attention_mask: padding comes before a text, and attention in this artifact takes "
                "rows by their length: pad at the end, or make the artifact with --target cpu"
            )
        declared_inputs = self._inputs | self._optional
        for name, tensor in inputs.items():
            declared = declared_inputs[name]
            expected = _type_name(declared)
            actual = _RUNTIME_NAMES.get(tensor.dtype, str(tensor.dtype))
            if expected != actual:
                raise BadInput(f"input {name}: expected {expected}, got {actual}")
            shape = declared.shape
            fixed = [(i, d) for i, d in enumerate(shape) if isinstance(d, int)]
            if len(shape) != tensor.dim() or any(tensor.shape[i] != d for i, d in fixed):
                raise BadInput(f"input {name}: expected shape {shape}, got {list(tensor.shape)}")
            whole = name in (BOXES, TOKEN_TYPES) and not tensor.is_floating_point()
            if whole and bool((tensor < 0).any()):  # which picks from the end of a table in ONNX
                raise BadInput(f"input {name}: {int(tensor.min())} is below 0")
        shapes = {n: (declared_inputs[n].shape, t.shape) for n, t in inputs.items()}
        check_shared(shapes)
        check_sizes(self._sizes, shapes)
        check_pictured(self._prompt, inputs, cut=self._cut)


def _widened(tensor: torch.Tensor, type_: Type) -> torch.Tensor:
    narrow = tensor.dtype == torch.bfloat16 and type_.dtype == torch.float32
    return tensor.float() if narrow else tensor


def _type_name(declared: Any) -> str:
    """The runtime's name of a tensor's dtype; of anything else, its whole type."""
    return str(declared.type).removeprefix("tensor(").removesuffix(")")


def _type(declared: Any) -> Type:
    dtypes = {name: dtype for dtype, name in _RUNTIME_NAMES.items()}
    dtype = dtypes.get(_type_name(declared))
    return Type(dtype, tuple(UNKNOWN_DIM if d is None else d for d in declared.shape))


def _tensor(value: Any) -> torch.Tensor:
    """The output without a copy; it keeps the memory that it lies in alive."""
    tensor = torch.utils.dlpack.from_dlpack(value)
    # DLPack has no name for booleans that the runtime would use: they come as bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


def check_device(device: str) -> None:
    """Raise ``Missing`` where ONNX Runtime cannot use the device."""
    _providers(device)


def _providers(device: str) -> list[str]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    reason = no_cuda()
    if reason:
        raise Missing(reason)
    return [PROVIDER, "CPUExecutionProvider"]


def _refuse_fallback(providers: Sequence[str], loaded: Sequence[str]) -> None:
    """The runtime falls back to the CPU in silence where a provider's libraries do not load."""
    lost = [name for name in providers if name not in loaded]
    if lost:
        raise Missing(
            f"ONNX Runtime could not start its {lost[0]} (its CUDA or cuDNN libraries do not fit "
            "this machine): pip install 'onnxruntime-gpu[cuda,cudnn]', or run with --device cpu"
        )


def _is_the_runtimes(error: Exception) -> bool:
    """Whether ONNX Runtime raised it: its exceptions share no base class below ``Exception``."""
    return type(error) is RuntimeError or type(error).__module__.startswith("onnxruntime")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def build(
    graph: View | str | Path,
    *,
    device: str = "cpu",
    optimize: bool = True,
    threads: int | None = None,
    lean: bool = False,
    sparing: bool = False,
    instead: bytes | None = None,
    path: str | None = None,
) -> OnnxRuntimeExecutable:
    """See ``registry.compile``. A graph goes through a folder that the session outlives. ``lean``,
    ``sparing`` and ``instead``, which is for a file alone: see ``OnnxRuntimeExecutable``.

    Measured on 24 weights of 16 MB (CPU, 1 thread): 0.3 to 0.9 s to write, 0.4 s to load, and a
    peak of 1.06 times the weights. Handing them over as ``OrtValue`` takes the same memory; through
    a serialized proto it takes three times that.
    """
    if isinstance(graph, str | Path):
        file = Path(graph)
        if (file / MANIFEST_FILE).is_file():
            check_files(file)
        if path is not None:
            file = entry_path(file, path)
        file = file / MODEL_FILE if file.is_dir() else file
        if not file.is_file():
            raise Missing(f"{file} is not there: give an artifact's folder or an .onnx file")
        return OnnxRuntimeExecutable(
            file, device=device, optimize=optimize, threads=threads, lean=lean, instead=instead,
            sparing=sparing,
        )  # fmt: skip
    if path is not None:
        raise BadInput(f"path={path} names an entry graph of an artifact's folder, not of a graph")
    from ..onnx.lowering import lowered
    from ..onnx.model_files import write_model

    with Scratch("session") as folder:
        write_model(lowered(graph).model, folder)
        return OnnxRuntimeExecutable(
            folder / MODEL_FILE, device=device, optimize=optimize, threads=threads, lean=lean,
            sparing=sparing,
        )  # fmt: skip


BACKEND = Backend(build, check_device, runs_artifacts=True, library="onnxruntime")

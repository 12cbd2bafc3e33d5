"""Model folders of diffusers: what denoises, and what turns images into latents and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput, Missing, near_misses
from ..core.quiet import quiet
from ..core.view import Source
from ..core.weights import CastWeight, Weight, distinct_bytes
from ..fx.view import FxView
from .checkpoints.checkpoint import Checkpoint, read_checkpoint
from .diffusers_inputs import KNOWN, denoising
from .hf.match import listed
from .hf.model import read_object, stored_dtype
from .hf.pair import Part
from .tracing.on_meta import absent_weights, constructed, drop_parameters
from .tracing.original import ModuleOriginal
from .tracing.trace import trace

PIPELINE = "model_index.json"
CLASS, STEM = "_class_name", "diffusion_pytorch_model"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Projections of attention in autoencoders of before diffusers 0.18, by what they are called now.
"""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers, or one of its models."""
    if (folder / PIPELINE).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and CLASS in read_object(config)


def load_diffusers(
    folder: Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    allow_missing_weights: bool = False,
    part: str | None = None,
) -> FxView:
    """The graph of one model: of a denoiser one step, of an autoencoder both ways, or the one that
    ``part`` names (``encoder``, ``decoder``). No weight is read.

    Inputs and outputs are called as Optimum calls them; images are of the config's size. Raises
    ``BadInput`` for a pipeline as a whole, for classes that are not known, and for weights that do
    not fit; ``Missing`` where weights, or the package diffusers, are not there.
    """
    _refuse_pipeline(folder)
    config = read_object(folder / "config.json")
    cls = _model_class(folder, config)
    checkpoint = read_checkpoint(folder, allow_missing=allow_missing_weights, stem=STEM)
    handles = {} if checkpoint is None else dict(checkpoint.tensors)
    dtype = dtype or stored_dtype(handles)
    model = _construct(folder, cls, config, dtype)
    call = denoising(model, part, dtype)
    weights = _bind(folder, model, handles, checkpoint)
    call.give_to(model)
    names = list(call.inputs)
    view = trace(
        model,
        kwargs={"tensors": list(call.inputs.values())},
        dynamic_shapes={"tensors": [call.shapes[name] for name in names]},
        weights=weights,
        narrow=True,
        source=Source(
            kind="hf",
            name=name or str(folder),
            folder=str(folder),
            files=tuple(
                sorted([folder / "config.json", *(checkpoint.files if checkpoint else ())])
            ),
            source_bytes=distinct_bytes(weights.values()),
            dtype=dtype,
            notes=checkpoint.notes if checkpoint else (),
            original=_original(folder, cls, dtype, call) if checkpoint else None,
        ),
    )
    view.set_inputs(dict(zip(names, view.inputs(), strict=True)))
    if part is not None:
        view.drop_unused_weights()
    view.count_anew()
    return view


def _refuse_pipeline(folder: Path) -> None:
    if not (folder / PIPELINE).is_file():
        return
    parts = [path.name for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]
    models = [name for name in parts if name not in ("safety_checker", "feature_extractor")]
    example = f", as {folder / models[0]}" if models else ""
    raise BadInput(
        f"{folder}: a pipeline of several models ({', '.join(models) or 'none is there'}), and one "
        f"graph is made of one of them: give its folder{example}"
    )


def _model_class(folder: Path, config: Mapping[str, Any]) -> Any:
    named = config[CLASS]
    if named not in KNOWN:
        raise BadInput(
            f"{folder}/config.json: the inputs of {named!r} are not known; of diffusers these are: "
            f"{', '.join(KNOWN)} ({near_misses(str(named), KNOWN)}). Others are traced by "
            "package.module:factory, which returns (model, args)"
        )
    try:
        with quiet():
            import diffusers
    except ImportError:
        raise Missing(
            f"{folder}: a model of diffusers needs that package: pip install "
            "'graphwright[diffusers]'"
        ) from None
    return getattr(diffusers, named)


def _construct(folder: Path, cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    model = constructed(folder, cls, lambda: cls.from_config(dict(config)))
    drop_parameters(model)
    with quiet():
        return model.to(dtype).eval()


def _bind(
    folder: Path, model: Any, handles: Mapping[str, Weight], checkpoint: Checkpoint | None
) -> dict[str, Weight]:
    """A handle for every parameter, and for every buffer that the checkpoint holds."""
    if checkpoint is None:
        return absent_weights(folder, model)
    by_name = {_todays(name): weight for name, weight in handles.items()}
    weights: dict[str, Weight] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        weight = by_name.get(name)
        if weight is None:
            continue
        if weight.shape != tuple(tensor.shape):
            raise BadInput(
                f"{folder}: the checkpoint's {name!r} is {list(weight.shape)}, the config asks for "
                f"{list(tensor.shape)}"
            )
        weights[name] = weight if weight.dtype == tensor.dtype else CastWeight(weight, tensor.dtype)
    absent = [name for name, _ in model.named_parameters() if name not in weights]
    if absent:
        raise BadInput(
            f"{folder}: {len(absent)} of the model's weights are not in the checkpoint: "
            f"{listed(absent)}. Check {CLASS!r} in config.json against the checkpoint"
        )
    return weights


def _todays(name: str) -> str:
    """A checkpoint's name as diffusers gives it today."""
    owner, _, last = name.rpartition(".")
    before, _, part = owner.rpartition(".")
    if "attentions" not in owner or part not in _OLD_NAMES:
        return name
    return f"{before}.{_OLD_NAMES[part]}.{last}"


def _original(folder: Path, cls: Any, dtype: torch.dtype, call: Part) -> ModuleOriginal:
    from diffusers import __version__

    def make() -> torch.nn.Module:
        model: torch.nn.Module = cls.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True,
            low_cpu_mem_usage=False,
        )  # fmt: skip
        return model.eval()

    return ModuleOriginal(f"{cls.__name__} in diffusers {__version__}", make, call.call)

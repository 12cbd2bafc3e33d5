"""Hugging Face model folders: the graph from ``config.json``, the weights as handles on disk."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch.export import Dim

from ..core.errors import BadInput, first_line
from ..core.memory import refuse_beyond_memory
from ..core.view import Source
from ..core.weights import AbsentWeight, Weight
from ..fx.view import FxView
from .checkpoint import Checkpoint, read_checkpoint
from .hf_cache import cached_forward, cached_inputs, cached_llava_forward, input_names, why_uncached
from .hf_llava import crop_count, llava_forward
from .hf_match import converts, listed, match
from .hf_model import build, longest_text, read_config, read_object, stored_dtype
from .hf_original import hf_original
from .quantized_checkpoint import quantization_of, with_dense_names
from .trace import trace


def load_folder(
    folder: Path,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    allow_missing_weights: bool = False,
    cache: bool | None = None,
) -> FxView:
    """The graph of a model folder. No weight is read, not even for tracing.

    Text models take ``input_ids`` and ``attention_mask`` (``[batch, seq]``, i64), vision models
    ``pixel_values`` (``[batch, channels, height, width]``), LLaVA models all three, the pixels as
    ``[batch, crops, channels, height, width]`` where ``image_seq_length`` counts the features of
    several crops, and give ``logits``; other outputs have the model's own names. ``dtype``
    overrides the config's. A model that generates text takes and gives its keys and values too (see
    ``hf_cache``), unless ``cache`` is false.

    Raises ``BadInput`` for a model that is not understood, for weights that do not fit it and for
    a true ``cache`` of a model that has none, ``Missing`` for absent files; with
    ``allow_missing_weights`` absent weights become handles that cannot be read.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = read_checkpoint(folder, allow_missing=allow_missing_weights)
    quantization = quantization_of(read_object(folder / "config.json"), folder / "config.json")
    if checkpoint is not None and quantization is not None:
        checkpoint = with_dense_names(checkpoint, quantization, folder)
    model = build(folder, config, checkpoint, trust_remote_code=trust_remote_code, dtype=dtype)
    with _by_config(folder):
        inputs, shapes = _example_inputs(model)
        names = list(inputs)
        lacking = "" if cache is False else why_uncached(model, _task(model))
        if cache is not False and not lacking:
            inputs, shapes = cached_inputs(model, inputs)
            names = input_names(model, list(inputs))
    if cache and lacking:
        raise BadInput(f"{folder}: {lacking}")
    _give_forward(model, inputs)
    weights, notes = bind_weights(model, checkpoint, folder)
    original = None if checkpoint is None else hf_original(
        folder, model, stored_dtype(checkpoint.tensors), trust_remote_code=trust_remote_code,
        weights=None if quantization is None else weights,
    )  # fmt: skip
    view = trace(
        model,
        kwargs=inputs,
        dynamic_shapes=shapes,
        weights=weights,
        source=Source(
            kind="hf",
            name=name or str(folder),
            folder=str(folder),
            files=source_files(folder, checkpoint),
            source_bytes=sum(w.nbytes for w in {w.key: w for w in weights.values()}.values()),
            task=_task(model),
            prompt=_image_prompt(model),
            notes=(*notes, *_not_taken(model)),
            original=original,
        ),
    )
    view.set_inputs(dict(zip(names, view.inputs(), strict=True)))
    view.edits = 0
    return view


def source_files(folder: Path, checkpoint: Checkpoint | None) -> tuple[Path, ...]:
    """The files that decide the graph and its numbers: config and checkpoint, sorted."""
    return tuple(sorted([folder / "config.json", *(checkpoint.files if checkpoint else ())]))


@contextlib.contextmanager
def _by_config(folder: Path) -> Iterator[None]:
    """Errors of sizes that the config has, or has not, as ``BadInput``."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{folder}/config.json: {error}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = first_line(error)
        raise BadInput(
            f"{folder}/config.json: no example inputs follow from these sizes: {reason}"
        ) from error


# --- inputs and outputs -------------------------------------------------------------------------


def _example_inputs(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    accepted = inspect.signature(model.forward).parameters
    batch = Dim("batch")
    inputs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    prompt: list[int] = []
    if "pixel_values" in accepted:
        config = getattr(model.config, "vision_config", None) or model.config
        size = config.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        crops = crop_count(model.config) if "input_ids" in accepted else 1
        shape = 2, *([crops] if crops > 1 else []), getattr(config, "num_channels", 3)
        refuse_beyond_memory(4 * math.prod(shape) * height * width, "an image of this size")
        pixels = torch.zeros(*shape, height, width)
        inputs["pixel_values"] = pixels.to(next(model.parameters()).dtype)
        shapes["pixel_values"] = {0: batch}
        if "input_ids" not in accepted:
            return inputs, shapes
        prompt = list(_image_prompt(model))
    config = getattr(model.config, "text_config", None) or model.config
    longest = longest_text(config)
    ids = torch.tensor([prompt + [1] * min(8, longest or 8)] * 2)
    text_shape = {0: batch, 1: Dim("seq", max=longest)}
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return text | inputs, dict.fromkeys(text, text_shape) | shapes


def _not_taken(model: Any) -> tuple[str, ...]:
    """What a person should know of the inputs that the graph does not have."""
    kinds = getattr(model.config, "type_vocab_size", None) or 0
    if kinds < 2 or "token_type_ids" not in inspect.signature(type(model).forward).parameters:
        return ()
    lost = (
        "token_type_ids is no input here: every token is of kind 0, and of a pair of texts the "
        "second one is read as if it went on with the first. Where that matters, trace a module "
        "that takes them (package.module:factory), or give an ONNX file"
    )
    return (lost,)


def _image_prompt(model: Any) -> tuple[int, ...]:
    """The placeholders of one image, one for each of the features that the model makes of it."""
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        return ()
    length = getattr(model.config, "image_seq_length", 0)
    longest = longest_text(model.config.get_text_config())
    if longest is not None and length > longest:
        raise BadInput(f"image_seq_length is {length}, and a text has {longest} tokens at most")
    return (token,) * length


def _give_forward(model: Any, inputs: Mapping[str, Any]) -> None:
    """Let the model take these inputs by name and return its tensors by name.

    A wrapping module would prefix every weight's name; the names in the graph are those of the
    checkpoint.
    """
    original = type(model).forward
    fixed: dict[str, Any] = {"return_dict": True, "use_cache": False}
    accepted = inspect.signature(original).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        fixed = {name: value for name, value in fixed.items() if name in accepted}

    def tensors(self: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = original(self, **given, **fixed)
        return {name: v for name, v in output.items() if isinstance(v, torch.Tensor)}

    def text(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return tensors(self, {"input_ids": input_ids, "attention_mask": attention_mask})

    def vision(self: Any, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return tensors(self, {"pixel_values": pixel_values})

    shown = "pixel_values" in inputs
    forward: Any = llava_forward if shown else text
    if "past_key_values" in inputs:
        forward = cached_llava_forward if shown else cached_forward
    elif "input_ids" not in inputs:
        forward = vision
    model.forward = MethodType(forward, model)


def _task(model: Any) -> str:
    """The task in the words of the hub, where the class says it."""
    name = type(model).__name__
    accepted = inspect.signature(type(model).forward).parameters
    if "pixel_values" in accepted and "input_ids" in accepted:
        return "image-text-to-text"
    if "pixel_values" in accepted:
        return "image-classification" if "ImageClassification" in name else ""
    return "text-generation" if "CausalLM" in name or "LMHead" in name else ""


def bind_weights(
    model: torch.nn.Module, checkpoint: Checkpoint | None, folder: Path
) -> tuple[dict[str, Weight], tuple[str, ...]]:
    """A handle for every parameter, and for every buffer that the checkpoint holds; what a person
    should know of them. Raises ``BadInput`` where some are absent or lack their scales."""
    if checkpoint is None:
        return {
            name: AbsentWeight(name, tuple(p.shape), p.dtype, f"{folder} holds no weights")
            for name, p in model.named_parameters(remove_duplicate=False)
        }, ()
    found = match(model, checkpoint.tensors)
    if found.absent:
        advice = 'Check "architectures" in config.json against the checkpoint'
        if converts(model):
            advice = (
                "transformers stacks or splits tensors of this family's checkpoints (experts, for "
                "one), which is not supported; load the model there and trace it with "
                "package.module:factory"
            )
        raise BadInput(
            f"{folder}: {len(found.absent)} of the model's weights are not in the checkpoint: "
            f"{listed(found.absent)}. {advice}"
        )
    unscaled = found.scale_left_out()
    if unscaled is not None:
        name, scale = unscaled
        raise BadInput(
            f"{folder}: the weight {name!r} is stored as {checkpoint.tensors[name].type}, and "
            f"nothing would apply {scale!r}: the checkpoint is quantized in a way that config.json "
            "does not say. Give the original checkpoint, or one with its scales multiplied in"
        )
    return found.by_parameter(model), (*checkpoint.notes, *found.notes())

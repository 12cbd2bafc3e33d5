"""Hugging Face model folders: the graph from ``config.json``, the weights as handles on disk."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from ...core.errors import BadInput, first_line
from ...core.view import Source
from ...core.weights import Weight, distinct_bytes
from ...fx.view import FxView
from ...structure.costs import weight_bytes
from ...structure.pictured import prompt_metadata
from ..checkpoints.checkpoint import Checkpoint, read_checkpoint, unwrapped
from ..checkpoints.quantized import quantization_of, with_dense_names
from ..tracing.on_meta import absent_weights
from ..tracing.plain_call import named_tensors
from ..tracing.trace import trace
from . import phi4_sound, siglip2
from .adapters import adapter_notes
from .cache import cached_forward, cached_inputs, cached_llava_forward, input_names, kept_by
from .experts import expert_notes
from .inputs import (
    call_options,
    example_inputs,
    image_prompt,
    left_out_notes,
    shown,
    unmeasured,
)
from .layout import settle_boxes
from .llava import llava_forward
from .match import converts, listed, match, spare_prefix
from .model import build, read_config, read_object, stored_dtype, usual_dtype
from .original import hf_original
from .pair import Part, pair_part
from .pictures import size_notes, tower_of
from .recurrent import settle_recurrence
from .rope import settle_rope, switch_metadata
from .slots import Held
from .sound import least_sizes, length_notes, settle_squeeze
from .unread import refuse_parts
from .windows import settle_windows


def load_folder(
    folder: Path,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    allow_missing_weights: bool = False,
    cache: bool | None = None,
    part: str | None = None,
) -> FxView:
    """The graph of a model folder. No weight is read, not even for tracing.

    Text models take ``input_ids`` and ``attention_mask`` (``[batch, seq]``, i64), vision models
    ``pixel_values`` (``[batch, channels, height, width]``), LLaVA models all three, the pixels as
    ``[batch, crops, channels, height, width]`` where ``image_seq_length`` counts the features of
    several crops, and give ``logits``; other outputs have the model's own names. ``dtype``
    overrides the config's. A model that generates text takes and gives its keys and values too (see
    ``cache``), unless ``cache`` is false. ``part`` takes one of the graphs of an encoder-decoder
    (see ``pair``), which is one graph without a cache otherwise, or the tower of ``sounds`` of
    Phi-4-multimodal (``phi4_sound``).

    Raises ``BadInput`` for a model that is not understood, for weights that do not fit it and for
    a true ``cache`` of a model that has none, ``Missing`` for absent files; with
    ``allow_missing_weights`` absent weights become handles that cannot be read.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = read_checkpoint(folder, allow_missing=allow_missing_weights)
    quantization = quantization_of(read_object(folder / "config.json"), folder / "config.json")
    if checkpoint is not None and quantization is not None:
        checkpoint = with_dense_names(checkpoint, quantization, folder)
    wrapped = False
    if checkpoint is not None:
        checkpoint, wrapped = unwrapped(checkpoint)
    return load_model(
        folder, config, checkpoint, name=name, trust_remote_code=trust_remote_code, dtype=dtype,
        cache=cache, part=part, read_here=wrapped or quantization is not None,
        files=source_files(folder, checkpoint),
    )  # fmt: skip


def folder_dtype(folder: Path, *, trust_remote_code: bool = False) -> torch.dtype:
    """The float in which ``load_folder`` takes a model where none is given. Raises as that does for
    files that are damaged."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = read_checkpoint(folder, allow_missing=True)
    return usual_dtype(config, {} if checkpoint is None else checkpoint.tensors)


def load_model(
    folder: Path,
    config: Any,
    checkpoint: Checkpoint | None,
    *,
    files: tuple[Path, ...],
    name: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    cache: bool | None = None,
    part: str | None = None,
    read_here: bool = False,
) -> FxView:
    """``load_folder`` with a config and a checkpoint that were read already. ``read_here``:
    transformers does not read it, and the library's forward runs with the weights as they were read
    here."""
    model = build(folder, config, checkpoint, trust_remote_code=trust_remote_code, dtype=dtype)
    settle_recurrence(model)
    settle_squeeze(model)
    settle_boxes(model)
    settled = (*settle_rope(model), *settle_windows(model), *expert_notes(model))
    tower = tower_of(config)
    if tower is not None and tower.settle is not None:
        tower.settle(model)
    own = None if part is None else phi4_sound.own_part(model, part)
    settled += (*size_notes(config), *adapter_notes(folder)) if own is None else own.notes
    if not config.architectures:
        why = "which reads all of the checkpoint" if checkpoint is not None else "without a head"
        settled += (f"config.json names no class: taken as {type(model).__name__}, {why}",)
    with _by_config(folder):
        inputs, shapes = example_inputs(model, folder)
        names = list(inputs)
        wanted = cache is not False and part is None
        held, lacking = kept_by(model, _task(model)) if wanted else ((), "")
        if held:
            inputs, shapes = cached_inputs(model, inputs, held)
            names = input_names(held, list(inputs))
    settled += left_out_notes(model, inputs) if own is None else ()
    if cache and lacking:
        raise BadInput(f"{folder}: {lacking}")
    called = own
    if own is None and part is not None:
        called = pair_part(model, part, (inputs, shapes))
    if called is None:
        _give_forward(model, inputs, held)
    else:
        names, inputs, shapes = _take_part(model, called)
    settled += length_notes(model, names)
    weights, notes = bind_weights(model, checkpoint, folder)
    original = None if checkpoint is None else hf_original(
        folder, model, stored_dtype(checkpoint.tensors), trust_remote_code=trust_remote_code,
        weights=weights if read_here else None,
        call=None if called is None else called.by_library or called.call, held=held,
    )  # fmt: skip
    view = trace(
        model,
        kwargs=inputs,
        dynamic_shapes=shapes,
        weights=weights,
        narrow=True,
        source=Source(
            kind="hf",
            name=name or str(folder),
            folder=str(folder),
            files=files,
            source_bytes=distinct_bytes(weights.values()),
            dtype=dtype or usual_dtype(config, checkpoint.tensors if checkpoint else {}),
            task=_task(model) if own is None else "",
            prompt=image_prompt(model) if own is None else (),
            least=least_sizes(model, names),
            notes=(*notes, *settled),
            original=original,
        ),
    )
    view.set_inputs(dict(zip(names, view.inputs(), strict=True)))
    view.metadata().update(prompt_metadata(view.source.prompt))
    view.metadata().update(switch_metadata(model))
    if tower is not None and tower.metadata is not None and "pixel_values" in names:
        view.metadata().update(tower.metadata(config))
    if part is not None:
        view.drop_unused_weights()
        view.source.source_bytes = weight_bytes(view)
    view.count_anew()
    return view


def _take_part(model: Any, part: Part) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Give the model its part's call; the names of the inputs, the call's arguments and shapes."""
    part.give_to(model)
    names = list(part.inputs)
    shapes = {"tensors": [part.shapes[name] for name in names]}
    return names, {"tensors": list(part.inputs.values())}, shapes


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


def _give_forward(model: Any, inputs: Mapping[str, Any], held: Sequence[Held]) -> None:
    """Let the model take these inputs by name and return its tensors by name.

    A wrapping module would prefix every weight's name; the names in the graph are those of the
    checkpoint.
    """
    original = type(model).forward
    fixed = call_options(model) | siglip2.settle(model)

    def plain(self: Any, **feeds: torch.Tensor) -> dict[str, torch.Tensor]:
        output = original(self, **unmeasured(self, feeds), **fixed)
        return named_tensors(output, feeds)

    merged = bool(image_prompt(model)) and "pixel_values" in inputs
    call: Any = llava_forward if merged else plain
    if "past_key_values" in inputs:
        call = partial(cached_llava_forward if merged else cached_forward, held=held)

    def named(self: Any, **feeds: Any) -> Any:
        return call(self, **feeds)

    # The exporter calls what the forward's signature names.
    named.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("self", *inputs)
    ])  # fmt: skip
    model.forward = MethodType(named, model)


def _task(model: Any) -> str:
    """The task in the words of the hub, where the class says it."""
    name = type(model).__name__
    accepted = inspect.signature(type(model).forward).parameters
    if shown(model) and image_prompt(model):
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
        return absent_weights(folder, model), ()
    matches = match(model, checkpoint.tensors)
    if matches.absent:
        advice = 'Check "architectures" in config.json against the checkpoint'
        if converts(model):
            advice = (
                "transformers stacks or splits tensors of this family's checkpoints (experts, for "
                "one), which is not supported; load the model there and trace it with "
                "package.module:factory"
            )
        prefix = spare_prefix(model, checkpoint.tensors)
        if prefix:
            advice = (
                f"Names of the checkpoint begin with {prefix!r}, and without it they are the "
                "model's: save the tensors without it (safetensors.torch.load_file and save_file)"
            )
        raise BadInput(
            f"{folder}: {len(matches.absent)} of the model's weights are not in the checkpoint: "
            f"{listed(matches.absent)}. {advice}"
        )
    unscaled = matches.scale_left_out()
    if unscaled is not None:
        name, scale = unscaled
        raise BadInput(
            f"{folder}: the weight {name!r} is stored as {checkpoint.tensors[name].type}, and "
            f"nothing would apply {scale!r}: the checkpoint is quantized in a way that config.json "
            "does not say. Give the original checkpoint, or one with its scales multiplied in"
        )
    refuse_parts(model, matches.unread, matches.weights, folder)
    return matches.by_parameter(model), (*checkpoint.notes, *matches.notes())

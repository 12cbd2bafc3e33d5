"""Which of transformers' classes a folder's model is: the one that its config names, or the one
that takes what its checkpoint holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import BadInput
from ...core.quiet import quiet
from ...core.weights import Weight
from .match import listed, match
from .pictures import TOWERS
from .sound import SERIES

_PLACED = frozenset({"image_embeds_position_mask", "pixel_values_images", "image_patches"})
"""What forwards take by which images get into a text in other ways than in place of a token."""
_SOUND_TOKENS = ("audio_token_id", "audio_token_index")
"""Where a config names the token in whose place a sound stands."""
_SPOKEN = frozenset({"user_audio_codes"})
"""What forwards take that hear and speak by codes, beside a text (Moshi)."""
VIDEO = "pixel_values_videos"
"""The input that holds videos of a model that takes these alone."""
_ADVICE = 'write the class into config.json, as "architectures": ["{}"]'


def named_class(folder: Path, config: Any, trust_remote_code: bool) -> Any | None:
    """The first of ``architectures``; ``None`` where the config names none. Raises ``BadInput``."""
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{folder}/config.json: architectures must be a list of names, not {names}")
    if not names:
        return None
    return _check_taken(folder, _find(folder, config, names[0], trust_remote_code), config)


def class_of_tensors(
    folder: Path, config: Any, handles: Mapping[str, Weight], make: Callable[[Any], Any]
) -> Any:
    """The class of the config's model type that reads most of the checkpoint and lacks nothing of
    it; without a checkpoint the one without a head. ``make`` builds a class without parameters.

    Of classes that read as much, as those with a tied head and without a head do, the names tell: a
    class with a head saves the model below it under a prefix. Raises ``BadInput`` where they do not
    tell, and where tensors are left that no class reads.
    """
    base = _base(folder, config)
    reads: dict[Any, int] = {}
    left: dict[Any, Sequence[str]] = {}
    nested: dict[Any, bool] = {}
    for cls in _candidates(config, base) if handles else ():
        try:
            model = make(_check_taken(folder, cls, config))
            found = match(model, handles)
        except BadInput:
            continue
        pools = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
        if [name for name in found.absent if not (pools and "pooler" in name)]:
            continue
        reads[cls], left[cls] = len(set(found.keys.values())), found.unused
        nested[cls] = hasattr(model, model.base_model_prefix or "-") and cls is not base
    if not reads:
        return _check_taken(folder, base, config)
    best = [cls for cls in reads if reads[cls] == max(reads.values())]
    prefix = f"{base.base_model_prefix}."
    below = any(name.startswith(prefix) for name in handles)
    best = [cls for cls in best if nested[cls] == below] or best
    best = _as_attending(best, config)
    names = [cls.__name__ for cls in best]
    if len(best) > 1:
        raise BadInput(
            f"{folder}/config.json names no class, and {' and '.join(names)} read the checkpoint "
            f"alike: {_ADVICE.format(names[0])} or another of them"
        )
    unread = (name for name in left[best[0]] if name in handles)
    lost = [name for name in unread if handles[name].dtype.is_floating_point]
    if lost:
        raise BadInput(
            f"{folder}/config.json names no class, and none of model type {config.model_type!r} "
            f"reads all of the checkpoint: {names[0]} leaves {len(lost)} tensors, "
            f"{listed(lost)}. If that is the model, {_ADVICE.format(names[0])}; else name the "
            "class that wrote them, and check num_labels (id2label) and other sizes of its head"
        )
    return best[0]


def _as_attending(classes: Sequence[Any], config: Any) -> list[Any]:
    """Without masked language models beside a causal one of the same tensors, or the reverse."""
    causal = bool(getattr(config, "is_decoder", False))
    ends = ("ForMaskedLM",) if causal else ("ForCausalLM", "LMHeadModel")
    both = {cls.__name__.endswith("ForMaskedLM") for cls in classes} == {True, False}
    return [c for c in classes if not (both and c.__name__.endswith(ends))] or list(classes)


def _candidates(config: Any, base: Any) -> Iterator[Any]:
    """``base`` and what transformers' tables have for the tasks of its model type, each once."""
    import transformers
    from transformers.models.auto import modeling_auto

    found = {base.__name__: base}
    for table, names in vars(modeling_auto).items():
        # A backbone is the model without a head once more, with other outputs.
        if not table.endswith("_MAPPING_NAMES") or "BACKBONE" in table or "CONFIG" in table:
            continue
        entry = names.get(config.model_type) or ()
        for name in (entry,) if isinstance(entry, str) else entry:
            cls = getattr(transformers, name, None)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                found.setdefault(name, cls)
    yield from found.values()


def _base(folder: Path, config: Any) -> Any:
    """The model type's class without a head."""
    import transformers

    with quiet():
        try:
            model = transformers.AutoModel._model_mapping[type(config)]
        except KeyError:
            raise BadInput(
                f"{folder}/config.json: transformers knows no model for {config.model_type!r}; "
                'name its class under "architectures"'
            ) from None
    return model[0] if isinstance(model, tuple | list) else model


def _find(folder: Path, config: Any, name: str, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    table = getattr(config, "auto_map", None) if trust_remote_code else None
    remote = table.values() if isinstance(table, dict) else ()
    reference = next((r for r in remote if isinstance(r, str) and r.endswith(f".{name}")), None)
    if reference is None:
        cls = getattr(transformers, name, None)
    else:
        cls = get_class_from_dynamic_module(reference, str(folder))
    if cls is None:
        raise BadInput(
            f"{folder}/config.json: transformers {transformers.__version__} has no class "
            f"{name!r}; try another version of transformers, or --trust-remote-code if the "
            "model brings its code"
        )
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise BadInput(f"{folder}/config.json: {name!r} under architectures is not a model's class")
    return cls


def _check_taken(folder: Path, cls: Any, config: Any) -> Any:
    """The class, if it is one of those whose inputs are known. Raises ``BadInput``."""
    names = set(inspect.signature(cls.forward).parameters)
    series = SERIES in names and hasattr(config, "num_input_channels")
    told = series or cls.main_input_name == VIDEO
    if not told and not names & {"input_ids", "pixel_values", "input_values", "input_features"}:
        raise BadInput(
            f"{folder}: {cls.__name__} takes none of input_ids, pixel_values, input_values and "
            "input_features; trace it with package.module:factory"
        )
    sounds = bool(names & {"input_features", "input_values"}) and "input_ids" in names
    deaf = sounds and any(getattr(config, name, None) is not None for name in _SOUND_TOKENS)
    deaf = deaf or bool(names & _SPOKEN)
    # One that sees is read for its pictures, and a note says that it does not hear (``inputs``).
    if deaf and config.model_type not in TOWERS:
        raise BadInput(
            f"{folder}: {cls.__name__} puts sounds into a text, which is not read: a graph of its "
            "text alone would be deaf. gw.trace(model, kwargs=processor(...)) traces it for sounds "
            f"of one length{_towers(config)}"
        )
    images = getattr(config, "image_token_id", None) is not None and "pixel_values" in names
    if (images or names & _PLACED) and config.model_type not in TOWERS:
        raise BadInput(
            f"{folder}: {cls.__name__} puts images into a text, which is read for "
            f"{', '.join(TOWERS)}. gw.trace(model, kwargs=processor(...)) traces it for "
            f"images of one size{_towers(config)}"
        )
    return cls


def _towers(config: Any) -> str:
    """Advice that names the classes of the model's parts, where transformers has one."""
    import transformers

    keys = ("vision_config", "audio_config", "encoder_config", "text_config")
    parts = (getattr(config, key, None) for key in keys)
    known = transformers.AutoModel._model_mapping
    classes = [known[type(part)] for part in parts if part is not None and type(part) in known]
    names = [cls.__name__ for cls in classes if isinstance(cls, type)]
    if not names:
        return ""
    return f"; its parts alone are {' and '.join(names)}, saved as folders of their own"

"""Hugging Face configs and models: read, refused or built without a single parameter in memory."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...core.errors import BadInput, Missing, first_line
from ...core.files import open_regular
from ...core.quiet import quiet
from ...core.weights import Weight
from ..checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, refuse_stranger
from ..checkpoints.quantized import KEYS, quantization_of
from ..tracing.on_meta import constructed, drop_parameters, reason
from .experts import split_experts
from .match import match
from .model_class import class_of_tensors, named_class

_DTYPES = ("dtype", "torch_dtype")
MOST_LAYERS = 2000
"""Of a model without weights, for a dry run; one with weights has a tensor a layer at least."""
_LACKS_SDPA = "does not support an attention implementation"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


def download(hub_id: str) -> Path:
    """The local snapshot of a hub id, from the cache or over the network."""
    snapshot = cached(hub_id)
    if snapshot is not None:
        return snapshot
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with quiet():
        try:
            return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = first_line(error)
            raise Missing(
                f"{hub_id}: no folder of that name here, and the model hub did not give it "
                f"({reason}). Try `hf download {hub_id}` on a machine with network access, then "
                "give the folder"
            ) from None


def cached(hub_id: str) -> Path | None:
    """The snapshot of a hub id in the cache; nothing is fetched."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise _needs_transformers() from None
    with quiet():
        try:
            return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        except HFValidationError as error:
            raise BadInput(f"{hub_id!r} is not a Hugging Face id: {error}") from None


def read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The config of a model's folder, in transformers' class of it.

    Raises ``Missing`` where there is none, ``BadInput`` where it is damaged, where it says that the
    checkpoint is quantized, where transformers refuses it, and where it needs code of its own.
    """
    path = folder / "config.json"
    raw = read_object(path)
    quantization_of(raw, path)
    named, file = raw.get("transformers_weights"), SINGLE if (folder / SINGLE).exists() else INDEX
    if named not in (None, file):
        raise BadInput(f"{path}: transformers_weights names {named!r}, and {file} would be read")
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise _needs_transformers() from None
    if "auto_map" in raw and not trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING:
        # Models that transformers has learnt since run without the code that came with them.
        raise BadInput(
            f"{path}: the model brings its own code (auto_map), which is not run unless you ask "
            "for it: read that code, then pass --trust-remote-code"
        )
    plain = _plain_dtypes(raw)
    with quiet():
        try:
            if plain != raw and raw.get("model_type") in CONFIG_MAPPING:
                config = CONFIG_MAPPING[raw["model_type"]].from_dict(plain)
            else:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            # Configs check their own fields, each in its way, and raise errors of any kind.
            raise BadInput(
                f"{path}: transformers does not take this config: {reason(error)}"
            ) from error
    for part, key in itertools.product((config, *vars(config).values()), KEYS):
        if hasattr(part, "attribute_map"):
            vars(part).pop(key, None)  # its class is that of the weights as they are read here
    return config


def _plain_dtypes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with ``bfloat16`` for ``torch.bfloat16``, as ``str`` of a dtype writes it and
    transformers does not take it; in the configs of parts too."""
    plain: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict):
            value = _plain_dtypes(value)
        elif key in _DTYPES and isinstance(value, str):
            value = value.removeprefix("torch.")
        plain[key] = value
    return plain


def read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise Missing(
            f"{path.parent}: no config.json, so this is not a Hugging Face model; give the folder "
            "that save_pretrained wrote"
        )
    refuse_stranger(path)
    with open_regular(path) as file:
        try:
            raw = json.load(file)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: not a JSON object")
    return raw


def _needs_transformers() -> Missing:
    return Missing(
        "a Hugging Face model needs the packages transformers and huggingface-hub: "
        "pip install 'graphwright[hf]'"
    )


def build(
    folder: Path,
    config: Any,
    checkpoint: Checkpoint | None,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """The model with parameters on the meta device and computed buffers in memory."""
    cls = named_class(folder, config, trust_remote_code)
    handles = {} if checkpoint is None else checkpoint.tensors
    _check_sizes(folder, config, len(handles) or MOST_LAYERS)
    dtype = dtype or usual_dtype(config, handles)
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise BadInput(f"{folder}/config.json: dtype {dtype} is none that models compute in")

    def bare(cls: Any) -> torch.nn.Module:
        model: torch.nn.Module = _construct(folder, cls, config, dtype)
        split_experts(model)
        drop_parameters(model)
        model.tie_weights()  # type: ignore[operator]
        return model

    if cls is None:
        cls = class_of_tensors(folder, config, handles, bare)
    model: torch.nn.Module = _construct(folder, cls, config, dtype)
    split_experts(model)
    absent = match(model, handles).absent if handles else ()
    poolers = absent and all("pooler" in key for key in absent)
    if poolers and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        # The checkpoint of a head that does not pool: transformers would make up random numbers.
        model = _construct(folder, cls, config, dtype, add_pooling_layer=False)
    drop_parameters(model)
    model.tie_weights()  # type: ignore[operator]
    for name in match(model, handles).unequal_twins(model):
        # As transformers does, whatever the config says.
        _untie(model, name)
    return model


def _untie(model: torch.nn.Module, name: str) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    fresh = torch.empty_like(module._parameters[key])  # type: ignore[arg-type]
    module._parameters[key] = torch.nn.Parameter(fresh, requires_grad=False)


def longest_text(config: Any) -> int | None:
    """Tokens that a text has at most; ``None`` where the config sets no bound, or says -1. BigBird
    reads longer ones in another way than those up to ``fully_attended``, which a graph holds."""
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is None:
        longest = getattr(config, "max_seq_len", None)  # MPT's name of it
    bounds = [n for n in (longest, fully_attended(config)) if n is not None and n != -1]
    return min(bounds, default=None)


def fully_attended(config: Any) -> int | None:
    """Tokens up to which BigBird (arXiv 2007.14062) looks at all of a text, and behind which at
    blocks, some of them picked by chance; ``None`` of what has no such blocks."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def _check_sizes(folder: Path, config: Any, most: int) -> None:
    """Raise ``BadInput`` before layers are made that no checkpoint has weights for, and for texts
    of no token."""
    for part in (config, *vars(config).values()):
        if not hasattr(part, "attribute_map"):
            continue
        # By transformers' name for it, whatever the config's own is.
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > most:
            raise BadInput(
                f"{folder}/config.json: {layers} layers, where at most {most} can be: the "
                "checkpoint has no more tensors, or it is absent"
            )
        longest = longest_text(part)
        if isinstance(longest, int) and longest < 1:
            raise BadInput(
                f"{folder}/config.json: max_position_embeddings is {longest}, and a text has at "
                "least 1 token"
            )


def _construct(
    folder: Path, cls: Any, config: Any, dtype: torch.dtype, *, attention: str = "", **options: Any
) -> Any:
    # Attention that sdpa cannot say, as Gemma 2's capped logits, is there in plain ops alone:
    # transformers 5.17 leaves the cap out without a word.
    by_sdpa = getattr(cls, "_supports_sdpa", False) and not is_capped(config)
    attention = attention or ("sdpa" if by_sdpa else "eager")
    options = options | {"attn_implementation": attention}
    try:
        return constructed(folder, cls, lambda: cls._from_config(config, dtype=dtype, **options))
    except BadInput as error:
        # A backbone within has no such attention.
        if attention == "sdpa" and _LACKS_SDPA in str(error.__cause__):
            return _construct(folder, cls, config, dtype, attention="eager")
        raise


def is_capped(config: Any) -> bool:
    """Whether the logits of attention have a cap, in a model's text or in itself."""
    parts = (config, *vars(config).values())
    return any(getattr(part, "attn_logit_softcapping", None) for part in parts)


def usual_dtype(config: Any, handles: Mapping[str, Weight]) -> torch.dtype:
    """The float of a model that is built as its config says, or as its checkpoint is."""
    dtype: torch.dtype = config.dtype or stored_dtype(handles)
    return dtype


def stored_dtype(handles: Mapping[str, Weight]) -> torch.dtype:
    """The float dtype that a checkpoint is in, scales of narrow ones aside."""
    floats = (w.dtype for w in handles.values() if w.dtype.is_floating_point)
    return next((dtype for dtype in floats if dtype.itemsize > 1), torch.float32)

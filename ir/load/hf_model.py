"""Hugging Face configs and models: read, refused or built without a single parameter in memory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..core.errors import BadInput, Missing
from ..core.quiet import quiet
from ..core.weights import Weight
from .checkpoint import match

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


def download(hub_id: str) -> Path:
    """The local snapshot of a hub id, from the cache or over the network."""
    found = cached(hub_id)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    with quiet():
        try:
            return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
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
    path = folder / "config.json"
    if not path.is_file():
        raise Missing(
            f"{folder}: no config.json, so this is not a Hugging Face model; give the folder "
            "that save_pretrained wrote"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: not a JSON object")
    if raw.get("quantization_config"):
        raise BadInput(
            f"{path}: the checkpoint is already quantized (quantization_config); give the "
            "original one"
        )
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
    with quiet():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, TypeError, OSError) as error:
            # transformers' configs check their own fields and raise these.
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(f"{path}: transformers does not take this config: {reason}") from error


def _needs_transformers() -> Missing:
    return Missing(
        "a Hugging Face model needs the packages transformers and huggingface-hub: "
        "pip install 'graphwright[hf]'"
    )


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` on the meta device, everything else where it is.

    Layers make their parameters with ``torch.empty``; what a model computes for itself (rotary
    frequencies, position ids, masks) never starts from uninitialised memory, and stays real.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(
    folder: Path,
    config: Any,
    handles: Mapping[str, Weight] | None,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """The model with parameters on the meta device and computed buffers in memory."""
    cls = _model_class(folder, config, trust_remote_code)
    dtype = dtype or config.dtype or _checkpoint_dtype(handles)
    model: torch.nn.Module = _construct(folder, cls, config, dtype)
    absent = [] if handles is None else match(model, handles)[1]
    poolers = absent and all("pooler" in key for key in absent)
    if poolers and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        # The checkpoint of a head that does not pool: transformers would make up random numbers.
        model = _construct(folder, cls, config, dtype, add_pooling_layer=False)
    for owner in model.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[key] = torch.nn.Parameter(
                    parameter.to("meta"), requires_grad=False
                )
    model.tie_weights()  # type: ignore[operator]
    return model


def _construct(folder: Path, cls: Any, config: Any, dtype: torch.dtype, **options: bool) -> Any:
    # Attention that sdpa cannot say, as Gemma 2's capped logits, is there in plain ops alone.
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    try:
        with quiet(), torch.no_grad(), _EmptyOnMeta():
            return cls._from_config(config, dtype=dtype, attn_implementation=attention, **options)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{folder}: {cls.__name__} cannot be built: {reason}") from error


def _model_class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for name in config.architectures or ():
        remote = getattr(config, "auto_map", {}).values() if trust_remote_code else ()
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
        return _refuse_decoder(folder, cls, config)
    with quiet():
        try:
            model = transformers.AutoModel._model_mapping[type(config)]
        except KeyError:
            raise BadInput(
                f"{folder}/config.json: transformers knows no model for {config.model_type!r}; "
                'name its class under "architectures"'
            ) from None
    model = model[0] if isinstance(model, tuple | list) else model
    return _refuse_decoder(folder, model, config)


def _refuse_decoder(folder: Path, cls: Any, config: Any) -> Any:
    names = set(inspect.signature(cls.forward).parameters)
    if "decoder_input_ids" in names:
        encoder = f"{config.model_type.upper()}EncoderModel"
        raise BadInput(
            f"{folder}: {cls.__name__} is an encoder-decoder, which is not traced yet. For its "
            f'encoder alone set "architectures": ["{encoder}"] in config.json'
        )
    both = {"input_ids", "pixel_values"} <= names
    if both and config.model_type != "llava":
        raise BadInput(
            f"{folder}: {cls.__name__} takes text and images together, which is traced for LLaVA "
            "models only. "
            'Name one tower under "architectures" in config.json, as "CLIPVisionModel"'
        )
    if not names & {"input_ids", "pixel_values"}:
        raise BadInput(
            f"{folder}: {cls.__name__} takes neither input_ids nor pixel_values; trace it with "
            "package.module:factory"
        )
    return cls


def _checkpoint_dtype(handles: Mapping[str, Weight] | None) -> torch.dtype:
    floats = (w.dtype for w in (handles or {}).values() if w.dtype.is_floating_point)
    return next(floats, torch.float32)

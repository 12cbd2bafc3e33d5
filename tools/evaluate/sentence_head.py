"""What sentence-transformers runs behind a model: the modules that make one vector of a text.

A folder names them in ``modules.json``, in order; each has a folder of its own with its settings
and weights. The forms are those of sentence-transformers 6.2 and of its older releases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ...ir.core.errors import BadInput, Missing
from ...ir.load.side_files import read_json

Features = dict[str, torch.Tensor]
"""By the library's names: ``token_embeddings`` ``[batch, seq, width]``, ``sentence_embedding``
``[batch, width]``, f64, and masks of tokens, ``attention_mask`` and ``pooled_mask``."""
Module = Callable[[Features], None]

_OLD_MODES = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""In the order in which their vectors are put one behind the other."""


@dataclass(frozen=True)
class SentenceHead:
    """The modules behind a model, and how its texts are read."""

    modules: tuple[Module, ...]
    prompt: str = ""
    """What stands before every text: the prompt that ``config_sentence_transformers.json`` names as
    the default."""
    with_prompt: bool = True
    """Whether the prompt's tokens are pooled too."""
    longest: int | None = None
    """Tokens that a text is cut to; ``None`` for what the model takes."""
    lowercase: bool = False

    @classmethod
    def of(cls, folder: str | Path | None, *, inside: bool = False) -> SentenceHead:
        """That of a model's folder: of one without ``modules.json`` the pooling that
        ``1_Pooling/config.json`` says, else the mean; without modules where they are ``inside`` the
        graph.

        Raises ``BadInput`` for modules that are none of these, or whose settings are not theirs,
        ``Missing`` for weights that are not there.
        """
        listed = [] if inside else _listed(folder)
        pools = [place for kind, place in listed if kind == "Pooling"]
        modules = tuple(_MODULES[kind](folder, place) for kind, place in listed)
        settings = read_json(folder, "sentence_bert_config.json")
        # Since release 6 the tokenizer's settings hold it; a tokenizer without a limit says 1e30.
        longest = settings.get("max_seq_length") or read_json(
            folder, "tokenizer_config.json"
        ).get("model_max_length")
        return cls(
            modules, _default_prompt(folder),
            all(read_json(folder, f"{p}/config.json").get("include_prompt", True) for p in pools),
            longest if type(longest) is int and longest > 0 else None,
            settings.get("do_lower_case") is True,
        )  # fmt: skip

    def text(self, text: str) -> str:
        """What the tokenizer is given of a text."""
        whole = self.prompt + text
        return whole.lower() if self.lowercase else whole

    def skipped(self, tokenizer: Any) -> int:
        """First tokens of each text that are not pooled: the prompt's, where a folder says so."""
        if self.with_prompt or not self.prompt:
            return 0
        row = tokenizer.encode(self.prompt.lower() if self.lowercase else self.prompt)
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return len(row.ids) - (row.ids[-1:] != [] and row.ids[-1] in special)

    def vectors(
        self, tokens: torch.Tensor, mask: torch.Tensor, skipped: int = 0
    ) -> torch.Tensor:
        """``[batch, width]`` f64 of ``[batch, seq, hidden]`` and its mask, padded on the right."""
        pooled = mask.clone()
        pooled[:, :skipped] = 0
        features = {
            "token_embeddings": tokens.double(), "attention_mask": mask, "pooled_mask": pooled,
        }  # fmt: skip
        for module in self.modules:
            module(features)
        if "sentence_embedding" not in features:
            raise BadInput(
                "its modules.json has no Pooling: it gives a vector for each token, and embed "
                "judges one for each text"
            )
        return features["sentence_embedding"]


def _listed(folder: str | Path | None) -> list[tuple[str, str]]:
    """Kind and place of each module behind the model."""
    path = Path(folder) / "modules.json" if folder else None
    if path is None or not path.is_file():
        return [("Pooling", "1_Pooling")]
    try:
        modules = json.loads(path.read_bytes())
        named = [(str(m["type"]), str(m["path"])) for m in modules]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a list of modules with `type` and `path`: {error}") from None
    behind = []
    for number, (kind, place) in enumerate(named):
        last = kind.rpartition(".")[2]
        if number == 0 and last == "Transformer":
            continue
        if not kind.startswith("sentence_transformers.") or last not in _MODULES:
            raise BadInput(
                f"{path}: {kind} is not one of the modules that are run behind a model, which are "
                f"{', '.join(_MODULES)}: judge its vectors in sentence-transformers itself"
            )
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise BadInput(f"{path}: {place!r} lies outside of the folder")
        behind.append((last, place))
    return behind


def _default_prompt(folder: str | Path | None) -> str:
    config = read_json(folder, "config_sentence_transformers.json")
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else ""


# --- the modules ---------------------------------------------------------------------------------


def _pooling(folder: str | Path | None, place: str) -> Module:
    config = read_json(folder, f"{place}/config.json")
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in _OLD_MODES.items() if config.get(key) is True] or ["mean"]
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not modes or not set(map(str, modes)) <= set(_POOLS):
        raise BadInput(
            f"{folder}/{place}/config.json: pooling_mode is {named}; there are {', '.join(_POOLS)}"
        )

    def pool(features: Features) -> None:
        tokens, mask = features["token_embeddings"], features["pooled_mask"]
        features["sentence_embedding"] = torch.cat([_POOLS[m](tokens, mask) for m in modes], 1)

    return pool


def _dense(folder: str | Path | None, place: str) -> Module:
    """``activation(x W' + b)``, with ``use_residual`` and ``x``, or ``x R'``, added."""
    config, weights = read_json(folder, f"{place}/config.json"), _weights(folder, place)
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = getattr(torch.nn, named.rpartition(".")[2], None)
    known = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    if kind is None or not named.startswith("torch.") or not known:
        raise BadInput(
            f"{folder}/{place}/config.json: activation_function is {named}, and must be a module "
            "of torch.nn"
        )
    act = kind()
    source, target = _in_and_out(config)
    own = bool(config.get("use_residual", False))

    def dense(features: Features) -> None:
        x = features[source]
        y = act(functional.linear(x, weights["linear.weight"], weights.get("linear.bias")))
        beside = functional.linear(x, weights["residual.weight"]) if "residual.weight" in weights \
            else x  # fmt: skip
        features[target] = y + beside if own else y

    return dense


def _layer_norm(folder: str | Path | None, place: str) -> Module:
    weights = _weights(folder, place, "norm.weight")

    def norm(features: Features) -> None:
        x, weight = features["sentence_embedding"], weights["norm.weight"]
        features["sentence_embedding"] = functional.layer_norm(
            x, weight.shape, weight, weights.get("norm.bias")
        )

    return norm


def _normalize(folder: str | Path | None, place: str) -> Module:
    source, target = _in_and_out(read_json(folder, f"{place}/config.json"))

    def normalize(features: Features) -> None:
        if source in features:
            features[target] = functional.normalize(features[source], dim=-1)

    return normalize


def _dropout(folder: str | Path | None, place: str) -> Module:
    """Nothing, where nothing is trained."""
    return lambda features: None


def _in_and_out(config: Mapping[str, Any]) -> tuple[str, str]:
    source = str(config.get("module_input_name") or "sentence_embedding")
    return source, str(config.get("module_output_name") or source)


def _weights(
    folder: str | Path | None, place: str, needed: str = "linear.weight"
) -> dict[str, torch.Tensor]:
    """A module's tensors, f64. Raises ``Missing`` where there is no file, ``BadInput`` where one
    does not hold what it should."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = Path(folder or ".") / place
    files = [where / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise Missing(f"{where}: holds no {files[0].name}: modules.json says that it has weights")
    try:
        safe = file.suffix == ".safetensors"
        held = load_file(file) if safe else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None
    if needed not in held:
        raise BadInput(f"{file}: holds no {needed}; it has {', '.join(held) or 'nothing'}")
    return {name: tensor.double() for name, tensor in held.items()}


_MODULES: dict[str, Callable[[str | Path | None, str], Module]] = {
    "Pooling": _pooling, "Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize,
    "Dropout": _dropout,
}  # fmt: skip


# --- poolings, of tokens [batch, seq, width] and their mask [batch, seq] -------------------------


def _first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens[torch.arange(len(tokens)), mask.int().argmax(1)]


def _largest(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)


def _sum(tokens: torch.Tensor, mask: torch.Tensor, power: float) -> torch.Tensor:
    """The sum over the number of tokens to a power."""
    kept = mask[:, :, None].double()
    return (tokens * kept).sum(1) / kept.sum(1).clamp(min=1e-9) ** power


def _weighted(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """By position: the n-th token counts n times (SGPT, arXiv 2202.08904)."""
    weights = mask * torch.arange(1, mask.shape[1] + 1)
    return (tokens * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1e-9)


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(mask.shape[1]) * (mask != 0)
    last = places.argmax(1)
    return tokens[torch.arange(len(tokens)), last] * (mask.sum(1, keepdim=True) > 0)


_POOLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first, "max": _largest, "mean": lambda tokens, mask: _sum(tokens, mask, 1.0),
    "mean_sqrt_len_tokens": lambda tokens, mask: _sum(tokens, mask, 0.5),
    "weightedmean": _weighted, "lasttoken": _last,
}  # fmt: skip

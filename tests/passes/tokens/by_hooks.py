"""A text of the library whose layers differ, from which tokens leave by hooks before its layers.

Each layer is called as the library's model calls it; from the first cut on its hook hands it fewer
tokens: of the stream, of what it takes of each word for itself, of turns, of keys that other layers
made, and masks that the library makes for as many tokens as are left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from graphwright.ir.load.hf.pictures import as_the_library_takes
from torch import Tensor

from .llava import Batch, Score, best, cut, last_paid

masking: Any = importlib.import_module("transformers.masking_utils")


@dataclass
class Told:
    """One forward of ``library``, in eager, with cuts before layers of its text."""

    library: Any
    batch: Batch
    cuts: Mapping[int, int | Tensor]
    """So many image tokens by the score, or which of those that come there."""
    score: Score = last_paid
    anew: bool | Collection[int] = False
    """Whether positions are counted anew behind all cuts, or before which layers they are."""
    features: Callable[[Tensor], Tensor] | None = None
    """What stands for the projected features ``[images, tokens, width]``."""
    choices: list[Tensor] = field(default_factory=list)

    def logits(self) -> Tensor:
        inner = self.library.model
        self.ids, self.mask = self.batch["input_ids"], self.batch["attention_mask"]
        self.places = self.stand = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        self.before, hooks = torch.empty(0), []
        for index, layer in enumerate(inner.language_model.layers):
            hooks.append(layer.register_forward_pre_hook(self._hook(index), with_kwargs=True))
            if hasattr(layer, "self_attn"):
                hooks.append(layer.self_attn.register_forward_hook(self._note))
        inner.get_image_features = self._featured
        try:
            taken = as_the_library_takes(self.library, self.batch)
            logits: Tensor = self.library(**taken, use_cache=False).logits
        finally:
            del inner.get_image_features
            for hook in hooks:
                hook.remove()
        return logits

    def _featured(self, *args: Any, **named: Any) -> Any:
        inner = self.library.model
        given = type(inner).get_image_features(inner, *args, **named)
        if self.features is not None:
            given.pooler_output = tuple(self.features(torch.stack([*given.pooler_output])))
        return given

    def _note(self, _: Any, __: Any, output: Any) -> None:
        self.before = output[1]

    def _hook(self, index: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, named: dict[str, Any]) -> Any:
            stream, *whole = args
            if index in self.cuts:
                beside, here = self._left(index, stream, whole, named)
                keep = self._choose(layer, stream, here, self.cuts[index])
                stream = cut(stream, keep)
                self.ids, self.mask = cut(self.ids, keep), cut(self.mask, keep)
                self.places, self.stand = cut(self.places, keep), cut(self.stand, keep)
                if self.anew is True or (self.anew and index in self.anew):
                    self.stand = torch.arange(stream.shape[1]).expand_as(self.stand)
                shared = named.get("shared_kv_states") or {}
                for kind, states in [*shared.items()]:
                    shared[kind] = [cut(x.transpose(1, 2), keep).transpose(1, 2) for x in states]
            beside, here = self._left(index, stream, whole, named)
            return (stream, *beside), here

        return hook

    def _choose(
        self, layer: Any, stream: Tensor, named: dict[str, Any], choice: int | Tensor
    ) -> Tensor:
        """Which of the tokens that come to a layer stay: bool ``[rows, tokens]``."""
        keep: Tensor = self.ids != self.library.config.image_token_id
        if isinstance(choice, int) and not choice:
            choice = torch.zeros(len(keep), int((~keep)[0].sum()), dtype=torch.bool)
        elif isinstance(choice, int):
            before = here = self.before
            if self.score is not last_paid and hasattr(layer, "self_attn"):
                here = layer.self_attn(layer.input_layernorm(stream), **named)[1]
            choice = best(self.score(before, here)[~keep].reshape(len(keep), -1), choice)
        self.choices.append(choice)
        for row, chosen in zip(keep, choice, strict=True):
            row[(~row).nonzero().squeeze(1)[chosen]] = True
        return keep

    def _left(
        self, index: int, stream: Tensor, whole: list[Any], named: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """What a layer takes beside the stream, of the tokens that are left."""
        if self.places.shape == self.batch["input_ids"].shape:
            return whole, named

        def left(tensor: Tensor, places: Tensor) -> Tensor:
            rows = tensor.expand(len(places), -1, -1)
            return torch.stack([x[p] for x, p in zip(rows, places, strict=True)])

        turns = [left(x, self.stand) for x in named["position_embeddings"]]
        kind = self.library.config.get_text_config().layer_types[index]
        return [x if x is None else left(x, self.places) for x in whole], {
            **named, "position_embeddings": turns, "attention_mask": self._masks(stream)[kind],
        }  # fmt: skip

    def _masks(self, stream: Tensor) -> dict[str, Tensor | None]:
        """The library's, of the tokens that are left."""
        config, given = self.library.config, (stream, self.mask, None, None)
        if config.model_type == "gemma4":
            masks: dict[str, Tensor | None] = self.library.create_masks_for_generate(
                config, *given, (self.ids == config.image_token_id).long()
            )
            return masks
        text = config.get_text_config()
        return {
            "full_attention": masking.create_causal_mask(text, *given),
            "linear_attention": masking.create_recurrent_attention_mask(text, *given[:3]),
        }

"""Layers that keep a state, of a convolution or a recurrence, left out and run again, beside others
with keys and values: as the library's own model of these layers writes, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import Refusal
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path, bypass, follow
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.cache_slots import past_of
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import whole
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES

STEPS = 4
TYPES = {"bamba": ("mamba", "attention", "mamba"), "lfm2": ("conv", "full_attention", "conv"),
         "mamba2": ("",) * 2}  # fmt: skip


@dataclass(frozen=True)
class Model:
    library: Any
    views: dict[str, View]

    def of(self, name: str, path: tuple[int, ...]) -> Any:
        """The library's model of these layers."""
        config = self.library.config.to_dict()
        types = [TYPES[name][i] for i in path]
        more = {
            "bamba": {"attn_layer_indices": [i for i, t in enumerate(types) if t == "attention"]},
            "lfm2": {"layer_types": types}, "mamba2": {},
        }[name]  # fmt: skip
        for key in ("layer_types", "full_attn_idxs", "attn_layer_indices"):
            config.pop(key, None)
        own = type(self.library.config)(**config | {"num_hidden_layers": len(path)} | more)
        model = type(self.library)(own).eval()
        held, stack = self.library.state_dict(), "backbone" if name == "mamba2" else "model"
        first = f"{stack}.layers."
        tensors = {k: t for k, t in held.items() if not k.startswith(first)}
        for place, layer in enumerate(path):
            at = f"{first}{layer}."
            tensors |= {f"{first}{place}.{k.removeprefix(at)}": t
                        for k, t in held.items() if k.startswith(at)}  # fmt: skip
        model.load_state_dict(tensors)
        return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return {name: _made(name, tmp_path_factory.mktemp(name)) for name in TYPES}


def _made(name: str, folder: Folder) -> Model:
    more: dict[str, Any] = {"num_hidden_layers": len(TYPES[name])}
    more |= {"attn_layer_indices": [1]} if name == "bamba" else {}
    more |= {"layer_types": list(TYPES[name])} if name == "lfm2" else {}
    family = FAMILIES[name]
    save(replace(family, sizes={**family.sizes, **more}), folder)
    import transformers

    fx = load(folder, cache=True)
    views: dict[str, View] = {"fx": fx}
    if name != "bamba":  # a translation takes seconds, and shows what the two others do
        views["onnx"] = translated(fx)
    for view in views.values():
        canonicalize(view)
    library = getattr(transformers, family.model).from_pretrained(folder)
    return Model(library.eval(), views)


def greedy(view: View, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, and the logits of every step ``[rows, steps, words]``."""
    state: dict[str, torch.Tensor] = {}
    steps, last = [], ids
    for _ in range(STEPS):
        # Without keys nothing tells how many tokens were before: the mask is that of these.
        shown = mask if any("key" in name for name in view.input_names()) else torch.ones_like(last)
        shown = mask if last is ids else shown
        given = {"input_ids": last, "attention_mask": shown, **state}
        outputs = sweep(view, {n: t for n, t in given.items() if n in view.input_names()})
        steps.append(outputs.pop("logits")[:, -1])
        last = steps[-1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, last], 1), torch.cat([mask, torch.ones_like(last)], 1)
        state = {past_of(name): tensor for name, tensor in outputs.items()}
    return ids, torch.stack(steps, 1)


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("bamba", (1, 2), "fx"), ("bamba", (0, 1, 2, 2), "fx"), ("lfm2", (0, 1), "fx"),
        ("lfm2", (1,), "onnx"), ("lfm2", (0, 1, 2, 2), "onnx"), ("mamba2", (1,), "fx"),
        ("mamba2", (0, 0, 1), "onnx"),
    ],
    ids=str,
)  # fmt: skip
def test_a_path_with_states_writes_as_the_librarys_model_of_its_layers(
    name: str, path: tuple[int, ...], kind: str, models: dict[str, Model]
) -> None:
    view = models[name].views[kind].copy()
    follow(view, recognize(view).blocks, Path.of(path), rule="path")
    check_structure(view)
    ids, mask = torch.tensor([[5, 17, 60, 2], [0, 0, 9, 3]]), torch.ones(2, 4, dtype=torch.int64)
    mask[1, :2] = 0
    tokens, logits = greedy(view, ids, mask)
    with torch.no_grad():
        every = torch.cat([mask, torch.ones(2, STEPS, dtype=torch.int64)], 1)
        expected = models[name].of(name, path)(tokens, attention_mask=every).logits
    torch.testing.assert_close(logits, expected[:, -STEPS - 1 : -1], rtol=1e-4, atol=1e-4)
    states = {n.split(".")[1] for n in view.input_names() if n.startswith("past.")}
    assert len(states) == sum(TYPES[name][i] not in ("attention", "full_attention") for i in path)


def test_what_counts_the_tokens_before_stays(models: dict[str, Model]) -> None:
    """The last cache of keys tells how many there were."""
    view = models["lfm2"].views["fx"].copy()
    with pytest.raises(Refusal, match="no other of its length stays"):
        bypass(view, whole(recognize(view).blocks)[1], rule="bypass")

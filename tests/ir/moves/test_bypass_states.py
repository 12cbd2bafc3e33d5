"""Layers that keep a state, of a convolution or a recurrence, or a latent of keys and values, left
out and run again, beside others: as the library's own model of these layers writes, by steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends import Executable
from graphwright.backends.artifacts.entries import branch
from graphwright.backends.generation.decode import Decoder
from graphwright.backends.generation.draft_costs import Costs
from graphwright.backends.generation.draft_path import PathDraft
from graphwright.backends.generation.sampling import Sampling
from graphwright.backends.generation.speculate import Speculator
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Refusal
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path, bypass, follow
from graphwright.ir.moves.bypass_blocks import refusals
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.verify import check_structure
from graphwright.ir.structure.cache_slots import PARTS, SLOTS_KEY, past_name, past_of
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import whole
from graphwright.ir.vocab.builder import Builder
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.run.drafting import drafting

STEPS = 4
TYPES = {"bamba": ("mamba", "attention"), "lfm2": ("conv", "full_attention", "conv"),
         "mamba2": ("",) * 2, "minicpm3": ("attention",) * 2,}  # fmt: skip
KEYED = ("attention", "full_attention")


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
            "lfm2": {"layer_types": types},
            # Its branches are scaled by the number of layers.
            "minicpm3": {"scale_depth": 1.4 * (len(path) / len(TYPES[name])) ** 0.5},
        }.get(name, {})  # fmt: skip
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
    more |= {"dim_model_base": 32} if name == "minicpm3" else {}  # words that differ
    family = FAMILIES[name]
    save(replace(family, sizes={**family.sizes, **more}), folder)
    import transformers

    fx = load(folder, cache=True)
    views: dict[str, View] = {"fx": fx}
    if name in ("lfm2", "mamba2"):
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
        ("bamba", (0,), "fx"), ("bamba", (0, 0, 1), "fx"), ("lfm2", (0, 1), "fx"),
        ("lfm2", (1,), "onnx"), ("lfm2", (0, 1, 2, 2), "onnx"), ("mamba2", (1,), "fx"),
        ("mamba2", (0, 0, 1), "onnx"), ("lfm2", (0, 2), "onnx"),
        ("minicpm3", (1,), "fx"), ("minicpm3", (0, 1, 1), "fx"),
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
        expected = models[name].of(name, path)(tokens, attention_mask=every, use_cache=False).logits
    torch.testing.assert_close(logits, expected[:, -STEPS - 1 : -1], rtol=1e-4, atol=1e-4)
    states = {n.split(".")[1] for n in view.input_names() if n.startswith("past.")}
    assert len(states) == sum(TYPES[name][i] not in KEYED for i in path)


def test_a_latent_is_a_slot_of_its_layer(models: dict[str, Model]) -> None:
    """Of multi-head latent attention: numbered as keys and values are."""
    view = models["minicpm3"].views["fx"].copy()
    follow(view, recognize(view).blocks, Path.of((0, 1, 1)), rule="path")
    slots = [past_name(slot, part) for slot in range(3) for part in PARTS]
    assert [n for n in view.input_names() if n.startswith("past")] == slots
    assert json.loads(view.metadata()[SLOTS_KEY]) == [0, 1, 1]
    with pytest.raises(BadInput, match=r"latents, of which a layer makes both, .* as they are"):
        gw.plan(view, "quantize-cache")


def test_what_counts_the_tokens_before_stays_without_a_mask(models: dict[str, Model]) -> None:
    """The last cache of keys tells how many there were; where it leaves, a mask does."""
    view = models["lfm2"].views["fx"].copy()
    renamed = {"mask" if n == "attention_mask" else n: v
               for n, v in zip(view.input_names(), view.inputs(), strict=True)}  # fmt: skip
    view.set_inputs(renamed)
    with pytest.raises(Refusal, match="no other of its length stays; nor is there an attention_ma"):
        bypass(view, whole(recognize(view).blocks)[1], rule="bypass")


def test_a_draft_by_latents_is_taken_back(models: dict[str, Model]) -> None:
    """A path goes on from the latents of its layers, which are cut back as keys are."""
    view, prompt = models["minicpm3"].views["fx"], [5, 17, 60, 2]
    run, draft = (gw.compile(v, backend="eager")
                  for v in (view, branch(view, "draft", Path.of((1,)))))  # fmt: skip
    costs = {"draft": Costs({1: 1.0, 9: 1.0})}
    speculator = Speculator(run, {"draft": PathDraft(run, draft)}, always=True, costs=costs)
    taken_back, words = 0, set()
    for sampling in (Sampling(), *(Sampling(2.0, seed=seed) for seed in range(2))):
        text = list(speculator.write(prompt, len(prompt) + 12, sampling, []))
        steps = Decoder(run).decode([prompt], max_new_tokens=12, sampling=sampling)
        assert text == [word for (word,) in steps]
        taken_back += speculator.done.drafted - speculator.done.accepted
        words |= set(text)
    assert taken_back and len(words) > 12


def test_a_path_of_layers_with_a_state_is_written_and_drafts_nothing(
    models: dict[str, Model], tmp_path: Folder
) -> None:
    """Without the attention too; a state cannot be taken back, and ``auto`` then drafts nothing."""
    view = models["lfm2"].views["fx"]
    out = gw.export(view, tmp_path / "out", paths={"fast": "0,2"})
    fast = branch(view, "fast", Path.parse("0,2"))
    assert [n for n in fast.input_names() if n.startswith("past")] == ["past.0.conv", "past.2.conv"]
    assert written(gw.compile(out, path="fast")) == written(gw.compile(fast, backend="eager"))
    run = gw.compile(out)
    assert drafting(out, run, "auto", "cpu", 97) is None
    for draft in ("path", "fast", "recycle"):
        with pytest.raises(BadInput, match="a draft that is wrong is taken back"):
            drafting(out, run, draft, "cpu", 97)


def written(run: Executable) -> list[int | None]:
    return [word for (word,) in Decoder(run).decode([[5, 17, 60, 2]], max_new_tokens=12)]


def test_readers_of_a_state_are_asked_once(models: dict[str, Model]) -> None:
    """Two ways at each of many nodes are as many as two to their number."""
    view = models["lfm2"].views["fx"].copy()
    value = dict(zip(view.input_names(), view.inputs(), strict=True))["past.0.conv"]
    blocks = recognize(view).blocks
    b = Builder(view, next(iter(view.nodes())))
    for _ in range(40):
        value = b.add(b.mul(value, 2.0), b.add(value, 1.0))
    assert refusals(view, whole(blocks))[0] == "", "the other state answers for it"

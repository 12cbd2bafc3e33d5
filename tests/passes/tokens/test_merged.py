"""Image tokens that are made of several patches: chosen by the library's own numbers, and cut."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.load.tracing.original import ModuleOriginal
from graphwright.ir.run.sweep import sweep
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from torch import Tensor

from .llava import Batch, chosen_in, close

SIDES = {"gemma3-vl": (16, 16), "internvl": (16, 16), "mistral3": (16, 24)}
GRIDS = {"internvl": (4, 4), "mistral3": (4, 6)}
HALF = "keep=50%"


@dataclass
class Models:
    library: Any
    fx: View
    tokens: int
    image: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    return {name: _models(name, tmp_path_factory.mktemp(name)) for name in SIDES}


def _models(name: str, folder: Any) -> Models:
    save(FAMILIES[name], folder)
    view = load(folder, cache=False)
    assert isinstance(view.source.original, ModuleOriginal)
    image, *_ = view.source.prompt
    return Models(view.source.original.make().eval(), view, len(view.source.prompt), image)


def prompts(name: str, models: Models) -> Batch:
    """Padded on the left, an image each."""
    image = [models.image] * models.tokens
    texts = [[5, 6, *image, 7, 8, 9], [4, *image, 3, 2]]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    pixels = torch.randn(2, 3, *SIDES[name], generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def features_of(name: str, models: Models, pixels: Tensor) -> Tensor:
    more = {"image_sizes": torch.tensor([SIDES[name]] * 2)} if name == "mistral3" else {}
    features = models.library.get_image_features(pixels, **more).pooler_output
    return features if isinstance(features, Tensor) else torch.stack([*features])


def cut_by_the_library(
    name: str, models: Models, batch: Batch, kept: Tensor, block: int, *, anew: bool
) -> tuple[Tensor, Tensor]:
    """Logits where the tokens ``kept`` ``[rows, tokens]`` of each image reach the block and those
    behind it, and which of these are no padding; places are counted ``anew`` or kept."""
    library, ids = models.library, batch["input_ids"]
    shown = ids == models.image
    words = library.get_input_embeddings()(ids)
    features = features_of(name, models, batch["pixel_values"]).flatten(0, -2)
    stream = words.masked_scatter(shown.unsqueeze(-1), features)
    stays = ~shown
    for row, places in enumerate(kept):
        stays[row, shown[row].nonzero().squeeze(1)[places]] = True
    typed = {"token_type_ids": shown.long()} if name == "gemma3-vl" else {}
    mask, layers = batch["attention_mask"], library.model.language_model.layers
    reached: list[Tensor] = [stream]
    if block:
        with layers[block].register_forward_pre_hook(
            lambda _, args, kwargs: reached.append((*args, *kwargs.values())[0]), with_kwargs=True
        ):
            library(inputs_embeds=stream, attention_mask=mask, **typed)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    parts = [reached[-1], mask, places, *typed.values()]
    stream, mask, places, *kinds = (part[stays].unflatten(0, (2, -1)) for part in parts)
    with passed_by(layers[:block]):
        logits = library(
            inputs_embeds=stream, attention_mask=mask, position_ids=None if anew else places,
            **dict(zip(typed, kinds, strict=True)),
        ).logits  # fmt: skip
    return logits, mask.bool()


@contextmanager
def passed_by(layers: Any) -> Iterator[None]:
    for layer in layers:
        layer.forward = lambda stream, *_, **__: stream
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def most_different(features: Tensor, count: int) -> Tensor:
    """DivPrune's greedy choice, ascending, of ``[tokens, width]``."""
    unit = features / features.norm(dim=-1, keepdim=True)
    apart = 1 - unit @ unit.T
    others = apart + 3 * torch.eye(len(apart))
    chosen = [int(others.amin(1).argmax())]
    while len(chosen) < count:
        least = apart[chosen].amin(0)
        least[chosen] = -1
        chosen.append(int(least.argmax()))
    return torch.tensor(sorted(chosen))


def least_alike(features: Tensor, count: int) -> Tensor:
    """Those that no other is like, ascending."""
    unit = features / features.norm(dim=-1, keepdim=True)
    alike = (unit @ unit.T).fill_diagonal_(-1).amax(1)
    # Of two that are each other's nearest, the first counts more.
    order = torch.argsort(alike + torch.arange(len(alike)) * 3e-7)
    return order[:count].sort().values


def most_looked_at(name: str, models: Models, batch: Batch, count: int) -> Tensor:
    """By what the library's last layer of the tower pays to each patch, the mean of a square."""
    library, maps = models.library, []
    module: Any = importlib.import_module(type(library.model.vision_tower).__module__)
    eager = module.eager_attention_forward

    def noted(*args: Any, **options: Any) -> Any:
        result = eager(*args, **options)
        maps.append(result[1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", noted)
        library.set_attn_implementation("eager")
        try:
            for row in batch["pixel_values"]:
                features_of(name, models, row.expand(2, -1, -1, -1))
        finally:
            library.set_attn_implementation("sdpa")
    rows, columns = GRIDS[name]
    layers = len(maps) // 2
    chosen = []
    for last in (maps[layers - 1], maps[2 * layers - 1]):
        scores = last[0].mean(0).sum(0)[: rows * columns] if name == "mistral3" else (
            last[0].mean(0).sum(0)[1:]
        )  # fmt: skip
        squares = scores.reshape(rows // 2, 2, columns // 2, 2).mean((1, 3)).flatten()
        chosen.append(squares.topk(count).indices.sort().values)
    return torch.stack(chosen)


@pytest.mark.parametrize(
    ("name", "recipe", "kind"),
    [
        ("gemma3-vl", "similarity", "fx"), ("gemma3-vl", "fastv", "fx"),
        ("internvl", "diverse", "fx"), ("internvl", "fopru", "onnx"),
        ("mistral3", "similarity", "onnx"), ("mistral3", "fopru", "fx"),
        ("mistral3", "fastv", "fx"),
    ],
)  # fmt: skip
def test_what_goes_on_is_chosen_and_read_as_the_library_does(
    name: str, recipe: str, kind: str, models: dict[str, Models]
) -> None:
    here = models[name]
    graph = here.fx if kind == "fx" else translated(here.fx)
    batch, left = prompts(name, here), here.tokens // 2
    options = f"{HALF} layer=1" if recipe == "fastv" else HALF
    cut = gw.optimize(graph, f"{recipe}{{{options}}}", samples=[batch]).graph
    kept = chosen_in(cut, batch)
    with torch.no_grad():
        features = features_of(name, here, batch["pixel_values"])
        if recipe == "fopru":
            assert torch.equal(kept, most_looked_at(name, here, batch, left))
        elif recipe != "fastv":
            best = most_different if recipe == "diverse" else least_alike
            assert torch.equal(kept, torch.stack([best(row, left) for row in features]))
        expected, real = cut_by_the_library(
            name, here, batch, kept, block=recipe == "fastv", anew=recipe != "fastv"
        )
    close(sweep(cut, batch)["logits"], expected, real)


def test_a_score_of_patches_says_nothing_of_tokens_that_are_means(
    models: dict[str, Models]
) -> None:
    """Gemma 3 pools over squares in an op that tells no patch apart."""
    with pytest.raises(BadInput, match="made of several patches of the vision tower's, and the"):
        gw.plan(models["gemma3-vl"].fx, f"fopru{{{HALF}}}")

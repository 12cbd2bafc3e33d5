"""A draft changes nothing of a text but the time it takes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends import Executable
from graphwright.backends.artifacts.entries import branch
from graphwright.backends.generation.decode import Decoder
from graphwright.backends.generation.draft_costs import Costs, steady
from graphwright.backends.generation.draft_path import PathDraft
from graphwright.backends.generation.draft_recycle import CHANCES, Recycled, form
from graphwright.backends.generation.drafts import Drafter
from graphwright.backends.generation.sampling import Sampling
from graphwright.backends.generation.speculate import Speculator
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path
from graphwright.ir.structure.tree_input import TREE_KEY

transformers: Any = importlib.import_module("transformers")
PROMPTS = [[3, 9, 27, 5], [1], [17, 2, 2, 38, 11, 29, 7]]
WORDS = 40
CHEAP = Costs({1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0}, draft=0.2)
DEAR = Costs({1: 1.0, 2: 2.0, 4: 4.0, 9: 9.0}, draft=0.9)
Runs = dict[str | None, Executable]


PATHS = {"near": "0-1,3", "far": "3", "whole": "0-3", "halves": "0-1.mlp,2-3", "long": "0-3,3"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> View:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".layers.2." not in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    view = load(folder)
    view.metadata()[TREE_KEY] = "true"
    return view


@pytest.fixture(scope="module")
def runs(graph: View) -> Runs:
    paths = {name: branch(graph, name, Path.parse(text)) for name, text in PATHS.items()}
    return {name: gw.compile(view) for name, view in {None: graph, **paths}.items()}


def drafter(runs: Runs, name: str) -> Drafter:
    return Recycled(runs[None], WORDS) if name == "recycle" else PathDraft(runs[None], runs[name])


def speculating(runs: Runs, costs: dict[str, Costs], *, always: bool = False) -> Speculator:
    """With a drafter for each of the names that costs are of."""
    drafters = {name: drafter(runs, name) for name in costs}
    return Speculator(runs[None], drafters, always=always, costs=costs)


def plain(run: Executable, prompt: list[int], sampling: Sampling, eos: list[int]) -> list[int]:
    steps = Decoder(run, 64).decode([prompt], max_new_tokens=24, sampling=sampling, eos=eos)
    return [token for (token,) in steps if token is not None]


@pytest.mark.parametrize("name", ["near", "far", "whole", "halves", "recycle"])
def test_the_text_is_that_of_the_whole_model(runs: Runs, name: str) -> None:
    """Greedy and drawn: the same numbers draw the same tokens, so that the distribution is kept."""
    costs = Costs({1: 1.0, 81: 1.0})
    speculator = speculating(runs, {name: costs}, always=True)
    samplings = (Sampling(), Sampling(0.8, seed=5), Sampling(1.3, top_p=0.9, top_k=12, seed=6))
    for prompt, sampling in zip(PROMPTS, samplings, strict=True):
        expected = plain(runs[None], prompt, sampling, [])
        limit = len(prompt) + 24
        assert list(speculator.write(prompt, limit, sampling, [])) == expected
        done = speculator.done
        assert done.rounds <= done.written == done.rounds + done.accepted
        if name == "whole":
            assert done.accepted == done.drafted > 0
    if name == "recycle":  # by now it has seen what such texts go on with
        list(speculator.write(PROMPTS[0], 28, Sampling(), []))
        assert speculator.done.accepted > 6
        assert "0.0 MB of recycled words" in str(speculator.done)
    eos = [plain(runs[None], PROMPTS[0], Sampling(), [])[7]]
    short = list(speculator.write(PROMPTS[0], 28, Sampling(), eos))
    assert short == plain(runs[None], PROMPTS[0], Sampling(), eos)


@pytest.mark.parametrize("name", ["far", "recycle"])
def test_drawn_tokens_have_the_whole_models_distribution(runs: Runs, name: str) -> None:
    """Of 200 texts of two tokens, against the product of the model's own likelihoods."""
    costs = Costs({1: 1.0, 81: 1.0})
    speculator = speculating(runs, {name: costs}, always=True)
    counts = torch.zeros(WORDS)
    for seed in range(200):
        counts[list(speculator.write(PROMPTS[0], 6, Sampling(1.0, seed=seed), []))[1]] += 1

    def likely(texts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(texts)
        logits = runs[None](input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        return torch.softmax(logits[:, -1].double(), -1)

    second = likely([PROMPTS[0]])[0] @ likely([[*PROMPTS[0], i] for i in range(WORDS)])
    expected = 200 * second
    chosen = expected > 5
    statistic = float(((counts - expected)[chosen] ** 2 / expected[chosen]).sum())
    assert statistic < 2.5 * int(chosen.sum())


def test_costs_say_how_far_to_draft(runs: Runs) -> None:
    assert DEAR.best(lambda n: steady(0.95, n), 8) == (0, 1.0)
    assert DEAR.best(lambda n: steady(0.95, n), 8, least=1)[0] == 1
    assert CHEAP.best(lambda n: steady(0.99, n), 8)[0] == 8
    assert CHEAP.best(lambda n: steady(0.3, n), 8)[0] == 1
    assert CHEAP.best(lambda n: steady(0.5, n), 8)[1] == pytest.approx(1.75 / 1.4)
    assert DEAR.call(3) == 3.0
    for name in ("near", "recycle"):
        for costs, note in ((CHEAP, "forecast"), (DEAR, "steps are faster")):
            speculator = speculating(runs, {name: costs})
            text = list(speculator.write(PROMPTS[0], 28, Sampling(), []))
            assert text == plain(runs[None], PROMPTS[0], Sampling(), [])
            assert note in speculator.done.note
        assert not speculator.done.drafted
        drafters = {name: drafter(runs, name)}
        measured = Speculator(runs[None], drafters, always=False).measured(PROMPTS[0])[name]
        assert min(measured.calls.values()) > 0 and (measured.draft > 0) == (name == "near")


@pytest.mark.parametrize(("path", "tree", "chosen"), [
    (CHEAP, DEAR, "near"), (DEAR, CHEAP, "recycle"), (DEAR, DEAR, "off behind 1 tokens"),
    (CHEAP, replace(CHEAP, draft=0.0), "near"),
])  # fmt: skip
def test_the_faster_of_two_drafts(runs: Runs, path: Costs, tree: Costs, chosen: str) -> None:
    """By what each costs and is right in; of equal costs that of the longer lines."""
    speculator = speculating(runs, {"near": path, "recycle": tree})
    text = list(speculator.write(PROMPTS[0], 28, Sampling(), []))
    assert text == plain(runs[None], PROMPTS[0], Sampling(), [])
    assert speculator.done.note.startswith(chosen)
    assert bool(speculator.done.drafted) == (chosen in ("near", "recycle"))


def test_what_cannot_pay_is_not_learned(runs: Runs) -> None:
    """Where right guesses would be slower than steps; else what a text says is there for later
    ones, though nothing is drafted."""
    expected = plain(runs[None], PROMPTS[0], Sampling(), [])
    for costs, pays in ((DEAR, False), (Costs({1: 1.0, 2: 1.6, 3: 2.6}), True)):
        assert costs.may_pay == pays
        recycled = Recycled(runs[None], WORDS)
        drafters = {"recycle": recycled}
        speculator = Speculator(runs[None], drafters, always=False, costs={"recycle": costs})
        assert list(speculator.write(PROMPTS[0], 28, Sampling(), [])) == expected
        assert not speculator.done.drafted
        assert speculator.done.note.endswith("whatever is guessed") != pays
        assert recycled.matrix.any() == pays
        assert (recycled.chances != pytest.approx(CHANCES)) == pays


def test_a_tree_is_the_best_of_its_size() -> None:
    """Of two ranks, against every tree of four nodes; each size is a beginning of the next."""
    nodes, written = form((0.6, 0.3), 4)
    assert nodes == ((0, 0), (1, 0), (0, 1), (2, 0)) and written[:2] == [1.0, 1.6]
    lines = {(): 1.0}
    for _ in range(4):
        lines |= {(*line, rank): share * (0.6, 0.3)[rank] for line, share in lines.items()
                  for rank in (0, 1)}  # fmt: skip
    best = sorted(lines.values(), reverse=True)[:5]
    assert written[-1] == pytest.approx(sum(best))
    large, _ = form(CHANCES, 80)
    assert large[:9] == form(CHANCES, 9)[0] and all(p <= i for i, (p, _) in enumerate(large))


@pytest.mark.parametrize(("words", "megabytes", "remark"), [
    (65536, 2, "1.1 MB of recycled words"), (128256, 4.3, "4.2 MB of recycled words, as the model"),
])  # fmt: skip
def test_what_is_kept_is_small(runs: Runs, words: int, megabytes: float, remark: str) -> None:
    recycled = Recycled(runs[None], words)
    assert recycled.nbytes < megabytes * 1e6 and recycled.remark.startswith(remark)


def test_bad_input(runs: Runs, graph: View) -> None:
    with pytest.raises(BadInput, match="longer than the model: 5 blocks, and the model has 4"):
        PathDraft(runs[None], runs["long"])
    with pytest.raises(BadInput, match="goes through block 2, which the model does not have"):
        PathDraft(runs["near"], runs["halves"])
    eager = gw.compile(graph, backend="eager")
    with pytest.raises(BadInput, match="make it with the pass tree-mask"):
        Recycled(eager, WORDS)

"""A draft changes nothing of a text but the time it takes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends import Executable
from graphwright.backends.decode import Decoder
from graphwright.backends.sampling import Sampling
from graphwright.backends.speculate import MOST, Costs, Speculator
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load

transformers: Any = importlib.import_module("transformers")
PROMPTS = [[3, 9, 27, 5], [1], [17, 2, 2, 38, 11, 29, 7]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".layers.2." not in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    paths = {"near": "0-1,3", "far": "3", "whole": "0-3", "halves": "0-1.mlp,2-3", "long": "0-3,3"}
    return gw.export(load(folder), tmp_path_factory.mktemp("out") / "out", paths=paths)


@pytest.fixture(scope="module")
def runs(artifact: Path) -> dict[str | None, Executable]:
    return {name: gw.compile(artifact, path=name) for name in
            (None, "near", "far", "whole", "halves", "long")}  # fmt: skip


def plain(run: Executable, prompt: list[int], sampling: Sampling, eos: list[int]) -> list[int]:
    steps = Decoder(run, 64).decode([prompt], max_new_tokens=24, sampling=sampling, eos=eos)
    return [token for (token,) in steps if token is not None]


@pytest.mark.parametrize("name", ["near", "far", "whole", "halves"])
def test_the_text_is_that_of_the_whole_model(runs: Any, name: str) -> None:
    """Greedy and drawn: the same numbers draw the same tokens, so that the distribution is kept."""
    speculator = Speculator(runs[None], runs[name], always=True)
    samplings = (Sampling(), Sampling(0.8, seed=5), Sampling(1.3, top_p=0.9, top_k=12, seed=6))
    for prompt, sampling in zip(PROMPTS, samplings, strict=True):
        expected = plain(runs[None], prompt, sampling, [])
        limit = len(prompt) + 24
        assert list(speculator.write(prompt, limit, sampling, [])) == expected
        done = speculator.done
        assert done.rounds <= done.written <= done.rounds + done.accepted
        if name == "whole":
            assert done.accepted == done.drafted > 0
    eos = [plain(runs[None], PROMPTS[0], Sampling(), [])[7]]
    short = list(speculator.write(PROMPTS[0], 28, Sampling(), eos))
    assert short == plain(runs[None], PROMPTS[0], Sampling(), eos)


def test_drawn_tokens_have_the_whole_models_distribution(runs: Any) -> None:
    """Of 200 texts of two tokens, against the product of the model's own likelihoods."""
    speculator = Speculator(runs[None], runs["far"], always=True)
    counts = torch.zeros(40)
    for seed in range(200):
        counts[list(speculator.write(PROMPTS[0], 6, Sampling(1.0, seed=seed), []))[1]] += 1

    def likely(text: list[int]) -> torch.Tensor:
        ids = torch.tensor([text])
        logits = runs[None](input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        return torch.softmax(logits[0, -1].double(), -1)

    first = likely(PROMPTS[0])
    second = sum(first[i] * likely([*PROMPTS[0], i]) for i in range(40))
    assert isinstance(second, torch.Tensor)
    expected = 200 * second
    chosen = expected > 5
    statistic = float(((counts - expected)[chosen] ** 2 / expected[chosen]).sum())
    assert statistic < 2.5 * int(chosen.sum())


def test_costs_say_how_far_to_draft(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dear = Costs(step=1.0, draft=0.9, calls={1: 1.0, 2: 2.0, 4: 4.0, 9: 9.0})
    assert dear.best(0.95) == (0, 1.0)
    cheap = Costs(step=1.0, draft=0.2, calls={1: 1.0, 2: 1.0, 4: 1.0, 9: 1.0})
    assert cheap.best(0.99)[0] == MOST and cheap.best(0.3)[0] == 1
    assert cheap.best(0.5)[1] == pytest.approx(1.75 / 1.4)
    assert dear.call(3) == 3.0
    for costs, told in ((cheap, "forecast"), (dear, "steps are faster")):
        monkeypatch.setattr(Speculator, "_measured", lambda *_, costs=costs: costs)
        speculator = Speculator(runs[None], runs["near"], always=False)
        text = list(speculator.write(PROMPTS[0], 28, Sampling(), []))
        assert text == plain(runs[None], PROMPTS[0], Sampling(), [])
        assert told in speculator.done.note
    assert not speculator.done.drafted
    monkeypatch.undo()
    measured = Speculator(runs[None], runs["near"], always=False).measured(PROMPTS[0])
    assert min(measured.step, measured.draft, *measured.calls.values()) > 0


def test_bad_input(runs: Any) -> None:
    with pytest.raises(BadInput, match="longer than the model: 5 blocks, and the model has 4"):
        Speculator(runs[None], runs["long"], always=True)
    with pytest.raises(BadInput, match="goes through block 2, which the model does not have"):
        Speculator(runs["near"], runs["halves"], always=True)

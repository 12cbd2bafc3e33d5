"""The requests of lm-evaluation-harness, held against the library's own model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.tools.evaluate import Subject
from graphwright.tools.evaluate.harness import Scorer


@dataclass
class Asked:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def scorer(language_model: Path) -> Scorer:
    return Scorer(Subject.of(language_model))


@pytest.fixture(scope="module")
def likely(language_model: Path) -> Any:
    """Log probabilities ``[seq, words]`` of token ids, by the library."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_model).eval()

    def run(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)  # type: ignore[no-any-return]

    return run


def test_a_continuation_is_scored_behind_its_context(scorer: Scorer, likely: Any) -> None:
    asked = [
        ("The value of the ", "object"), ("It", " is a much longer continuation of it"),
        ("The obj", "ect of it"),
    ]  # fmt: skip
    scores = scorer.loglikelihood([Asked(pair) for pair in asked])
    for (score, greedy), (context, continuation) in zip(scores, asked, strict=True):
        head = scorer._tokenizer.encode(context.rstrip()).ids
        ids = [*head, *scorer._tokenizer.encode(context + continuation).ids[len(head) :]]
        rows = likely(ids)[len(head) - 1 : -1]
        targets = torch.tensor(ids[len(head) :])
        expected = float(rows.gather(1, targets[:, None]).sum())
        assert score == pytest.approx(expected, rel=1e-5)
        assert greedy == bool((rows.argmax(-1) == targets).all())


def test_a_whole_text_is_scored_token_by_token(scorer: Scorer, likely: Any) -> None:
    text = "The same object has the same value. " * 2
    ids = scorer._tokenizer.encode(text).ids
    assert len(ids) < 96
    expected = float(likely(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert scorer.loglikelihood_rolling([Asked((text,))]) == [pytest.approx(expected, rel=1e-5)]


def test_what_stands_before_a_text_is_as_in_the_harness(
    scorer: Scorer, likely: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token stands before a text; windows lie side by side, behind one token each."""
    text = "The same object has the same value. " * 10
    ids, size = scorer._tokenizer.encode(text).ids, 96
    assert size < len(ids) < 2 * size
    monkeypatch.setattr(scorer, "_start", "q")
    start = scorer._tokenizer.token_to_id("q")
    rows = [*likely([start, *ids[: size - 1]]), *likely(ids[-size - 1 : -1])[2 * size - len(ids) :]]
    expected = sum(float(row[token]) for row, token in zip(rows, ids, strict=True))
    assert scorer.loglikelihood_rolling([Asked((text,))]) == [pytest.approx(expected, rel=1e-5)]
    ((score, _),) = scorer.loglikelihood([Asked(("", text[:20]))])
    head = scorer._tokenizer.encode(text[:20]).ids
    rows = likely([start, *head[:-1]])
    assert score == pytest.approx(sum(float(r[t]) for r, t in zip(rows, head, strict=True)))


def test_text_is_written_up_to_a_stop(scorer: Scorer, language_model: Path) -> None:
    (continuation,) = gw.generate(language_model, "The value", max_new_tokens=8)
    settings = {"until": [], "max_gen_toks": 8}
    assert scorer.generate_until([Asked(("The value", settings))]) == [continuation.text]
    stop = continuation.text[3:5]
    cut = scorer.generate_until([Asked(("The value", settings | {"until": [stop]}))])
    assert cut == [continuation.text.split(stop)[0]]


def test_what_writes_no_text_is_refused() -> None:
    with pytest.raises(BadInput, match="is not a language model"):
        Scorer(Subject.of(gw.trace(torch.nn.Linear(3, 3), (torch.ones(1, 3),))))

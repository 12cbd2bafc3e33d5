"""Models that give classes of a text, of its tokens, or a stretch of it; and outputs of any kind.

The figures are compared with what the library's own models give on the same sentences.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.zoo.text import english_sentences, read_tokenizer
from graphwright.tools.evaluate import Subject, evaluate
from graphwright.tools.evaluate.sentences import QUESTION
from graphwright.tools.run.evaluation import OWN_TASKS

KINDS = {
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
}
TEXTS = 12


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, language_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A kind, the folder of a model of that kind, and that of one with other weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
        vocab_size=700, max_position_embeddings=160, initializer_range=0.3,
        num_labels=2 if "question" in request.param else 3,
    )  # fmt: skip
    model = getattr(transformers, KINDS[request.param])(config).eval()
    folders = [tmp_path_factory.mktemp(name) for name in ("source", "other")]
    for folder in folders:
        model.save_pretrained(folder)
        shutil.copy(language_model / "tokenizer.json", folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return request.param, folders[0], folders[1]


def rows(kind: str, folder: Path) -> list[torch.Tensor]:
    """The library's logits ``[positions, classes]`` of each sentence, one at a time."""
    import transformers

    model = getattr(transformers, KINDS[kind]).from_pretrained(folder).eval()
    tokenizer: Any = read_tokenizer(folder)
    tokenizer.enable_truncation(128)
    logits = []
    for text in english_sentences(256)[:TEXTS]:
        row = tokenizer.encode(QUESTION, text) if "question" in kind else tokenizer.encode(text)
        with torch.no_grad():
            outputs = model(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.type_ids]))
        both = "start_logits" in outputs
        logits.append(
            torch.cat([outputs.start_logits, outputs.end_logits]) if both else outputs.logits
        )
    return [row if row.dim() == 2 else row[0] for row in logits]


def test_agreement_is_that_of_the_librarys_models(pair: tuple[str, Path, Path]) -> None:
    kind, source, other = pair
    assert Subject.of(source).kind == kind
    pairs = list(zip(rows(kind, source), rows(kind, other), strict=True))
    equal = torch.cat([(a.argmax(-1) == b.argmax(-1)).double() for a, b in pairs])
    kl = torch.cat([
        torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum(-1)
        for a, b in pairs
    ])  # fmt: skip
    result = evaluate(other, "agreement", source, TEXTS)["agreement"]
    assert (result.samples, result.unit) == (TEXTS, "sentences")
    assert result.detail["predictions"] == len(equal)
    assert result.figures["top1"] == pytest.approx(float(equal.mean()), abs=1e-9)
    assert result.figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.figures["kl"] > 0 and OWN_TASKS[kind][0] == "agreement"


def test_outputs_of_any_model_are_compared_on_a_persons_inputs(tmp_path: Path) -> None:
    """Two linears whose outputs are known multiples of each other."""
    import numpy as np

    class Both(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(4))
            self.scale = scale

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"boxes": x @ self.weight, "class_logits": self.scale * (x @ self.weight)}

    example = (torch.ones(3, 4),)
    a, b = (gw.trace(Both(scale), example) for scale in (1.0, 1.5))
    inputs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=inputs)
    result = evaluate(b, "outputs", a, data=tmp_path / "rows.npz")["outputs"]
    assert (result.samples, result.notes) == (6, ())
    p, q = (torch.from_numpy(inputs * scale).double().log_softmax(-1) for scale in (1.0, 1.5))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert result.figures == pytest.approx({"cosine": 1.0, "rel_l2": 0.5, "top1": 1.0, "kl": kl})
    assert result.detail["boxes"] == pytest.approx({"cosine": 1.0, "rel_l2": 0.0})
    random = evaluate(b, "outputs", a)["outputs"]
    assert random.figures["rel_l2"] == pytest.approx(0.5)
    assert random.notes == ("the inputs are random: give some of the model's own with --data",)

    class One(Both):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"boxes": x @ self.weight}

    with pytest.raises(BadInput, match=r"gives no class_logits .* not versions of one model"):
        evaluate(gw.trace(One(1.0), example), "outputs", a)

"""The tasks on models whose figures are known, and on a small random one run in three ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput, BoundExceeded, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.zoo import scenes
from graphwright.tools.evaluate import (
    EvalResult,
    Setting,
    Subject,
    documents,
    evaluate,
    evaluate_all,
    memory,
    recall,
)

Batch = Mapping[str, torch.Tensor]


class Fake:
    """An executable that is a function from its inputs to its one output."""

    def __init__(
        self, function: Callable[[Batch], torch.Tensor], output: str = "logits",
        inputs: tuple[str, ...] = ("input_ids", "attention_mask"), head_tokens: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._function, self.head_tokens = function, tuple(head_tokens)
        self.input_names, self.output_names = inputs, (output,)

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output_names[0]: self._function(inputs)}


def says(ids: torch.Tensor, words: int) -> torch.Tensor:
    """Logits that put all on one entry each."""
    return 50.0 * torch.nn.functional.one_hot(ids, words).float()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents, one of them longer than the model's 96 tokens."""
    from graphwright.ir.load.zoo.text import english_sentences

    sentences = english_sentences(60)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    parts = [sentences[i] for i in range(11)] + [" ".join(sentences[20:32])]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


# --- one model, three ways to run it -------------------------------------------------------------


def test_graph_executable_and_artifact_give_the_same_numbers(
    language_model: Path, language_graph: View, plain_artifact: Path, text: Path
) -> None:
    view = language_graph
    executable = gw.compile(view, backend="onnxruntime")
    results = [
        evaluate(thing, "perplexity,agreement,recall,generate", view, 12, data=text)
        for thing in (view, executable, plain_artifact, str(language_model))
    ]
    for other in results[1:]:
        for task, result in other.items():
            first = results[0][task]
            assert result.figures == pytest.approx(first.figures, rel=1e-5, abs=1e-9), task
            assert (result.samples, result.unit) == (first.samples, first.unit)
    assert results[2]["agreement"].figures["top1"] == 1.0
    assert results[2]["agreement"].figures["kl"] < 1e-9
    assert results[2]["generate"].figures == {"equal_tokens": 32.0, "identical": 1.0}


def test_perplexity_is_what_the_eager_model_says(language_model: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    subject = Subject.of(language_model)
    setting = Setting(data=text, window=40, stride=16, seed=3)
    ids: list[int] = []
    for document in documents.shuffled(setting):
        ids += subject.tokenizer().encode(document).ids
    loss, count = 0.0, 0
    # Every token but the first is predicted from what fits into 40 tokens at stride 16.
    for start, end, scored in spans(len(ids), 40, 16):
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:end]])).logits[0]
        logits = logits.double().log_softmax(-1)
        for position in range(end - scored, end):
            loss -= float(logits[position - 1 - start, ids[position]])
            count += 1
    result = evaluate_all([subject], ["perplexity"], None, setting)["perplexity"][0]
    assert result.detail["tokens"] == count
    assert result.figures["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-6)
    low, high = result.interval["perplexity"]
    assert low < result.figures["perplexity"] < high


def test_windows_side_by_side_are_judged_each_on_its_own(language_model: Path, text: Path) -> None:
    """As GPTQ's evaluation does: the library's own loss of rows of 40 tokens, the rest left out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    subject = Subject.of(language_model)
    setting = Setting(data=text, window=40, stride=40)
    ids = [
        token
        for document in documents.shuffled(setting)
        for token in subject.tokenizer().encode(document).ids
    ]
    rows = torch.tensor(ids[: len(ids) // 40 * 40]).reshape(-1, 40)
    with torch.no_grad():
        loss = float(model(rows, labels=rows).loss)
    result = evaluate_all([subject], ["perplexity"], None, setting)["perplexity"][0]
    assert result.detail["tokens"] == 39 * len(rows)
    assert result.figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def spans(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    parts, end = [], 1
    while end < length:
        last, end = end, min(length, window if end == 1 else end + stride)
        parts.append((max(0, end - window), end, end - last))
    return parts


@pytest.mark.parametrize("length", [0, 1, 2, 5, 39, 40, 41, 56, 123])
def test_windows_predict_every_token_once_with_context(length: int) -> None:
    windows = documents.windows(range(length), 40, 16)
    scored = [i for w in windows for i in w.ids[-w.scored :]]
    assert scored == list(range(1, length))
    assert all(len(w.ids) == 40 for w in windows[1:]) and all(w.scored <= 16 for w in windows[1:])


def test_padding_and_batches_change_nothing(
    language_graph: View, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = language_graph

    def results() -> Mapping[str, EvalResult]:
        many = evaluate(view, "perplexity,recall,agreement", view, 18, data=text)
        return {**many, **evaluate(view, "generate", view, 4, data=text)}

    together = results()
    monkeypatch.setattr(documents, "TOKENS_PER_BATCH", 1)
    alone = results()
    for task, result in alone.items():
        assert result.figures == pytest.approx(together[task].figures, rel=1e-6, abs=1e-12)


def test_rows_of_a_batch_are_padded_on_the_right() -> None:
    ((rows, inputs),) = documents.batched([[7], [8, 9, 4]])
    assert rows == [1, 0]
    assert inputs["input_ids"].tolist() == [[8, 9, 4], [7, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# --- figures that are known ----------------------------------------------------------------------


def test_agreement_of_known_distributions(language_model: Path, text: Path) -> None:
    """The other model gives every entry of the original's argmax a logit less by log 3."""

    def flat(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch["input_ids"], 700).float()

    def shifted(batch: Batch) -> torch.Tensor:
        return torch.where(flat(batch) > 0, 1 - math.log(3), 0.0)

    result = evaluate(
        Fake(shifted), "agreement", Fake(flat), 8, data=text, tokenizer=language_model
    )["agreement"]
    p = torch.tensor([1.0] + [0.0] * 699, dtype=torch.float64).log_softmax(0)
    q = torch.tensor([1 - math.log(3)] + [0.0] * 699, dtype=torch.float64).log_softmax(0)
    assert result.figures["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)
    # Its logit of 1 became -0.0986, below all others.
    assert result.figures["top1"] == 0.0


def test_recall_of_a_model_that_looks_back_and_of_one_that_does_not(language_model: Path) -> None:
    def looks_back(batch: Batch) -> torch.Tensor:
        """What followed the last earlier occurrence of the last two tokens, or of the last one."""
        ids = batch["input_ids"]
        followers = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            for end in range(2, len(tokens) + 1):
                for size in (2, 1):
                    places = [i for i in range(size, end)
                              if tokens[i - size : i] == tokens[end - size : end]]  # fmt: skip
                    if places:
                        followers[row, end - 1] = tokens[places[-1]]
                        break
        return says(followers, 700)

    def constant(batch: Batch) -> torch.Tensor:
        return says(torch.zeros_like(batch["input_ids"]), 700)

    able = evaluate(Fake(looks_back), "recall", None, 30, tokenizer=language_model)["recall"]
    assert able.figures == {"recall": 1.0, "copy": 1.0}
    assert able.interval["recall"][0] == pytest.approx(15 / (15 + 1.96**2), abs=1e-3)
    unable = evaluate(Fake(constant), "recall", None, 30, tokenizer=language_model)["recall"]
    assert unable.figures == {"recall": 0.0, "copy": 0.0} and unable.samples == 30
    assert set(unable.detail) == {
        *(f"recall {n}" for n in recall.PAIRS), *(f"copy {n}" for n in recall.COPIED)
    }  # fmt: skip


def test_recall_prompts_are_the_same_for_the_same_seed(language_model: Path) -> None:
    tokenizer = Subject.of(language_model).tokenizer()
    first, again, other = (recall.prompts(tokenizer, 12, seed) for seed in (0, 0, 1))
    assert first == again != other
    (prompt, *_) = [p for p in first if (p.kind, p.length) == ("recall", 4)]
    text = tokenizer.decode(list(prompt.ids))
    key = text.rpartition(",")[2].strip().rstrip(":")
    assert text.count(":") == 5
    assert f" {key}:{tokenizer.decode(list(prompt.answer))}" in text


def test_generate_counts_up_to_the_first_difference(language_model: Path, text: Path) -> None:
    def counts(batch: Batch) -> torch.Tensor:
        return says((batch["input_ids"] + 1) % 700, 700)

    def strays(batch: Batch) -> torch.Tensor:
        ids = (batch["input_ids"] + 1) % 700
        ids[:, 32 + 6 :] = 0
        return says(ids, 700)

    result = evaluate(
        Fake(strays), "generate", Fake(counts), 5, data=text, tokenizer=language_model
    )["generate"]
    assert result.figures["identical"] == 0.0
    # Positions 31 to 37 predict the tokens 32 to 38 as the original does: seven of them.
    assert result.figures["equal_tokens"] == 7.0


def test_embed_of_vectors_that_turn(language_model: Path) -> None:
    def vectors(batch: Batch) -> torch.Tensor:
        sums = (batch["input_ids"] * batch["attention_mask"]).double()
        angle = sums.sum(1) % 997 / 997 * 6
        return torch.stack([angle.cos(), angle.sin()], 1)

    def turned(batch: Batch) -> torch.Tensor:
        c, s = math.cos(0.3), math.sin(0.3)
        return vectors(batch) @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)

    first, second = (Fake(f, "sentence_embedding") for f in (vectors, turned))
    result = evaluate(second, "embed", first, 40, tokenizer=language_model)["embed"]
    assert result.figures["cosine"] == pytest.approx(math.cos(0.3), abs=1e-6)
    assert result.figures["retrieval"] > 0.9 and result.samples == 40


def test_classify_by_class() -> None:
    known = {
        pixels[i].sum().item(): int(labels[i])
        for pixels, labels in scenes.classified("test", 48)
        for i in range(len(labels))
    }

    def blind_to_threes(batch: Batch) -> torch.Tensor:
        labels = [known[image.sum().item()] for image in batch["pixel_values"]]
        return says(torch.tensor([0 if label == 3 else label for label in labels]), 10)

    fake = Fake(blind_to_threes, inputs=("pixel_values",))
    result = evaluate(fake, "classify", None, 48)["classify"]
    threes = sum(label == 3 for label in known.values())
    assert result.figures["accuracy"] == pytest.approx(1 - threes / 48)
    assert result.detail["3"]["accuracy"] == 0.0 and result.detail["3"]["samples"] == threes


def test_vqa_by_type(tmp_path: Path) -> None:
    asked = scenes.questions("test", 24)
    words = ["<pad>", "<s>", "<image>", "<unk>", "yes", "no", "none", *map(str, range(10))]
    words += sorted({w for q in asked for w in q.text.split()} - set(words))
    write_words(tmp_path, words)
    pixels = {scenes.normalized([q.scene.image]).sum().item(): q for q in asked}

    def counts_badly(batch: Batch) -> torch.Tensor:
        questions = [pixels[image[None].sum().item()] for image in batch["pixel_values"]]
        right = [words.index("none" if q.type == "count" else q.answer) for q in questions]
        ids = batch["input_ids"]
        assert bool((batch["attention_mask"] == 1).all())
        assert (ids == 2).sum(1).tolist() == [144] * len(questions)
        spread = torch.tensor(right)[:, None].expand(ids.shape)
        return says(spread, len(words))

    names = ("input_ids", "attention_mask", "pixel_values")
    result = evaluate(
        Fake(counts_badly, inputs=names), "vqa,agreement,latency", Fake(counts_badly, inputs=names),
        24, tokenizer=tmp_path,
    )  # fmt: skip
    assert result["vqa"].figures["accuracy"] == 0.75
    by_type = {kind: part["accuracy"] for kind, part in result["vqa"].detail.items()}
    assert by_type == {"contains": 1.0, "count": 0.0, "largest": 1.0, "where": 1.0}
    assert result["agreement"].detail["predictions"] == 24
    answers = range(words.index("yes"), words.index("9") + 1)
    some = Fake(lambda b: counts_badly(b)[..., list(answers)], inputs=names, head_tokens=answers)
    assert evaluate(some, "vqa", None, 24, tokenizer=tmp_path)["vqa"].figures["accuracy"] == 0.75
    few = Fake(lambda b: counts_badly(b)[..., :9], inputs=names, head_tokens=range(9))
    for task, message in (("vqa", "the data needs the token"), ("agreement", "not say the same")):
        with pytest.raises(BadInput, match=message):
            evaluate(few, task, Fake(counts_badly, inputs=names), 24, tokenizer=tmp_path)


def write_words(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_latency_and_memory_of_artifact_and_executable(
    language_model: Path, language_graph: View, plain_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory, "PROCESSES", 1)  # each imports torch and ONNX Runtime
    executable = gw.compile(language_graph, backend="eager")
    artifact, compiled = (
        evaluate(thing, "latency,memory", batch=3, length=5, tokenizer=language_model)
        for thing in (plain_artifact, executable)
    )
    for results in (artifact, compiled):
        low, high = results["latency"].interval["median_ms"]
        assert 0 < low <= results["latency"].figures["median_ms"] <= high
        assert results["latency"].detail["shapes"]["input_ids"] == [3, 5]
        assert results["memory"].figures["peak_bytes"] > 5e7
    sizes = [(plain_artifact / n).stat().st_size for n in ("model.onnx", "model.onnx.data")]
    assert artifact["memory"].figures["disk_bytes"] == sum(sizes)
    assert artifact["memory"].figures["model_bytes"] < artifact["memory"].figures["peak_bytes"]
    assert (artifact["memory"].samples, artifact["memory"].detail["process"]) == (1, "a fresh one")
    assert (compiled["memory"].samples, compiled["memory"].detail["process"]) == (1, "this one")
    assert "disk_bytes" not in compiled["memory"].figures


# --- refusals ------------------------------------------------------------------------------------


def test_nan_is_said_and_never_a_number(language_model: Path, text: Path) -> None:
    def broken(batch: Batch) -> torch.Tensor:
        logits = torch.zeros(*batch["input_ids"].shape, 700)
        logits[0, 0, 0] = math.nan
        return logits

    def fine(batch: Batch) -> torch.Tensor:
        return torch.zeros(*batch["input_ids"].shape, 700)

    for task in ("perplexity", "agreement"):
        with pytest.raises(BoundExceeded, match=rf"^{task}: Fake gives NaN .* of 12 windows"):
            evaluate(Fake(broken), task, Fake(fine), 12, data=text, tokenizer=language_model)
    for task, function in (("recall", "prompts"), ("generate", "steps")):
        infinite = Fake(lambda batch: torch.full((*batch["input_ids"].shape, 700), math.inf))
        with pytest.raises(BoundExceeded, match=rf"{task}: .*NaN or infinite .*{function}"):
            evaluate(infinite, task, infinite, 6, data=text, tokenizer=language_model)


def test_refusals(language_model: Path, language_graph: View, text: Path, tmp_path: Path) -> None:
    view = language_graph
    with pytest.raises(BadInput, match=r"vqa does not fit .*text-generation.*perplexity, agr"):
        evaluate(view, "vqa")
    with pytest.raises(BadInput, match="no task 'recal'; did you mean recall"):
        evaluate(view, ["recal"])
    with pytest.raises(BadInput, match="agreement compares with the original"):
        evaluate(view, "agreement", data=text)
    with pytest.raises(BadInput, match="--length 97 is more than the 96 tokens"):
        evaluate(view, "latency", length=97)
    with pytest.raises(BadInput, match="samples 0 must be 1"):
        evaluate(view, "recall", samples=0)
    with pytest.raises(Missing, match=r"no such file: --data takes plain text"):
        evaluate(view, "perplexity", data=tmp_path / "gone.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 2: has no string `text`"):
        evaluate(view, "perplexity", data=tmp_path / "bad.jsonl")
    bare = Fake(lambda batch: says(batch["input_ids"], 700))
    with pytest.raises(Missing, match=r"no tokenizer.json with the model: .*--tokenizer FOLDER"):
        evaluate(bare, "perplexity", data=text)
    small = Fake(lambda batch: torch.zeros(*batch["input_ids"].shape, 300))
    with pytest.raises(BadInput, match=r"knows 300 tokens .* another model's"):
        evaluate(small, "perplexity", data=text, tokenizer=language_model)


def test_too_few_samples_for_an_interval(language_graph: View, text: Path) -> None:
    view = language_graph
    with pytest.raises(BadInput, match=r"12 prompts give ±0\.195, more than the ±0\.01 .*about"):
        evaluate(view, "recall", None, 12, interval=0.01)
    assert evaluate(view, "recall", None, 12, interval=0.5)["recall"].samples == 12
    with pytest.raises(BadInput, match="1 windows give no interval"):
        evaluate(view, "perplexity", None, 1, data=text, interval=0.5)
    more = evaluate(view, "perplexity", None, 500, data=text)["perplexity"]
    assert more.notes == (f"500 windows asked for, the data hold {more.samples}",)


def test_probes_of_another_vocabulary_are_refused(language_model: Path, text: Path) -> None:
    def flat(words: int) -> Fake:
        return Fake(lambda batch: torch.zeros(*batch["input_ids"].shape, words))

    wide, narrow = flat(800), flat(700)
    with pytest.raises(BadInput, match="700 classes and the original 800"):
        evaluate(narrow, "agreement", wide, 2, data=text, tokenizer=language_model)


def test_a_latency_that_says_more_of_the_machine_is_called_void(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from graphwright.tools.evaluate import latency

    def notes(load: float, rounds: int = 9, spread: float = 1.0) -> str:
        figures = {"median_ms": 10.0, "spread_ms": spread}
        subject = Subject.of(Fake(lambda batch: batch["input_ids"].float()))
        return "; ".join(latency._void(subject, figures, rounds, load))

    monkeypatch.setattr(latency.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert notes(load=0.5) == ""
    assert "work for 6.0 cores ran on a machine of 2" in notes(load=6.0)
    assert "3 rounds tell nothing; give 5 or more" in notes(load=0.5, rounds=3)
    assert "half of its rounds lie 40% of the median apart" in notes(load=0.5, spread=4.0)
    result = evaluate(Fake(lambda batch: batch["input_ids"].float()), "latency")["latency"]
    assert result.samples == 15 and result.detail["load"] >= 0

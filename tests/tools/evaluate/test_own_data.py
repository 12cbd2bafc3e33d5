"""Labels, questions and images of a person's own, from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.zoo import scenes
from graphwright.tools.evaluate import Subject, evaluate
from graphwright.tools.evaluate.own_questions import normalized, soft_accuracy
from PIL import Image


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save(pixels: Any, path: Path) -> str:
    """An image file of pixels ``[3, high, wide]`` in 0 to 1."""
    bytes_ = np.asarray(pixels, dtype=np.float32).transpose(1, 2, 0) * 255
    Image.fromarray(bytes_.round().clip(0, 255).astype(np.uint8)).save(path)
    return path.name


def test_questions_about_ones_own_images(tmp_path: Path, llava: View) -> None:
    """The shipped questions as files: as many answers begin with the right word. Some go on."""
    asked = scenes.questions("test", 12)
    lines = [
        {"image": save(q.scene.image, tmp_path / f"{i}.png"), "question": q.text,
         "answers": [q.answer]}
        for i, q in enumerate(asked)
    ]  # fmt: skip
    model = Subject.of(llava)
    shipped = evaluate(model, "vqa", samples=12)["vqa"]
    own = evaluate(model, "vqa", data=write_lines(tmp_path / "a.jsonl", lines))["vqa"]
    replies = [answer.split(" ") for answer in own.detail["answers"]]
    hits = [words[0] == q.answer for words, q in zip(replies, asked, strict=True)]
    exact = [hit and len(words) == 1 for hit, words in zip(hits, replies, strict=True)]
    assert sum(hits) / 12 == pytest.approx(shipped.figures["accuracy"])
    assert own.figures["accuracy"] == pytest.approx(sum(exact) / 12) and own.samples == 12
    wrong = [line | {"answers": ["some other thing"]} for line in lines[:2]]
    own = evaluate(model, "vqa", data=write_lines(tmp_path / "b.jsonl", wrong))["vqa"]
    assert own.figures["accuracy"] == 0.0
    with pytest.raises(BadInput, match="question 1: has no answers"):
        evaluate(
            model, "vqa",
            data=write_lines(tmp_path / "c.jsonl", [{"image": "a.png", "question": "what ?"}]),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "answers", "score"),
    [
        ("A cat.", ["cat"], 1.0),
        ("two", ["2", "dog"], 1.0),
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),
        ("cat", ["the cat", "Cat!"] + ["dog"] * 8, 0.6),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("cat", ["dog"] * 10, 0.0),
    ],
)
def test_soft_accuracy(reply: str, answers: list[str], score: float) -> None:
    assert soft_accuracy(reply, answers) == pytest.approx(score)


def test_answers_are_compared_as_vqav2_does() -> None:
    assert normalized("The  Ten, red-hot things.") == "10 red hot things"
    assert normalized("3.5") == "3.5" and normalized("1,000") == "1,000"


def test_labels_of_ones_own_images(tmp_path: Path, vit: View) -> None:
    pixels, labels = next(iter(scenes.classified("test", 8, 0, 8)))
    lines = [
        {"image": save(image * scenes.STD + scenes.MEAN, tmp_path / f"{i}.png"), "label": label}
        for i, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True))
    ]
    data = write_lines(tmp_path / "labels.jsonl", lines)
    model = Subject.of(vit)
    shipped = evaluate(model, "classify", samples=8)["classify"]
    own = evaluate(model, "classify", data=data)["classify"]
    assert own.figures == shipped.figures
    with pytest.raises(BadInput, match="sample 1: label is 'no such', and takes the number"):
        evaluate(model, "classify",
                 data=write_lines(data, [lines[0] | {"label": "no such"}]))  # fmt: skip


def test_labels_of_ones_own_texts(tmp_path: Path, language_model: Path) -> None:
    import shutil

    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
        vocab_size=700, initializer_range=0.3, id2label={0: "good", 1: "bad"},
        label2id={"good": 0, "bad": 1},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(language_model / "tokenizer.json", tmp_path)
    texts = [f"A text about {what}." for what in ("cats", "dogs", "birds", "some longer thing")]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    with torch.no_grad():
        right = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]
    names = ["good", "bad"]
    lines = [{"text": t, "label": names[r]} for t, r in zip(texts, right, strict=True)]
    lines[0]["label"] = names[1 - right[0]]
    data = write_lines(tmp_path / "labels.jsonl", lines)
    assert evaluate(tmp_path, "classify", data=data)["classify"].figures == {"accuracy": 0.75}
    with pytest.raises(Missing, match=r"classify needs labels .* give --data FILE.jsonl"):
        evaluate(tmp_path, "classify")
    for separator, name in ((",", "a.csv"), ("\t", "a.tsv")):
        rows = ['"{}"{}{}'.format(line["text"], separator, line["label"]) for line in lines]
        (tmp_path / name).write_text("\n".join([f"sentence{separator}label", *rows]) + "\n")
        own = evaluate(tmp_path, "classify", data=tmp_path / name)["classify"]
        assert own.figures == {"accuracy": 0.75}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> Any:
    """A folder of a classifier of so many classes and problem, with a tokenizer of pairs."""
    import shutil

    import transformers

    def made(labels: int, problem: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp(f"scorer-{labels}")
        torch.manual_seed(2)
        config = transformers.BertConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
            vocab_size=700, initializer_range=0.5, num_labels=labels, problem_type=problem,
        )  # fmt: skip
        transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
        shutil.copy(language_model / "tokenizer.json", folder)
        return folder

    return made


def test_pairs_and_long_texts_are_read_as_the_library_reads_them(
    tmp_path: Path, scorer: Any
) -> None:
    """Two texts of a line as a pair, each with its type; a text up to what the model takes."""
    import transformers
    from graphwright.tools.evaluate.labelled import exam
    from graphwright.tools.evaluate.task import Setting
    from tokenizers.processors import TemplateProcessing

    folder = scorer(3)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single="a $A b", pair="a $A b $B:1 b:1",
        special_tokens=[(t, inner.token_to_id(t)) for t in "ab"],
    )  # fmt: skip
    inner.save(str(folder / "tokenizer.json"))
    pairs = [("A cat sat.", "One sat."), ("No dog.", "A dog here."), ("word " * 300, "end")]
    keys = (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"))
    lines = [{a: x, b: y, "label": str(i)}
             for i, ((a, b), (x, y)) in enumerate(zip(keys, pairs, strict=True))]  # fmt: skip
    data = write_lines(tmp_path / "pairs.jsonl", lines)
    subject = Subject.of(folder)
    (batch,) = exam(subject, Setting(data=data)).batches
    assert batch["input_ids"].shape[1] == 512
    for row, (first, second) in enumerate(pairs[:2]):
        kept = batch["attention_mask"][row].bool()
        expected = tokenizer(first, second)["input_ids"]
        assert batch["input_ids"][row][kept].tolist() == expected
        assert int(batch["token_type_ids"][row].sum()) == len(inner.encode(second).ids) - 1


def test_what_has_no_likeliest_class_is_not_judged_by_one(tmp_path: Path, scorer: Any) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"text": "A cat.", "label": 3}])
    with pytest.raises(BadInput, match="gives one number, a score, and classify counts"):
        evaluate(scorer(1), "classify", data=data)
    with pytest.raises(BadInput, match="classes of which several may be right"):
        evaluate(scorer(3, "multi_label_classification"), "classify", data=data)
    with pytest.raises(BadInput, match="sample 1: label is 3, and the model has classes 0 to 2"):
        evaluate(scorer(3), "classify", data=data)
    other = write_lines(tmp_path / "b.jsonl", [{"content": "A cat.", "label": 1}])
    with pytest.raises(BadInput, match=r"sample 1: no `text` in content, label; it takes a line"):
        evaluate(scorer(3), "classify", data=other)

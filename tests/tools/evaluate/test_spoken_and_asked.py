"""Speech by its word error rate, and questions by SQuAD's scores, on files of a person's own."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.load.zoo.text import english_sentences
from graphwright.tools.evaluate import Subject, answer, evaluate
from graphwright.tools.evaluate.word_scores import edits, exact, f1, normalized, plain

RATE = 16000
CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHS"]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_sound(path: Path, samples: Any, rate: int = RATE, channels: int = 1) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path.name


@pytest.mark.parametrize(
    ("actual", "expected", "count"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sat down", "the cat sat", 1),
        ("cat sat", "the cat sat", 1),
        ("a dog sat", "the cat sat", 2),
        ("", "the cat sat", 3),
        ("sat the cat", "the cat sat", 2),
    ],
)
def test_words_are_put_in_left_out_and_replaced(actual: str, expected: str, count: int) -> None:
    assert edits(actual.split(), expected.split()) == count


def test_squads_scores() -> None:
    assert normalized("The  Eiffel-Tower, (in) an A.") == "eiffeltower in"
    assert plain("The  Eiffel-Tower, in A.") == "the eiffeltower in a"
    assert exact("The cat!", ["dog", "cat"]) == 1.0 and exact("cats", ["cat"]) == 0.0
    assert f1("the black cat", ["a cat", "white dog"]) == pytest.approx(2 * 1 / (2 + 1))
    assert f1("b b c", ["b c c"]) == pytest.approx(2 * 2 / 6)
    assert (exact("", []), f1("", []), exact("x", []), f1("x", [])) == (1.0, 1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def asked(language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers by a stretch of text, of random weights."""
    folder = tmp_path_factory.mktemp("asked")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
        vocab_size=700, max_position_embeddings=160, initializer_range=0.5, num_labels=2,
    )  # fmt: skip
    transformers.BertForQuestionAnswering(config).save_pretrained(folder)
    shutil.copy(language_model / "tokenizer.json", folder)
    return folder


def by_the_library(folder: Path, question: str, context: str) -> str:
    """The likeliest stretch of at most 30 tokens, of all of them."""
    model = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    row = tokenizer(question, context, return_offsets_mapping=True, return_token_type_ids=True)
    inputs = {key: torch.tensor([row[key]]) for key in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        outputs = model(**inputs)
    start, end = outputs.start_logits[0], outputs.end_logits[0]
    inside = [i for i, of in enumerate(row.sequence_ids(0)) if of == 1]
    pairs = [(float(start[i] + end[j]), i, j) for i in inside for j in inside if 0 <= j - i < 30]
    _, first, last = max(pairs)
    return context[row["offset_mapping"][first][0] : row["offset_mapping"][last][1]]


def test_questions_are_answered_by_the_likeliest_stretch(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [text[:200] for text in english_sentences(8)[:4]]
    replies = [by_the_library(asked, "What is it?", context) for context in contexts]
    monkeypatch.setattr(answer, "BEST", 500)
    labels = [[replies[0]], ["other", replies[1].upper()], ["xyzzy"], [f"{replies[3]} xyzzy"]]
    lines = [{"question": "What is it?", "context": context, "answers": answers}
             for context, answers in zip(contexts, labels, strict=True)]  # fmt: skip
    model = Subject.of(asked)
    result = evaluate(model, "answer", data=write_lines(tmp_path / "a.jsonl", lines))["answer"]
    assert result.detail["answers"] == replies and (result.samples, result.unit) == (4, "questions")
    words = len(normalized(replies[3]).split())
    partly = 2 * words / (2 * words + 1)
    assert result.figures == pytest.approx({"exact": 0.5, "f1": (2 + partly) / 4})
    # A window of few tokens holds no more of the context; the windows together hold all of it.
    monkeypatch.setattr(answer, "LONGEST", 24)
    long = [lines[0] | {"context": " ".join(contexts)}]
    result = evaluate(model, "answer", data=write_lines(tmp_path / "b.jsonl", long))["answer"]
    assert result.detail["answers"][0] in long[0]["context"]


def test_a_question_without_an_answer(asked: Path, tmp_path: Path) -> None:
    """Then a model may give none: where its first token is likelier than every stretch."""
    window = answer._Window(
        0, torch.tensor([9.0, 0.0, 5.0]), torch.tensor([0.0, 0.0, 3.0]), [None, (0, 2), (3, 5)]
    )
    question = answer.Asked("?", "ab cd", ())
    assert answer._reply(question, list(window.spans(may_pass=True))) == ""
    assert answer._reply(question, list(window.spans(may_pass=False))) == "cd"
    with pytest.raises(Missing, match=r"answer needs questions: give --data FILE\.jsonl"):
        evaluate(asked, "answer")
    line = {"question": "?", "context": "ab", "label": 3}
    with pytest.raises(BadInput, match=r"question 1: has no answers; it takes a line"):
        evaluate(asked, "answer", data=write_lines(tmp_path / "a.jsonl", [line]))
    with pytest.raises(BadInput, match=r"transcribe does not fit .* these do: agreement, answer"):
        evaluate(asked, "transcribe", data=tmp_path / "a.jsonl")


def heard(name: str, folder: Path) -> Any:
    """A small model of speech with random weights, in a folder with all that reads sound."""
    torch.manual_seed(1)
    if name == "whisper":
        config = transformers.WhisperConfig(
            encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=700,
            num_mel_bins=8, max_source_positions=50, max_target_positions=32, init_std=0.6,
            decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.WhisperForConditionalGeneration(config).eval()
        model.generation_config.update(max_length=16, suppress_tokens=[7, 9, 11],
                                       begin_suppress_tokens=[2])  # fmt: skip
        extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    else:
        config = transformers.Wav2Vec2Config(
            num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=32,
            vocab_size=len(CHARACTERS), conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(8, 8),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16, pad_token_id=0,
            num_conv_pos_embedding_groups=4, initializer_range=0.5, mask_time_prob=0.0,
        )  # fmt: skip
        model = transformers.Wav2Vec2ForCTC(config).eval()
        extractor = transformers.Wav2Vec2FeatureExtractor()
        (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(CHARACTERS)}))
        transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_speech_is_written_as_the_library_writes_it(
    name: str, language_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if name == "whisper":
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(language_model / "tokenizer.json")
        ).save_pretrained(folder)
    model, extractor = heard(name, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rng, texts, lines = np.random.default_rng(0), [], []
    for number in range(3):
        sound = rng.uniform(-0.5, 0.5, RATE // 4 * (1 + number))
        lines.append({"audio": write_sound(tmp_path / f"{number}.wav", sound), "text": "x"})
        read = (sound * 32767).astype("<i2").astype(np.float32) / 32768
        inputs = extractor(read, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            tokens = (model.generate(**inputs, do_sample=False, num_beams=1) if name == "whisper"
                      else model(inputs.input_values).logits.argmax(-1))[0]  # fmt: skip
        texts.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    lines[0]["text"], lines[1]["text"] = texts[0], f"{texts[1].lower()}, AND MORE"
    data = write_lines(tmp_path / "said.jsonl", lines)
    subject = Subject.of(folder)
    result = evaluate(subject, "transcribe", data=data)["transcribe"]
    assert result.detail["texts"] == texts and any(texts)
    spoken = [line["text"] for line in lines]
    errors = [edits(a.split(), b.split()) for a, b in zip(texts, spoken, strict=True)]
    assert result.figures["wer"] == pytest.approx(sum(errors) / sum(len(t.split()) for t in spoken))
    assert result.figures["wer_plain"] < result.figures["wer"] or name == "whisper"
    lines[2]["audio"] = write_sound(tmp_path / "slow.wav", rng.uniform(-1, 1, 200), 8000, 2)
    with pytest.raises(BadInput, match=r"slow\.wav has 8000 samples a second, and the model takes"):
        evaluate(subject, "transcribe", data=write_lines(data, lines[2:]))
    with pytest.raises(Missing, match=r"transcribe needs recordings: give --data FILE\.jsonl"):
        evaluate(subject, "transcribe")

"""``--calib``: how texts become windows of tokens."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.hf.chat_template import chat_text
from graphwright.ir.load.zoo.text import english_sentences, read_tokenizer
from graphwright.tools.data.calibration import read
from graphwright.tools.data.text import LENGTH, read_texts

from .conftest import WORDS, jsonl


def test_text_is_cut_into_windows_that_fit_the_model(tmp_path: Path, llama: View) -> None:
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    whole = read(str(file), llama)
    assert whole.length == 96 < LENGTH  # the model's max_position_embeddings
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in whole.batches])
    entry = whole.entry()
    assert entry.tokens == len(ids)
    assert entry.samples == -(-len(ids) // 96)
    assert read(str(file), llama, samples=3, length=17).entry().tokens == 3 * 17
    assert read(str(file), llama).sha256 == whole.sha256
    assert read(str(file), llama, samples=3).sha256 != whole.sha256


def test_every_text_gives_its_first_window_before_any_gives_a_second(
    tmp_path: Path, llama: View
) -> None:
    texts = [f"{i} {WORDS}" for i in range(5)]
    data = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in (*texts, "x", " ")))
    firsts = read(data, llama, samples=5, length=9).batches
    assert [len(b["input_ids"]) for b in firsts] == [5]
    alone = [read(jsonl(tmp_path / f"{i}.jsonl", {"text": t}), llama, samples=1, length=9)
             for i, t in enumerate(texts)]  # fmt: skip
    assert torch.equal(
        firsts[0]["input_ids"], torch.cat([c.batches[0]["input_ids"] for c in alone])
    )


def test_shorter_texts_are_padded_on_the_right_under_the_mask(tmp_path: Path, llama: View) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"text": "The fox"}, {"text": WORDS})
    (batch,) = read(data, llama, samples=2, length=11).batches
    mask = batch["attention_mask"]
    assert mask[0].all() and 2 <= int(mask[1].sum()) < 11
    assert torch.equal(mask[1], mask[1].sort(descending=True).values)


def test_joined_texts_are_cut_as_one(tmp_path: Path, llama: View, vit: View) -> None:
    """One behind the other, each with the token that begins it, no token is lost; what chooses
    windows reads their text."""
    tokenizer = read_tokenizer(Path(llama.source.folder or ""))
    texts = english_sentences(9)
    data = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    joined = read(data, llama, length=20, windows="joined")
    rows = [row for b in joined.batches for row in b["input_ids"]]
    masks = [row.bool() for b in joined.batches for row in b["attention_mask"]]
    ids = torch.cat([row[mask] for row, mask in zip(rows, masks, strict=True)])
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text).ids]
    assert {len(row) for row in rows[:-1]} == {20}
    assert (joined.entry().windows, read(data, llama).entry().windows) == ("joined", "")
    (tmp_path / "task.txt").write_text(tokenizer.decode(rows[3].tolist()))
    task = f"zip-fit={tmp_path / 'task.txt'}"
    chosen = read(data, llama, samples=1, length=20, windows="joined", select=task)
    assert torch.equal(chosen.batches[0]["input_ids"][0], rows[3])
    with pytest.raises(BadInput, match="joined is for text, and zoo:tiny-vit is none"):
        read("zoo:tiny-vit", vit, samples=2, windows="joined")


def test_joined_texts_are_not_for_models_of_whole_texts(tmp_path: Path, llama: View) -> None:
    """Of a tokenizer that sets a text between tokens of its own, windows have neither."""
    tokenizers: Any = importlib.import_module("tokenizers")
    folder = Path(llama.source.folder or "")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="a $A b", special_tokens=[("a", 1), ("b", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    view = llama.copy()
    view.source = replace(llama.source, folder=str(tmp_path))
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(BadInput, match="reads a text between tokens of its own"):
        read(str(tmp_path / "a.txt"), view, windows="joined")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "The cat\xe2\x80\xa8sat"}', "The cat\u2028sat"),
        (b'{"text": "The cat\xe2\x80\xa9sat"}', "The cat\u2029sat"),
        (b'{"text": "The cat\xc2\x85sat"}', "The cat\x85sat"),
        (b'\xef\xbb\xbf{"text": "The cat sat"}', "The cat sat"),
        (b'{"text": "The \\ud83d cat"}', "The \ufffd cat"),
        (b'{"text": "The \\ud83d\\ude00 cat"}', "The \U0001f600 cat"),
        (b'{"text": "The cat"}\r', "The cat"),
    ],
)
def test_lines_of_text_as_they_are_written(
    tmp_path: Path, llama: View, line: bytes, text: str
) -> None:
    """``json.dumps(ensure_ascii=False)`` writes line ends of Unicode as they are."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(line + b"\n" + line + b"\n")
    assert read_texts(file) == [text, text]
    assert read(str(file), llama).entry().samples == 2


def test_a_model_without_a_tokenizer_is_told_where_to_put_one(tmp_path: Path, llama: View) -> None:
    bare = llama.copy()
    bare.source = type(llama.source)(name="bare", folder=str(tmp_path))
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    with pytest.raises(Missing, match=r"text needs the model's tokenizer\.json, and there is none"):
        read(str(file), bare)
    with pytest.raises(BadInput, match="the model knows ids 0 to 699: is this another model's"):
        read("zoo:tiny-llama", bare, samples=8)


def test_a_tokenizer_that_is_none(tmp_path: Path, llama: View) -> None:
    bare = llama.copy()
    bare.source = type(llama.source)(name="bare", folder=str(tmp_path))
    (tmp_path / "a.txt").write_text(WORDS)
    words = {"type": "WordLevel", "vocab": {"The": 0}, "unk_token": "[UNK]"}
    for content, reason in (
        ("[" * 10_000, "the tokenizer fails"),
        (json.dumps({"model": words}), "the tokenizer fails: .*[UNK]"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BadInput, match=rf"tokenizer\.json: {reason}"):
            read(str(tmp_path / "a.txt"), bare)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}{{ {'a': 'é'} | tojson }}"
)
SAID = [{"role": "user", "content": "What is a fox?"}, {"role": "assistant", "content": "Quick."}]


@pytest.fixture
def chatty(tmp_path: Path, language_model: Path) -> Path:
    """A folder with a tokenizer that begins texts with a token, and a chat template."""
    transformers: Any = importlib.import_module("transformers")
    processors: Any = importlib.import_module("tokenizers.processors")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(language_model / "tokenizer.json"), bos_token="a", eos_token="b",
    )  # fmt: skip
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A", special_tokens=[("a", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


@pytest.mark.parametrize("beside", [True, False])
def test_a_chat_template_gives_what_the_library_makes_of_it(chatty: Path, beside: bool) -> None:
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(chatty)
    if not beside:  # in the tokenizer's settings, by name, as older folders have it
        (chatty / "chat_template.jinja").unlink()
        path = chatty / "tokenizer_config.json"
        named = [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    for answer in (False, True):
        expected = tokenizer.apply_chat_template(SAID, tokenize=False, add_generation_prompt=answer)
        assert chat_text(chatty, SAID, answer=answer) == expected


CALLS = """{% for m in messages %}
{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}
{{ m | tojson(indent=2, sort_keys=true, separators=(',', ' = ')) }}{% endfor %}
{{ strftime_now('%Y') }}{{ mask_token }}{{ image_token }}{{ mood }}{{ 'x' if tools }}"""
TOOLS = [{"type": "function", "function": {"name": "é<b>", "parameters": {"b": 1, "a": [2]}}}]


def test_filters_functions_and_tools_are_those_of_the_library(chatty: Path, tmp_path: Path) -> None:
    """``tojson`` with its options, what it calls, a template of its own for tools, values that are
    null, thoughts under another name, and tokens that another file names."""
    transformers: Any = importlib.import_module("transformers")
    (chatty / "chat_template.jinja").write_text(CALLS)
    (chatty / "additional_chat_templates").mkdir()
    (chatty / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | tojson }}" + CALLS)
    path = chatty / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"model_specific_special_tokens": {"image_token": "<i>"}, "mask_token": "m"}
    path.write_text(json.dumps(config))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(chatty)
    said = [SAID[0], {"role": "assistant", "content": "é", "tool_calls": None, "reasoning": "so"}]
    for tools in (None, TOOLS):
        expected = tokenizer.apply_chat_template(said, tools=tools, tokenize=False, mood="glad")
        assert chat_text(chatty, said, tools=tools, settings={"mood": "glad"}) == expected
        line = {"messages": said, "tools": tools, "chat_template_kwargs": {"mood": "glad"}}
        assert read_texts(Path(jsonl(tmp_path / "a.jsonl", line)), chatty) == [expected]
    assert "<i>" in expected and "m" in expected and "<b>" in expected
    with pytest.raises(BadInput, match="its chat template fails on these messages: who"):
        chat_text(chatty, [{"role": "nobody", "content": ""}])


def test_lines_hold_text_in_the_forms_that_people_train_on(tmp_path: Path, chatty: Path) -> None:
    """Messages by the template, less the token that the tokenizer begins a text with anyway."""
    shared = [{"from": "human", "value": SAID[0]["content"]},
              {"from": "gpt", "value": SAID[1]["content"]}]  # fmt: skip
    lines = [{"text": "A"}, {"prompt": "A", "completion": " B"}, {"messages": SAID},
             {"conversations": shared}, {"prompt": SAID[:1], "completion": SAID[1:]}]  # fmt: skip
    file = Path(jsonl(tmp_path / "a.jsonl", *lines))
    said = chat_text(chatty, SAID).removeprefix("a")
    assert read_texts(file, chatty) == ["A", "A B", said, said, said]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"instruction": "x", "output": "y"}, "it holds instruction, output, and a line takes"),
        ({"messages": [{"content": "y"}]}, "its messages are no list of objects with `role`"),
        ({"messages": "x"}, "its messages are no list of objects"),
        ({"messages": [{"role": "user", "content": 1 << 9}]}, "chat template fails on these"),
    ],
)
def test_lines_of_other_forms_are_refused(
    tmp_path: Path, chatty: Path, line: dict[str, Any], message: str
) -> None:
    (chatty / "chat_template.jinja").write_text("{{ messages[0]['content'] + 'x' }}")
    file = Path(jsonl(tmp_path / "a.jsonl", line))
    with pytest.raises(BadInput, match=message):
        read_texts(file, chatty)
    with pytest.raises(Missing, match="messages are read by a chat template, and there is none"):
        read_texts(Path(jsonl(tmp_path / "b.jsonl", {"messages": SAID})), tmp_path)

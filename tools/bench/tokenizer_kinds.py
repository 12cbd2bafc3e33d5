"""Tokenizers of the kinds that published checkpoints have, small: trained on Python's own topics.

Each is a folder's ``tokenizer.json`` and ``tokenizer_config.json``, as its family's are, with some
thousands of tokens: pieces of bytes (Qwen2, Llama 3), SentencePiece's pieces with bytes behind them
(Llama 2, Gemma), and Unigram (T5, XLM-R).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

SIZE = 3000
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 and Llama 3 cut a text, with digits one by one or in threes."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + "
    "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A tokenizer of one family."""

    make: Callable[[Kind], Any]
    model: str
    """The library's word for a decoder of the family, or of one that takes any tokenizer."""
    special: tuple[str, ...]
    first: str | None
    ends: tuple[str, ...]
    """Words that end a text: the first is the tokenizer's, all are ``generation_config``'s."""
    settings: Mapping[str, Any]
    before: tuple[str, ...] = ()
    """What is put before a text, and behind it."""
    behind: tuple[str, ...] = ()


def write(kind: Kind, folder: Path) -> dict[str, Any]:
    """Write the files; ids of the words that begin and end a text, and the count of all."""
    made = kind.make(kind)
    from tokenizers import AddedToken, processors

    made.add_special_tokens([AddedToken(word, special=True, normalized=False)
                             for word in kind.special])  # fmt: skip
    template = processors.TemplateProcessing(
        single=" ".join((*kind.before, "$A", *kind.behind)),
        special_tokens=[(word, made.token_to_id(word)) for word in (*kind.before, *kind.behind)],
    )
    if kind.before or kind.behind:
        made.post_processor = template
    made.save(str(folder / "tokenizer.json"))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(made.token_to_id(word)): {"content": word, "special": True, **flags}
             for word in kind.special}  # fmt: skip
    settings = {"bos_token": kind.first, "eos_token": kind.ends[0], **kind.settings,
                "added_tokens_decoder": added, "clean_up_tokenization_spaces": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    first = None if kind.first is None else made.token_to_id(kind.first)
    return {"bos_token_id": first, "eos_token_id": [made.token_to_id(end) for end in kind.ends],
            "vocab_size": made.get_vocab_size()}  # fmt: skip


def _bytes(digits: str, *, composed: bool = False) -> Callable[[Kind], Any]:
    def make(_: Kind) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers
        from tokenizers import pre_tokenizers as cuts
        from tokenizers.trainers import BpeTrainer

        made = Tokenizer(models.BPE())
        if composed:
            made.normalizer = normalizers.NFC()
        made.pre_tokenizer = cuts.Sequence([
            cuts.Split(Regex(WORDS % digits), "isolated"),
            cuts.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator(topics.values(), BpeTrainer(
            vocab_size=SIZE, initial_alphabet=cuts.ByteLevel.alphabet(), show_progress=False,
        ))  # fmt: skip
        return made

    return make


def _pieces(*, prepended: bool) -> Callable[[Kind], Any]:
    """SentencePiece's BPE as it is converted: spaces are ``▁``, one stands before a text of Llama
    2, and what is in no piece is bytes."""

    def make(kind: Kind) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers
        from tokenizers import pre_tokenizers as cuts
        from tokenizers.trainers import BpeTrainer

        trained = Tokenizer(models.BPE(unk_token="<unk>"))
        trained.normalizer = normalizers.Replace(" ", "▁")
        trained.pre_tokenizer = cuts.Split(Regex("▁?[^▁\n0-9]+|[0-9]|\n|▁"), "isolated")
        pieces = [f"<0x{code:02X}>" for code in range(256)]
        trained.train_from_iterator(topics.values(), BpeTrainer(
            vocab_size=SIZE, special_tokens=[*kind.special, *pieces], show_progress=False,
        ))  # fmt: skip
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        spaces = normalizers.Replace(" ", "▁")
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prepended:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            back.append(decoders.Strip(content=" ", left=1, right=0))
        else:
            made.normalizer = spaces
            made.pre_tokenizer = cuts.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence(back)
        content, model = json.loads(made.to_str()), json.loads(trained.to_str())["model"]
        content["model"] |= {name: model[name] for name in ("vocab", "merges")}
        return Tokenizer.from_str(json.dumps(content))

    return make


def _unigram(kind: Kind) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cuts
    from tokenizers.trainers import UnigramTrainer

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "),
    ])  # fmt: skip
    made.pre_tokenizer, made.decoder = cuts.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(topics.values(), UnigramTrainer(
        vocab_size=SIZE, special_tokens=[*kind.special], unk_token="<unk>", show_progress=False,
    ))  # fmt: skip
    return made


def _named(name: str, **more: Any) -> dict[str, Any]:
    return {"tokenizer_class": name, "model_max_length": 1024, **more}


def _sentence(name: str, template: str) -> dict[str, Any]:
    return _named(name, unk_token="<unk>", add_bos_token=True, add_eos_token=False, legacy=False,
                  chat_template=template)  # fmt: skip


_CHAT: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>", "<|eom_id|>")  # fmt: skip
KINDS: Mapping[str, Kind] = {
    "qwen2": Kind(
        _bytes(r"\p{N}", composed=True), "Qwen2", (*_CHAT,), None, (_CHAT[2], _CHAT[0]),
        _named("Qwen2Tokenizer", pad_token=_CHAT[0], chat_template=CHATML),
    ),
    "llama3": Kind(
        _bytes(r"\p{N}{1,3}"), "Llama", _LLAMA, _LLAMA[0], (_LLAMA[4], _LLAMA[1], _LLAMA[5]),
        _named("PreTrainedTokenizerFast", chat_template=HEADERS), before=_LLAMA[:1],
    ),
    "llama2": Kind(
        _pieces(prepended=True), "Llama", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "<s>",
        ("</s>",), _sentence("LlamaTokenizer", INSTRUCTIONS), before=("<s>",),
    ),
    "gemma": Kind(
        _pieces(prepended=False), "Gemma",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<bos>",
        ("<eos>", "<end_of_turn>"), _sentence("GemmaTokenizer", TURNS), before=("<bos>",),
    ),
    "t5": Kind(
        _unigram, "Llama", ("<pad>", "</s>", "<unk>"), None, ("</s>",),
        _named("T5Tokenizer", pad_token="<pad>", unk_token="<unk>"), behind=("</s>",),
    ),
    "xlm-r": Kind(
        _unigram, "Llama", ("<s>", "<pad>", "</s>", "<unk>"), "<s>", ("</s>",),
        _named("XLMRobertaTokenizer", pad_token="<pad>", unk_token="<unk>"),
        before=("<s>",), behind=("</s>",),
    ),
}  # fmt: skip

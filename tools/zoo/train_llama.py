"""Train ``zoo:tiny-llama``: ``python -m graphwright.tools.zoo.train_llama OUT [--seed 0]``.

A Llama of 10 layers and 4.7 M parameters on English documentation (``corpus.py``), with a part of
synthetic lists that teach it to look back: to recall the value of a key and to copy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import corpus, ngram
from .training import Schedule, train, write_record

VOCABULARY = 4096
PAD, BOS, EOS = 0, 1, 2
BATCH_TOKENS = 4096
LENGTH, LONG = 256, 512
LONG_SHARE = 0.15
"""Share of the steps, the last ones, with sequences of ``LONG`` tokens instead of ``LENGTH``."""
RECALL_SHARE = 0.12
"""Share of the sequences that are synthetic lists."""
SCHEDULE = Schedule(steps=2200, lr=5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--cache", type=Path, default=None, help="folder for Debian's packages")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    run(options.out, options.seed, options.steps, options.cache, resume=options.resume)


def run(out: Path, seed: int, steps: int, cache: Path | None, *, resume: bool) -> None:
    """Fetch, split, tokenize, train, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    pages = corpus.documents(cache or out / "packages")
    texts = corpus.split_documents(pages)
    tokenizer = make_tokenizer(texts["train"])
    tokens = {split: encode(tokenizer, texts[split]) for split in corpus.SPLITS}
    model = make_model(seed)
    model.set_attn_implementation("eager")  # 1.03 s a step where sdpa takes 1.29 in bf16
    draw = Batches(tokens["train"], tokenizer, seed)
    schedule = Schedule(steps=steps, lr=SCHEDULE.lr)
    compiled = _compiled(model)

    def loss(step: int) -> torch.Tensor:
        long = step >= (1 - LONG_SHARE) * steps
        value: torch.Tensor = compiled(draw(step, LONG if long else LENGTH))
        return value

    curve = train(
        model, loss, schedule, out, title="tiny-llama", resume=resume,
        evaluate=lambda: {"validation_loss": mean_loss(model, tokens["validation"][:65536])},
    )  # fmt: skip
    model.set_attn_implementation("sdpa")
    figures = measure(model, tokens, texts)
    write_model(model, tokenizer, out)
    for split in ("calibration", "test"):
        write_texts(texts[split], out / f"{split}.jsonl.gz")
    write_record(out, seed=seed, schedules={"language": schedule}, curves={"language": curve},
                 figures=figures)  # fmt: skip
    print(json.dumps(figures, indent=1))


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE of ``VOCABULARY`` entries; ``<s>`` goes before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """All texts one after another, ``[n]`` i64; each begins with ``<s>``."""
    ids = [i for encoded in tokenizer.encode_batch(list(texts)) for i in encoded.ids]
    return torch.tensor(ids)


def make_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=10,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LONG,
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Batches:
    """The batch of a step, by the step's number: ``[BATCH_TOKENS / length, length + 1]`` i64."""

    def __init__(self, tokens: torch.Tensor, tokenizer: Any, seed: int) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.seed = seed
        words = (w.removeprefix("Ġ") for w in tokenizer.get_vocab() if w.startswith("Ġ"))
        self.words = sorted(w for w in words if re.fullmatch("[a-z]{3,}", w))

    def __call__(self, step: int, length: int) -> torch.Tensor:
        rng = random.Random(f"{self.seed}/{step}")
        rows = []
        for _ in range(BATCH_TOKENS // length):
            if rng.random() < RECALL_SHARE:
                rows.append(self._lists(rng, length))
                continue
            start = rng.randrange(len(self.tokens) - length - 1)
            rows.append(self.tokens[start : start + length + 1])
        return torch.stack(rows)

    def _lists(self, rng: random.Random, length: int) -> torch.Tensor:
        ids: list[int] = []
        while len(ids) < length + 1:
            text = self._pairs(rng) if rng.random() < 0.6 else self._copies(rng)
            ids += self.tokenizer.encode(text).ids
        return torch.tensor(ids[: length + 1])

    def _pairs(self, rng: random.Random) -> str:
        """Keys with values, then some of the keys again, each with its value."""
        between = rng.choice((": ", " = ", " is ", " -> "))
        end = rng.choice(("\n", "; ", ". ", ", "))
        keys = rng.sample(self.words, rng.randint(2, 16))
        values = {k: self._value(rng) for k in keys}
        again = [rng.choice(keys) for _ in range(rng.randint(2, 12))]
        return "".join(f"{key}{between}{values[key]}{end}" for key in (*keys, *again))

    def _value(self, rng: random.Random) -> str:
        if rng.random() < 0.3:
            return str(rng.randint(10, 9999))
        return " ".join(rng.choice(self.words) for _ in range(rng.randint(1, 3)))

    def _copies(self, rng: random.Random) -> str:
        """A run of words, said again."""
        if rng.random() < 0.5:
            start = rng.randrange(len(self.tokens) - 64)
            run = self.tokenizer.decode(self.tokens[start : start + rng.randint(8, 48)].tolist())
        else:
            run = " ".join(rng.choice(self.words) for _ in range(rng.randint(4, 32)))
        return rng.choice(("\n", " ", "\n\n")).join([run] * rng.randint(2, 3))


def _compiled(model: Any) -> Any:
    """The loss of a batch; by ``torch.compile`` where there is a C++ compiler: 10 % faster."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY).float(), batch[:, 1:].reshape(-1)
        )

    return torch.compile(loss, dynamic=False) if shutil.which("g++") else loss


# --- figures and files --------------------------------------------------------------------------


def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats a token, over windows of ``LENGTH`` without overlap."""
    windows = tokens[: (len(tokens) - 1) // LENGTH * LENGTH].view(-1, LENGTH)
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), 16):
            batch = windows[start : start + 16]
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.double()
            losses = torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1), reduction="sum"
            )
            total, count = total + float(losses), count + batch[:, 1:].numel()
    return total / count


def measure(
    model: Any,
    tokens: Mapping[corpus.Split, torch.Tensor],
    texts: Mapping[corpus.Split, Sequence[str]],
) -> dict[str, float]:
    """Perplexities on the test text, of this model in bf16 and of models that only count."""
    rounded = model.to(torch.bfloat16).float()
    loss = mean_loss(rounded, tokens["test"])
    train_ids, test_ids = tokens["train"].numpy(), tokens["test"].numpy()
    characters = sum(map(len, texts["test"]))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train_ids),
        "test_tokens": len(test_ids),
        "test_loss": round(loss, 4),
        "test_perplexity": round(float(np.exp(loss)), 3),
        "test_bits_per_character": round(loss / np.log(2) * len(test_ids) / characters, 4),
        "unigram_perplexity": round(ngram.unigram_perplexity(train_ids, test_ids, VOCABULARY), 2),
        "trigram_perplexity": round(ngram.trigram_perplexity(train_ids, test_ids, VOCABULARY), 2),
    }


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
               "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": LONG}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n")


def write_texts(texts: Sequence[str], path: Path) -> None:
    """One JSON object a line; no time in the header, so that the same texts give the same file."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    main()

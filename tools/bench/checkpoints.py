"""``python -m graphwright.tools.bench.checkpoints NAME DIR``: random checkpoints of known shapes.

What a run costs depends on shapes and dtypes, not on what a model has learned. A folder holds
``config.json``, safetensors in shards and a tokenizer whose words are bytes, without which other
tools refuse it; ``transformers`` and ``optimize-model`` read it as any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...ir.core.errors import BadInput, GraphwrightError

POOL = 2**24 - 3
"""Numbers drawn once, of which every tensor is windows. It is a prime: rows of a tensor that is
longer start at different places in it, whatever their width, so that no two are equal."""
SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Shape:
    """A decoder by its sizes, named as ``config.json`` names them."""

    model_type: str
    """``llama``, or ``qwen2``: biases on q, k and v."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype
    tied: bool = False
    """Whether the head is the embedding: the checkpoint then holds no head."""

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        prefix = {"llama": "Llama", "qwen2": "Qwen2"}[self.model_type]
        return {
            "architectures": [f"{prefix}ForCausalLM"], "model_type": self.model_type,
            "num_hidden_layers": self.layers, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied, "torch_dtype": str(self.dtype).split(".")[-1],
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor of the checkpoint by name, in the order in which the model uses them."""
        width, inner = self.hidden, self.intermediate
        keys = self.kv_heads * (width // self.heads)
        yield "model.embed_tokens.weight", (self.vocab, width)
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            for name, out in (("q", width), ("k", keys), ("v", keys)):
                yield f"{block}.self_attn.{name}_proj.weight", (out, width)
                if self.model_type == "qwen2":
                    yield f"{block}.self_attn.{name}_proj.bias", (out,)
            yield f"{block}.self_attn.o_proj.weight", (width, width)
            yield f"{block}.mlp.gate_proj.weight", (inner, width)
            yield f"{block}.mlp.up_proj.weight", (inner, width)
            yield f"{block}.mlp.down_proj.weight", (width, inner)
            yield f"{block}.input_layernorm.weight", (width,)
            yield f"{block}.post_attention_layernorm.weight", (width,)
        yield "model.norm.weight", (width,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, width)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    @property
    def nbytes(self) -> int:
        return self.parameters * self.dtype.itemsize


SHAPES = {
    "l01": Shape("llama", 12, 768, 2048, 12, 12, 25600, torch.float32),
    "q01": Shape("qwen2", 12, 512, 2816, 8, 2, 65536, torch.bfloat16, tied=True),
    "q05": Shape("qwen2", 24, 896, 4864, 14, 2, 151936, torch.bfloat16, tied=True),
    "q15": Shape("qwen2", 28, 1536, 8960, 12, 2, 151936, torch.bfloat16, tied=True),
    "l7": Shape("llama", 32, 4096, 11008, 32, 32, 32000, torch.bfloat16),
}
"""Sizes of 0.12, 0.09, 0.49, 1.54 and 6.74 billion parameters; ``q05`` and ``q15`` are those of
Qwen2-0.5B and Qwen2-1.5B, ``l7`` those of Llama-2-7B."""


class Draw:
    """Random tensors that cost a copy: windows of one pool of normal numbers, scaled.

    No two tensors hold the same numbers, since each has a start and a scale of its own, and no two
    rows of one. The same seed and order of calls give the same bytes.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(POOL, generator=self._generator).to(dtype)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A norm's weights lie about 1; a matrix keeps the size of what runs through it."""
        start, scale = torch.rand(2, generator=self._generator).tolist()
        drawn = self._window(int(start * len(self._pool)), prod(shape)).reshape(shape)
        drawn *= (0.75 + scale / 2) * shape[-1] ** -0.5
        return drawn.add_(1) if name.endswith("norm.weight") else drawn

    def _window(self, start: int, count: int) -> torch.Tensor:
        window = torch.empty(count, dtype=self._pool.dtype)
        written = 0
        while written < count:
            piece = self._pool[start : start + count - written]
            window[written : written + len(piece)] = piece
            written, start = written + len(piece), 0
        return window


def write(shape: Shape, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
    """Make the checkpoint; in memory lies a shard at a time, and the pool.

    A shard holds at most ``shard_bytes``, or one tensor. Raises ``BadInput`` where the folder holds
    something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds something already; name a folder that does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    _write_tokenizer(folder)
    shards, draw = _shards(shape, shard_bytes), Draw(shape.dtype, seed)
    files: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: draw.tensor(name, size) for name, size in shard}, folder / file,
            metadata={"format": "pt"},
        )  # fmt: skip
        files |= {name: file for name, _ in shard}
    listing = {"metadata": {"total_size": shape.nbytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1))


def _shards(shape: Shape, most: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    taken = 0
    for name, size in shape.tensors():
        nbytes = prod(size) * shape.dtype.itemsize
        if shards[-1] and taken + nbytes > most:
            shards.append([])
            taken = 0
        shards[-1].append((name, size))
        taken += nbytes
    return shards


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ("<pad>", "<s>", "</s>")
    words = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("t", "h")]))  # llama.cpp asks for one
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>",
        "eos_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(prog="checkpoints", description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.name]
    try:
        write(shape, options.folder, seed=options.seed, shard_bytes=options.shard_bytes)
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(
        f"{options.folder}: {shape.parameters / 1e9:.3f}B parameters, {shape.nbytes:,} bytes\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What our kernels and artifacts make of whole models on a GPU. See ``gpu``.

Weights are random: only times are looked at. Of a 7B language model a few layers stand for all,
since each takes the same; what is not a layer (the head) is timed apart.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from ...ir.core.errors import BoundExceeded
from ...ir.run.verify import difference
from .gpu_kernels import Drawn, milliseconds
from .gpu_setting import Row, Setting

IMAGE_TOKENS = (2880, 720, 290, 145)
"""Of five crops of 576 each, and what 25, 10 and 5 % leave of them."""
TEXT = 64
APART = 2e-2
"""Relative L2 of logits that two providers may differ by in half floats."""
Product = Callable[[torch.Tensor], torch.Tensor]


class _Shape:
    """Of a 7B language model and its tower; of a dry run, of next to nothing."""

    def __init__(self, dry: bool) -> None:
        self.width, self.hidden, self.heads = (16, 16, 2) if dry else (4096, 11008, 32)
        self.layers, self.timed = (2, 1) if dry else (32, 4)
        self.words = 8 if dry else 32000
        self.past = 8 if dry else 1024
        self.crops, self.patches = (5, 4) if dry else (5, 576)
        self.tower_heads, self.tower_width = (2, 8) if dry else (16, 64)


class _Layer:
    """A Llama block whose linears are given as functions."""

    def __init__(self, shape: _Shape, make: Drawn, linears: Callable[[int, int], Product]) -> None:
        w, h = shape.width, shape.hidden
        self._q, self._k, self._v, self._o = (linears(w, w) for _ in range(4))
        self._gate, self._up, self._down = linears(w, h), linears(w, h), linears(h, w)
        self._norm, self._shape = make.floats(w), shape

    def __call__(self, x: torch.Tensor, cache: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        y = rms_norm(x, (self._shape.width,), self._norm)
        q, k, v = (self._heads(part(y)) for part in (self._q, self._k, self._v))
        if cache is not None:
            # As a runtime does that shares the buffer: the token's own go into its last place.
            cache[0][:, :, -1:], cache[1][:, :, -1:] = k, v
            k, v = cache
        attention = scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self._o(attention.transpose(1, 2).flatten(2))
        y = rms_norm(x, (self._shape.width,), self._norm)
        return x + self._down(silu(self._gate(y)) * self._up(y))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], self._shape.heads, -1).transpose(1, 2)


def _dense(make: Drawn) -> Callable[[int, int], Product]:
    def product(columns: int, outputs: int) -> Product:
        weight = make.floats(outputs, columns) * 0.02
        return lambda x: linear(x, weight)

    return product


def _four_bits(make: Drawn) -> Callable[[int, int], Product]:
    def product(columns: int, outputs: int) -> Product:
        return make.nbit_linear(columns, outputs, 4)

    return product


# --- decode --------------------------------------------------------------------------------------


def decode(setting: Setting) -> list[Row]:
    """A step of a 7B model behind 1,024 tokens, replayed from a CUDA graph, in ms and tokens/s."""
    shape, rows = _Shape(setting.dry), []
    for name, kind in (("cuBLAS bf16", _dense), ("linear_nbit 4 bits", _four_bits)):
        make = Drawn(setting)
        layers = [_Layer(shape, make, kind(make)) for _ in range(shape.timed)]
        width = shape.width // shape.heads
        caches = [
            tuple(make.floats(1, shape.heads, shape.past, width) for _ in range(2)) for _ in layers
        ]
        x, head = make.floats(1, 1, shape.width), kind(make)(shape.width, shape.words)

        def step(layers: Any = layers, caches: Any = caches, x: torch.Tensor = x) -> torch.Tensor:
            for layer, cache in zip(layers, caches, strict=True):
                x = layer(x, cache)
            return x

        def last(head: Product = head, x: torch.Tensor = x) -> torch.Tensor:
            return head(x)

        ms = milliseconds(step, setting) / shape.timed * shape.layers
        ms += milliseconds(last, setting)
        rows.append({"linears": name, "ms a token": ms, "tokens/s": 1000 / ms})
    return rows


# --- prefill -------------------------------------------------------------------------------------


def prefill(setting: Setting) -> list[Row]:
    """The language model's prefill with what FasterVLM and GlobalCom² keep of five crops' tokens.

    FasterVLM ranks all tokens by what their crop's CLS pays to them; GlobalCom² first shares the
    budget out by what the overview pays to the crops. Both scores are of ``token_scores``. The
    ratio is to the prefill with all tokens, which scores nothing; ``by tokens`` is what counts
    predict.
    """
    shape, make = _Shape(setting.dry), Drawn(setting)
    layers = [_Layer(shape, make, _dense(make)) for _ in range(shape.timed)]
    every = shape.crops * shape.patches
    counts = [max(shape.crops, round(every * n / IMAGE_TOKENS[0])) for n in IMAGE_TOKENS]
    text = 4 if setting.dry else TEXT
    rows: list[Row] = []
    for count in counts:
        ms = _language(setting, shape, layers, make, count + text)
        if not rows:
            rows.append({"method": "all tokens", "image tokens": count, "ms": ms, "ratio": 1.0})
            continue
        for method, select in (("fastervlm", _by_rank), ("globalcom2", _by_crop)):
            whole = ms + milliseconds(select(setting, shape, make, count), setting)
            rows.append({
                "method": method, "image tokens": count, "ms": whole,
                "ratio": whole / rows[0]["ms"], "by tokens": (count + text) / (every + text),
            })  # fmt: skip
    return rows


def _language(
    setting: Setting, shape: _Shape, layers: list[_Layer], make: Drawn, tokens: int
) -> float:
    x = make.floats(1, tokens, shape.width)

    def run() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y, None)
        return y

    return milliseconds(run, setting, repeats=5) / shape.timed * shape.layers


def _scores(shape: _Shape, make: Drawn) -> Callable[[], torch.Tensor]:
    """[crops, patches]: what each crop's CLS pays to its patches."""
    from ...kernels.token_scores import token_scores

    q = make.floats(shape.crops, shape.tower_heads, 1, shape.tower_width)
    k = make.floats(shape.crops, shape.tower_heads, shape.patches + 1, shape.tower_width)
    return lambda: token_scores(q, k, scale=shape.tower_width**-0.5)[:, 1:]


def _by_rank(setting: Setting, shape: _Shape, make: Drawn, count: int) -> Callable[[], Any]:
    from ...kernels.token_select import token_select

    scores, x = _scores(shape, make), make.floats(1, shape.crops * shape.patches, shape.width)

    def select() -> torch.Tensor:
        best = scores().reshape(1, -1).topk(count, dim=1).indices
        return token_select(x, best.sort(dim=1).values)

    return select


def _by_crop(setting: Setting, shape: _Shape, make: Drawn, count: int) -> Callable[[], Any]:
    from ...kernels.token_select import token_select

    scores, x = _scores(shape, make), make.floats(1, shape.crops * shape.patches, shape.width)

    def select() -> torch.Tensor:
        by_crop = scores().float()
        # The overview's patches lie over the crops in as many parts as there are crops beside it.
        mass = by_crop[0, : (shape.crops - 1) * (shape.patches // (shape.crops - 1))]
        share = torch.softmax(mass.reshape(shape.crops - 1, -1).sum(1), 0)
        weighted = torch.cat([by_crop[:1], by_crop[1:] * share[:, None] * (shape.crops - 1)])
        best = weighted.reshape(1, -1).topk(count, dim=1).indices
        return token_select(x, best.sort(dim=1).values)

    return select


# --- ONNX Runtime --------------------------------------------------------------------------------


def runtime(setting: Setting) -> list[Row]:
    """An artifact of ``--target cuda`` in ONNX Runtime, on the device and on the CPU.

    A Llama of two layers, 7B's in width, random, 4 bits in groups of 32, in fp16. Raises
    ``BoundExceeded`` where the two are further apart than two runs in half floats are; how many
    tokens they write alike is only told, since with random weights many are about as likely.
    """
    from ...backends.generation.decode import Decoder
    from ...backends.runtimes.onnxruntime import OnnxRuntimeExecutable

    prompt, new = (list(range(1, 6)), 3) if setting.dry else (list(range(1, 513)), 32)
    rows: list[Row] = []
    written: dict[str, list[int | None]] = {}
    logits: dict[str, torch.Tensor] = {}
    ids = torch.tensor([prompt])
    with tempfile.TemporaryDirectory() as place:
        folder = _artifact(setting, Path(place))
        for device in dict.fromkeys(("cpu", setting.device.type)):
            run = OnnxRuntimeExecutable(
                folder / "model.onnx", device=device, optimize=True, threads=None
            )
            prompt_logits = run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
            logits[device] = prompt_logits[:, -1].float().cpu()
            list(Decoder(run).decode([prompt], max_new_tokens=2))  # what the first call prepares
            steps = Decoder(run).decode([prompt], max_new_tokens=new)
            begun = time.perf_counter()
            text = [next(steps)[0]]
            first = time.perf_counter() - begun
            text += [token for (token,) in steps]
            rest = time.perf_counter() - begun - first
            written[device] = text
            gap = difference(logits["cpu"], logits[device]).rel_l2
            if gap > APART:
                raise BoundExceeded(f"{device}: logits are {gap:.3g} from the CPU's, over {APART}")
            rows.append({
                "provider": device, "prompt ms": 1000 * first, "tokens/s": (new - 1) / rest,
                "to the CPU": gap, "tokens alike": _alike(written["cpu"], text),
                "artifact bytes": sum(f.stat().st_size for f in folder.glob("model.onnx*")),
            })  # fmt: skip
    return rows


def _alike(one: list[int | None], other: list[int | None]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(one))


def _artifact(setting: Setting, place: Path) -> Path:
    import transformers

    from ... import export, load, optimize

    shape = _Shape(setting.dry)
    sizes = (32, 48, 2, 1) if setting.dry else (shape.width, shape.hidden, shape.heads, 8)
    width, hidden, heads, shared = sizes
    config = transformers.LlamaConfig(
        vocab_size=96 if setting.dry else shape.words, hidden_size=width,
        intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=1024, dtype=torch.float16,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model.half().save_pretrained(place / "source")
    result = optimize(load(place / "source"), "quantize{bits=4 group=32}", target="cuda")
    return export(result.graph, place / "out", report=result.report, target="cuda")

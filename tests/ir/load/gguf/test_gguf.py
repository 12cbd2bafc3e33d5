"""GGUF files: blocks as the library decodes them, models as transformers computes them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.gguf.blocks import KINDS, parts
from graphwright.ir.load.gguf.file import KINDS as TYPES
from graphwright.ir.load.gguf.file import WHOLE, read_gguf
from graphwright.ir.structure.recognize import recognize

gguf: Any = pytest.importorskip("gguf")
Q = gguf.GGMLQuantizationType
SIZES = {name: (block, size) for name, block, size in TYPES.values()}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
          "Q5_K": (0, 2), "Q6_K": (208,)}  # fmt: skip
"""Where a block's float16 numbers lie, if it is not its first bytes."""


def drawn(kind: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Random blocks with finite scales; of the first rows some scales are 0."""
    block, size = SIZES[kind]
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (rows * columns // block, size)).astype(np.uint8)
    for place in HALVES.get(kind, (0,)):
        halves = (rng.random((len(raw), 1)) * 0.02 - 0.01).astype(np.float16)
        raw[:, place : place + 2] = halves.view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(100, 140, len(raw))
    if kind == "Q2_K":
        raw[:2, :16] &= 0xF0
    if kind in ("Q4_1", "Q5_1"):
        raw[:2, :2] = 0
    return raw.reshape(rows, -1)


def test_sizes_of_blocks_are_the_librarys() -> None:
    assert {n: gguf.GGML_QUANT_SIZES[Q[n]] for n in SIZES} == SIZES


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: str) -> None:
    """With a minimum there is rounding in float32; groups of scale 0 are the constants they are."""
    raw = drawn(kind, 6, 512)
    expected = gguf.quants.dequantize(raw, Q[kind])
    data = MemoryWeight(torch.from_numpy(raw))
    weight = parts("x", KINDS[kind], (6, 512), data, SIZES[kind][0]).weight()
    bound = 0 if KINDS[kind].lows is None else 1e-7 * np.abs(expected).max()
    assert np.abs(weight.read().numpy() - expected).max() <= bound
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    turned = parts("x", KINDS[kind], (6, 512), data, SIZES[kind][0], order).weight()
    assert torch.equal(turned.read(), weight.read()[order])


# --- models --------------------------------------------------------------------------------------

SIZED = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
ROUTED = ("mixtral", "qwen2moe", "qwen3moe")
UNTIED = ("llama", *ROUTED)
LINEARS = {"mixtral": 4 + 1 + 9 + 1, "qwen2moe": 4 + 1 + 9 + 1 + 3 + 1, "qwen3moe": 4 + 1 + 9 + 1}
"""Of attention, routers, experts, the expert that all share with its gate, and the head."""
MIXED = {"q_proj": "Q4_0", "k_proj": "Q8_0", "v_proj": "Q4_1", "o_proj": "Q5_0",
         "gate_proj": "Q5_1", "up_proj": "F16", "down_proj": "Q8_0", "lm_head": "Q8_0"}  # fmt: skip
"""Types of a file's linears; the rest is F32, and a tied table too."""


def model_of(arch: str) -> Any:
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma",
             "gemma2": "Gemma2", "mixtral": "Mixtral", "qwen2moe": "Qwen2Moe",
             "qwen3moe": "Qwen3Moe"}  # fmt: skip
    more: dict[str, Any] = {"head_dim": 32} if arch in ("gemma", "qwen3", "qwen3moe") else {}
    if arch in ROUTED:
        more |= {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
                 "norm_topk_prob": arch == "qwen3moe"}  # fmt: skip
    if arch == "gemma2":
        more = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}
    config = getattr(transformers, f"{names[arch]}Config")(
        **SIZED, **more, tie_word_embeddings=arch not in UNTIED, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[arch]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")) or ".experts." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def placed(names: Any, name: str, parameter: torch.Tensor) -> list[tuple[str, str, torch.Tensor]]:
    """Parameters as linears have them, and their tensors: gate and up of experts lie apart."""
    stack = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts)\.(gate_up|down)_proj", name)
    if stack is None:
        return [(name, names.get_name(name, try_suffixes=(".weight", ".bias")), parameter)]
    parts = stack[3].split("_")
    return [
        (f"{stack[1]}.{part}_proj.weight", f"blk.{stack[2]}.ffn_{part}_exps.weight", half)
        for part, half in zip(parts, parameter.chunk(len(parts), 1), strict=True)
    ]


def written(model: Any, arch: str, path: Path, **keys: Any) -> Path:
    """The model as a file, by the library's writer and names; the model then has its numbers."""
    config = model.config
    routed, arch = arch, "llama" if arch == "mixtral" else arch
    writer = gguf.GGUFWriter(path, arch)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(keys.get("blocks", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if routed in ROUTED:
        writer.add_expert_count(3)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in ROUTED:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    done = set()
    state = model.state_dict().items()
    for name, target, parameter in (each for pair in state for each in placed(names, *pair)):
        if parameter.data_ptr() in done:
            continue
        done.add(parameter.data_ptr())
        part = name.split(".")[-2]
        kind = MIXED.get(part, "F32") if parameter.dim() > 1 else "F32"
        plain = parameter.contiguous().numpy()
        packed = plain if kind == "F32" else gguf.quants.quantize(plain, Q[kind])
        back = plain if kind == "F32" else gguf.quants.dequantize(packed, Q[kind])
        if arch == "llama" and part in ("q_proj", "k_proj"):
            n = heads if part == "q_proj" else groups
            packed = packed.reshape(n, 2, head // 2, -1).swapaxes(1, 2).reshape(packed.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            packed = packed + 1
        parameter.copy_(torch.from_numpy(back.astype(np.float32)))
        writer.add_tensor(target, packed, raw_dtype=None if kind in WHOLE else Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma", "gemma2", *ROUTED])
def test_models(arch: str, tmp_path: Path) -> None:
    """transformers' own model with the file's numbers, and the graph in ONNX Runtime."""
    model = model_of(arch)
    path = written(model, arch, tmp_path / "m.gguf")
    view = gw.load(path, cache=False)
    assert view.source.kind == "gguf" and view.source.files == (path,)
    assert any("no tokenizer: it holds no tokenizer" in note for note in view.source.notes)
    canonicalize(view)
    linears = recognize(view).linears
    quantized = {linear.name.rpartition(".")[2]: linear.quantized for linear in linears}
    expected_in = {part: kind not in WHOLE for part, kind in MIXED.items()}
    expected_in["lm_head"] = arch in UNTIED
    assert {part: quantized[part] for part in MIXED} == expected_in
    assert len(linears) == LINEARS.get(arch, 8)
    ids = torch.arange(1, 25).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**inputs).logits
    logits = gw.compile(view)(**inputs)["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return written(model_of("llama"), "llama", path).read_bytes()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return written(model_of("mixtral"), "mixtral", path).read_bytes()


def _renamed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new)


def _number(key: str, value: int) -> Callable[[bytes], bytes]:
    """Another u32 behind a key."""

    def change(data: bytes) -> bytes:
        at = data.index(key.encode()) + len(key) + 4
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]

    return change


def _typed(name: str, kind: int, dims: int = 2) -> Callable[[bytes], bytes]:
    """Another type of a tensor."""

    def change(data: bytes) -> bytes:
        at = data.index(name.encode()) + len(name) + 4 + 8 * dims
        return data[:at] + struct.pack("<I", kind) + data[at + 4 :]

    return change


def _real(key: str, value: float) -> Callable[[bytes], bytes]:
    """Another f32 behind a key."""

    def change(data: bytes) -> bytes:
        at = data.index(key.encode()) + len(key) + 4
        return data[:at] + struct.pack("<f", value) + data[at + 4 :]

    return change


def _placed(name: str, offset: int, dims: int = 2) -> Callable[[bytes], bytes]:
    """Another place of a tensor."""

    def change(data: bytes) -> bytes:
        at = data.index(name.encode()) + len(name) + 8 + 8 * dims
        return data[:at] + struct.pack("<Q", offset) + data[at + 8 :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_real("llama.attention.layer_norm_rms_epsilon", -1),
         "layer_norm_rms_epsilon is -1.0, not a number above 0"),
        (_real("llama.rope.freq_base", 0), "llama.rope.freq_base is 0.0, not a number above 0"),
        (_placed("blk.0.attn_q.weight", 3), "'blk.0.attn_q.weight' is at byte 3 of the data"),
        (_placed("blk.0.attn_q.weight", 32), "is at byte .* of the data: a multiple of 32 from"),
        (_typed("blk.0.attn_norm.weight", 8, 1),
         r"'blk.0.attn_norm.weight' is \[64\] of Q8_0: matrices alone are read in blocks"),
        (lambda data: data[:-1500], r"truncated: the tensor '.*' ends at byte"),
        (lambda data: data[:300], "truncated in the key"),
        (lambda data: data[:900], "truncated in .*tensor "),
        (lambda data: b"GGML" + data[4:], "not a GGUF file"),
        (lambda data: data[:4] + b"\0\0\0\3" + data[8:], "a big-endian one is not read"),
        (_renamed(b"llama", b"mamba"), "architecture 'mamba'; llama, qwen2"),
        (_number("llama.attention.head_count_kv", 4),
         r"'blk.0.attn_k.weight' is \[32, 64\]; by the keys of arch llama it is \[64, 64\]"),
        (_number("llama.feed_forward_length", 64),
         r"'blk.0.ffn_gate.weight' is \[96, 64\]; by the keys of arch llama it is \[64, 64\]"),
        (_number("llama.block_count", 2),
         "no tensor 'blk.1.attn_norm.weight', and llama.block_count is 2"),
        (_number("llama.context_length", 0xFFFFFFFF),
         "llama.context_length is 4294967295; at most 16777216 are read"),
        (_number("llama.embedding_length", 0), "llama.embedding_length is 0, not a number above"),
        (_renamed(b"llama.context_length", b"llama.context_lengtj"),
         "no key llama.context_length"),
        (_renamed(b"blk.0.attn_q.w", b"blk.0.attn_z.w"),
         "'blk.0.attn_z.weight' has no place in arch llama"),
        (_renamed(b"blk.0.attn_q.w", b"blk.0.attn_k.w"), "'blk.0.attn_k.weight' is there twice"),
        (_typed("blk.0.attn_q.weight", 77), "'blk.0.attn_q.weight' is of ggml's type 77"),
        (_typed("blk.0.attn_q.weight", 12), "rows of Q4_K are multiples of 256"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_contradicts_itself(
    change: Callable[[bytes], bytes], message: str, llama: bytes, tmp_path: Path
) -> None:
    refused(change(llama), message, tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_number("llama.expert_count", 4),
         r"'blk.0.ffn_gate_inp.weight' is \[3, 64\]; by the keys of arch llama it is \[4, 64\]"),
        (_number("llama.expert_used_count", 4), "llama.expert_used_count is 4; at most 3 are read"),
        (_number("llama.feed_forward_length", 64),
         r"'blk.0.ffn_gate_exps.weight' is \[3, 96, 64\]; by the keys .* it is \[3, 64, 64\]"),
        (_renamed(b"llama.expert_count", b"llama.expert_counu"),
         "'blk.0.ffn_gate_inp.weight' has no place in arch llama"),
        (_renamed(b"llama", b"gemma"),
         "gemma.expert_count is 3: experts of llama, qwen2moe, qwen3moe, gpt-oss are read"),
    ],
)  # fmt: skip
def test_experts_that_contradict_themselves(
    change: Callable[[bytes], bytes], message: str, mixtral: bytes, tmp_path: Path
) -> None:
    refused(change(mixtral), message, tmp_path / "bad.gguf")


def refused(data: bytes, message: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(BadInput, match=message) as error:
        gw.load(path)
    assert str(path) in str(error.value) and "graphwright-scratch" not in str(error.value)


def test_no_byte_of_a_header_breaks_the_reader(llama: bytes, tmp_path: Path) -> None:
    """Read, or refused: nothing else, and no memory for what a damaged count promises."""
    rng = np.random.default_rng(0)
    end = llama.index(b"output_norm")
    path = tmp_path / "bad.gguf"
    for place in rng.integers(4, end, 150):
        path.write_bytes(llama[:place] + bytes([rng.integers(256)]) + llama[place + 1 :])
        try:
            read_gguf(path)
        except BadInput as error:
            assert re.match(rf"{re.escape(str(path))}: ", str(error))
    with pytest.raises(Missing, match="no such file"):
        gw.load(tmp_path / "absent.gguf")

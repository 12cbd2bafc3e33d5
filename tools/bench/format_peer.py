"""Logits of a folder in another tool's own library, for ``formats.py``: run by its path.

``format_peer.py FOLDER OUT.npy [ADAPTER]``: transformers with compressed-tensors or gptqmodel as
the folder's config asks, in float32 where the library can do that; with ``ADAPTER`` by PEFT on
top. ``model.gguf`` is read by transformers, and run by llama.cpp (xllamacpp), whose
log-probabilities behind the last id are written to ``OUT.llama.npy``, and to ``OUT.whole.npy``
those of the same numbers in float32, for which it rounds nothing. The ids are 1 to 24.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

COUNT = 24


def main(folder: str, out: str, adapter: str = "") -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    if (Path(folder) / "model.gguf").is_file():
        stem, path = out.removesuffix(".npy"), str(Path(folder) / "model.gguf")
        np.save(f"{stem}.llama.npy", llama(path))
        transcode = runpy.run_path(str(Path(__file__).with_name("gguf_types.py")))["transcode"]
        transcode(path, f"{stem}.whole.gguf", "F32")
        np.save(f"{stem}.whole.npy", llama(f"{stem}.whole.gguf"))
        if experts(path):
            return None  # transformers 5.24 is .74 off on those of arch llama, and fails on others
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf",
                                                         dtype=torch.float32)  # fmt: skip
        except ValueError:
            return None  # some of what llama.cpp runs is not read by this release of transformers
        return save(model, out)
    method = getattr(AutoConfig.from_pretrained(folder), "quantization_config", {})
    if method.get("quant_method") == "gptq":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu")
        return save(model.model, out)
    options = {}
    if method.get("quant_method") == "compressed-tensors":
        # Dequantized as it is loaded, a code times its scale is rounded to the scale's float16:
        # 2e-4 of a weight. What it decompresses by itself is in the float32 asked for.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if adapter:
        from peft import PeftModel

        model(input_ids=torch.ones(1, 1, dtype=torch.int64))  # decompresses what PEFT goes beside
        model = PeftModel.from_pretrained(model, adapter)
    return save(model, out)


def experts(path: str) -> bool:
    """Whether a GGUF file has layers of experts."""
    import gguf

    return any(key.endswith(".expert_count") for key in gguf.GGUFReader(path).fields)


def save(model: Any, out: str) -> None:
    ids = torch.arange(1, COUNT + 1)[None]
    with torch.no_grad():
        np.save(out, model(input_ids=ids).logits.float().numpy())


def llama(path: str) -> np.ndarray[Any, Any]:
    """Log-probabilities of every word, in float32 as far as llama.cpp computes in it."""
    import xllamacpp as lib

    settings = lib.CommonParams()
    settings.model.path = path
    settings.n_ctx = settings.n_batch = 64
    settings.cpuparams.n_threads = 1
    settings.warmup = False
    settings.cache_type_k = settings.cache_type_v = lib.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    words, server = 1 << 17, lib.Server(settings)
    prompt = {"prompt": list(range(1, COUNT + 1)), "n_predict": 1, "logprobs": words,
              "n_probs": words}  # fmt: skip
    # It answers with none where the drawn word is a part of a letter; they are those before a draw.
    drawn = (server.handle_completions({**prompt, "seed": seed})["choices"] for seed in range(99))
    answer = next(choices[0]["logprobs"] for choices in drawn if choices[0]["logprobs"])
    best = answer["content"][0]["top_logprobs"]
    logprobs = np.full(max(entry["id"] for entry in best) + 1, -np.inf)
    for entry in best:
        logprobs[entry["id"]] = entry["logprob"]
    return logprobs


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Logits of a folder in another tool's own library, for ``formats.py``: run by its path.

``format_peer.py FOLDER OUT.npy [ADAPTER]``: transformers with compressed-tensors or gptqmodel as
the folder's config asks, weights dequantized where the library can do that; with ``ADAPTER`` by
PEFT on top. The ids are 1 to 24.
"""

from __future__ import annotations

import sys

import numpy as np
import torch


def main(folder: str, out: str, adapter: str = "") -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    method = getattr(AutoConfig.from_pretrained(folder), "quantization_config", {})
    options = {}
    if method.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        np.save(out, model(input_ids=ids).logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

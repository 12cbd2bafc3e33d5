"""Weights of a folder as another tool quantizes them, for ``weight_peers.py``: run by its path.

``weight_peer.py HOW FOLDER DATA.npz OUT BITS GROUP SYMMETRIC``: the linears of a Hugging Face
folder, all but the head, in the tool's own words; ``OUT`` is a folder with the numbers that they
then stand for, or with the tool's own checkpoint. ``DATA`` holds ids and masks
``[samples, length]``. The last line printed is the processor seconds of quantizing alone.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Task:
    folder: str
    ids: torch.Tensor
    mask: torch.Tensor
    bits: int
    group: int
    symmetric: bool
    out: str

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def texts(self) -> list[dict[str, list[int]]]:
        """The samples without their padding."""
        samples = [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]


Timed = tuple[Any, float]
"""The model with the numbers that the tool made (``None`` where its checkpoint is written already),
and the processor seconds that took."""


def hqq(task: Task) -> Timed:
    from hqq.core.quantize import Quantizer

    model = task.model()
    started = time.process_time()
    for name, linear in linears(model):
        codes, meta = Quantizer.quantize(
            linear.weight.data, nbits=task.bits, group_size=task.group, axis=1, device="cpu",
            compute_dtype=torch.float32, round_zero=False,
        )  # fmt: skip
        linear.weight.data = Quantizer.dequantize(codes, meta).reshape(linear.weight.shape).float()
        assert torch.isfinite(linear.weight).all(), name
    return model, time.process_time() - started


def gptqmodel(task: Task, *, method: str = "gptq") -> Timed:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    options: dict[str, Any] = {"bits": task.bits, "group_size": task.group, "sym": task.symmetric}
    if method == "gptq":
        # Their recommended order of work that keeps groups where they are.
        options |= {"desc_act": False, "act_group_aware": True}
    else:
        options |= {"method": method, "format": "gemm"}
    config = QuantizeConfig(offload_to_disk=False, device="cpu", **options)
    model = GPTQModel.load(task.folder, config, dtype=torch.float32)
    started = time.process_time()
    model.quantize(task.texts(), batch_size=8, backend=BACKEND.TORCH, calibration_sort=None)
    seconds = time.process_time() - started
    # Its codes in memory are packed for its kernels; its checkpoint is what others read.
    model.save(task.out)
    return None, seconds


def awq_of_gptqmodel(task: Task) -> Timed:
    return gptqmodel(task, method="awq")


def llmcompressor(task: Task, *, method: str = "gptq") -> Timed:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import gptq, quantization
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        # 0.14 pins memory for AWQ whatever the device, which a torch without a GPU refuses.
        IntermediatesCache.pin_memory = lambda *_: None

    weights = {
        "num_bits": task.bits, "type": "int", "symmetric": task.symmetric, "strategy": "group",
        "group_size": task.group,
    }  # fmt: skip
    groups = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
              "ignore": ["lm_head"]}  # fmt: skip
    recipe: list[Any] = [AWQModifier()] if method == "awq" else []
    modifier = gptq.GPTQModifier if method == "gptq" else quantization.QuantizationModifier
    recipe.append(modifier(**groups))
    model = task.model()
    data = None if method == "rtn" else Dataset.from_list(task.texts())
    started = time.process_time()
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(task.ids),
            max_seq_length=task.ids.shape[1])  # fmt: skip
    seconds = time.process_time() - started
    from compressed_tensors.quantization import forward

    for _, linear in linears(model):
        scale, zero = linear.weight_scale, getattr(linear, "weight_zero_point", None)
        scheme = linear.quantization_scheme.weights
        order = getattr(linear, "weight_g_idx", None)
        linear.weight.data = forward.fake_quantize(linear.weight, scale, zero, scheme, order)
    return copied(task.model(), model), seconds


def awq_of_llmcompressor(task: Task) -> Timed:
    return llmcompressor(task, method="awq")


def rtn_of_llmcompressor(task: Task) -> Timed:
    return llmcompressor(task, method="rtn")


def autoround(task: Task) -> Timed:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    length, flat = 256, torch.tensor([i for text in task.texts() for i in text["input_ids"]])
    windows = flat[: len(flat) // length * length].view(-1, length)
    batches = [{"input_ids": ids[None], "attention_mask": torch.ones(1, length).long()}
               for ids in windows]  # fmt: skip
    model = task.model()
    rounder = AutoRound(
        model, AutoTokenizer.from_pretrained(task.folder), bits=task.bits, group_size=task.group,
        sym=task.symmetric, iters=50, seqlen=length, nsamples=len(batches), dataset=batches,
        device_map="cpu", enable_torch_compile=False, amp=False,
    )  # fmt: skip
    started = time.process_time()
    rounder.quantize()
    return copied(task.model(), rounder.model), time.process_time() - started


# --- what they made -----------------------------------------------------------------------------


def linears(model: Any) -> list[tuple[str, Any]]:
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return [(name, module) for name, module in modules if name != "lm_head"]


def copied(fresh: Any, model: Any) -> Any:
    """The model of the folder with the numbers of another of its form."""
    state = {re.sub(r"\.orig_layer\b", "", k): v for k, v in model.state_dict().items()}
    missing = fresh.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    return fresh


HOW: dict[str, Callable[[Task], Timed]] = {
    "hqq": hqq, "gptqmodel": gptqmodel, "gptqmodel-awq": awq_of_gptqmodel,
    "llmcompressor-rtn": rtn_of_llmcompressor, "llmcompressor-gptq": llmcompressor,
    "llmcompressor-awq": awq_of_llmcompressor, "autoround": autoround,
}  # fmt: skip


def main(how: str, folder: str, data: str, out: str, bits: str, group: str, sym: str) -> None:
    arrays = np.load(data)
    ids, mask = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["mask"])
    task = Task(folder, ids, mask, int(bits), int(group), sym == "true", out)
    model, seconds = HOW[how](task)
    if model is not None:
        model.save_pretrained(out)
    print(f"{seconds:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What stands for the library's chunks and loops gives the library's numbers, state and all."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from graphwright.ir.load.hf import recurrent
from torch.nn.functional import logsigmoid

BATCH, SEQ, KEY_HEADS, HEADS, KEY, VALUE = 2, 5, 2, 4, 8, 6
RULES = {"qwen3_5": "torch_chunk_gated_delta_rule", "kimi_linear": "chunk_kimi_delta_attention"}


def library(kind: str, function: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), function)


@pytest.mark.parametrize("kind", RULES)
def test_the_delta_rule_is_the_librarys(kind: str) -> None:
    """One decay a head, of which several share a key, or one a feature of the key."""
    torch.manual_seed(0)
    fine = kind == "kimi_linear"
    keys = HEADS if fine else KEY_HEADS
    query, key = torch.randn(2, BATCH, SEQ, keys, KEY).unbind(0)
    value = torch.randn(BATCH, SEQ, HEADS, VALUE)
    decay = logsigmoid(torch.randn(BATCH, SEQ, HEADS, *[KEY] * fine))
    beta, state = torch.rand(BATCH, SEQ, HEADS), torch.randn(BATCH, HEADS, KEY, VALUE)
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    both = [rule(query, key, value, g=decay, beta=beta, **options)
            for rule in (recurrent._gated_delta, library(kind, RULES[kind]))]  # fmt: skip
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_mamba_2s_scan_is_the_librarys() -> None:
    torch.manual_seed(0)
    x, dt = torch.randn(BATCH, SEQ, HEADS, VALUE), torch.randn(BATCH, SEQ, HEADS)
    write, read = torch.randn(2, BATCH, SEQ, 2, KEY).unbind(0)
    options = {
        "D": torch.randn(HEADS), "dt_bias": torch.randn(HEADS), "dt_softplus": True,
        "initial_states": torch.randn(BATCH, HEADS, VALUE, KEY), "dt_limit": (0.1, 2.0),
        "return_final_states": True,
    }  # fmt: skip
    rates = -torch.rand(HEADS)
    both = [scan(x, dt, rates, write, read, chunk_size=4, **options)
            for scan in (recurrent._mamba2_scan, library("mamba2", "mamba2_chunk_scan"))]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)

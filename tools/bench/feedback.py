"""GPTQ beside its textbook form: processor seconds, and what is left of the output's error.

``python -m graphwright.tools.bench.feedback [ROWSxCOLUMNS ...] [--bits 4] [--group 128]`` rounds
random matrices on correlated inputs. The textbook form is the published one in plain torch, in
float32: S inverted, each column's error told to all columns of its block, ranges symmetric about 0
and found when a group begins.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from ...passes.weights.feedback import BLOCK, Feedback, rounded_with_feedback
from ...passes.weights.quantizers import rtn

TOKENS, DAMPING = 8192, 0.01


def textbook(weight: Tensor, gram: Tensor, bits: int, group: int) -> Tensor:
    """The rounded matrix [N, K] by the published loop."""
    rest, damped = weight.clone(), gram.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    matrix, top = torch.zeros_like(weight), 2**bits - 1
    for begin in range(0, weight.shape[1], BLOCK):
        end = min(begin + BLOCK, weight.shape[1])
        block, rows = rest[:, begin:end].clone(), factor[begin:end, begin:end]
        errors = torch.zeros_like(block)
        for j in range(end - begin):
            if (begin + j) % group == 0:
                scale = 2 * rest[:, begin + j : begin + j + group].abs().amax(1) / top
            code = (block[:, j] / scale + (top + 1) / 2).round().clamp(0, top)
            matrix[:, begin + j] = (code - (top + 1) / 2) * scale
            errors[:, j] = (block[:, j] - matrix[:, begin + j]) / rows[j, j]
            block[:, j:] -= errors[:, j : j + 1] @ rows[j : j + 1, j:]
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return matrix


def compare(rows: int, columns: int, bits: int, group: int) -> None:
    """Print one matrix's figures."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=rng) * 0.02
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=rng)
    x = torch.randn(TOKENS, columns, generator=rng) * torch.logspace(-1, 1, columns) @ mix
    gram = (x.T @ x).double()

    def error(matrix: Tensor) -> float:
        gap = (matrix - weight).double()
        whole = ((weight.double() @ gram) * weight).sum()
        return math.sqrt(float(((gap @ gram) * gap).sum() / whole))

    started = time.process_time()
    start = rtn(weight, bits, group)
    rounded = time.process_time()
    by = Feedback.of(gram, DAMPING, act_order=True)
    factored = time.process_time()
    ours = rounded_with_feedback(weight, start, by).dequantized()
    done = time.process_time()
    theirs = textbook(weight, gram, bits, group)
    last = time.process_time()
    print(f"{rows} x {columns}, {bits} bits, groups of {group}; relative error of the output:")
    print(f"  to nearest {error(start.dequantized()):.4f}")
    print(
        f"  here {error(ours):.4f} in {done - started:.2f} s: ranges {rounded - started:.2f}, "
        f"factor {factored - rounded:.2f}, columns {done - factored:.2f}"
    )
    print(f"  textbook {error(theirs):.4f} in {last - done:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["512x2048", "2048x2048"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    options = parser.parse_args()
    for size in options.sizes:
        rows, columns = map(int, size.split("x"))
        compare(rows, columns, options.bits, options.group)


if __name__ == "__main__":
    main()

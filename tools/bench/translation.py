"""``python -m graphwright.tools.bench.translation``: from an FX graph to ONNX, by number of layers.

Random Llamas of small layers: what is measured is what a node of the graph costs, not a weight.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from ...backends.onnx.lowering import lowered, translated
from ...ir.core.errors import BadInput, GraphwrightError
from ...ir.core.view import View
from ...ir.load.tracing.trace import trace

LAYERS = (16, 48)
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Processor seconds of one model."""

    layers: int
    trace: float
    translate: float
    """To an ONNX graph that still has ops of our own."""
    lower: float
    """From there to stock ops."""
    nodes: int
    """Of the ONNX graph in the end."""

    @property
    def to_onnx(self) -> float:
        return self.translate + self.lower


def measure(layers: int) -> Timing:
    """One model, once. Raises ``BadInput`` for less than a layer."""
    if layers < 1:
        raise BadInput(f"{layers} layers: give 1 or more")
    model, inputs = _llama(layers)
    fx, tracing = _timed(lambda: trace(model, kwargs=inputs))
    onnx, translating = _timed(lambda: translated(fx))
    final, lowering = _timed(lambda: lowered(onnx))
    return Timing(layers, tracing, translating, lowering, _count(final))


def _llama(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=32, intermediate_size=56, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (2, 7))
    return _Logits(LlamaForCausalLM(config)), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids)
    }  # fmt: skip


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    before = time.process_time()
    return work(), time.process_time() - before


def _count(view: View) -> int:
    return sum(1 for _ in view.nodes())


def table(timings: Sequence[Timing]) -> Table:
    """A row a model, and how its time to ONNX compares with that of the first."""
    result = Table(title="Llama of small layers, processor seconds", title_justify="left")
    for name in ("layers", "nodes", "trace", "translate", "lower", "to ONNX", "times the layers",
                 "times the seconds"):  # fmt: skip
        result.add_column(name, justify="right")
    first = timings[0]
    for one in timings:
        result.add_row(
            str(one.layers), f"{one.nodes:,}", f"{one.trace:.2f}", f"{one.translate:.2f}",
            f"{one.lower:.2f}", f"{one.to_onnx:.2f}", f"{one.layers / first.layers:.2f}",
            f"{one.to_onnx / first.to_onnx:.2f}",
        )  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="translation", description=__doc__)
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="such as 16,48")
    options = parser.parse_args(arguments)
    try:
        measure(1)  # what is imported and compiled once is not a part of what is compared
        timings = [measure(int(count)) for count in options.layers.split(",")]
    except GraphwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    Console().print(table(timings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

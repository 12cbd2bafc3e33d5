"""Weights in few bits, ours beside those of the field's own tools: perplexity and seconds.

``python -m graphwright.tools.bench.weight_peers --peer hqq=PYTHON --peer gptqmodel=PYTHON
--peer llmcompressor=PYTHON --peer autoround=PYTHON [--bits 4,3]
[--methods RTN,GPTQ] [--samples N]``: ``PYTHON`` is the
interpreter of an environment that has the tool (``pip install hqq``, and so on: their bounds on
torch and transformers differ from each other's). All get the same calibration data and one thread,
quantize the linears but for the head in groups of 32, and are judged by one judge: the weights that
a tool leaves are put into the folder's model, and that is run in ONNX Runtime on the same text.
Seconds are of processors, loading left out; ours are of the whole run, its checks among them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ...ir.load.sources import load
from . import weight_peer
from .processes import CommandFailed, environment, measure
from .showing import ended, growing
from .weight_judge import Judge
from .weight_table import chosen

GROUP = 32
COLUMNS = ("bits", "method", "by", "perplexity", "seconds")


@dataclass(frozen=True)
class Method:
    ours: str
    symmetric: bool
    theirs: tuple[str, ...]
    """Names of ``weight_peer.HOW``."""


METHODS = {
    "RTN": Method("quantize", True, ("llmcompressor-rtn",)),
    "HQQ": Method("hqq", False, ("hqq",)),
    "GPTQ": Method("gptq", True, ("gptqmodel", "llmcompressor-gptq")),
    "AWQ": Method("awq", False, ("gptqmodel-awq", "llmcompressor-awq")),
    "AutoRound": Method("autoround{steps=50}", True, ("autoround",)),
}


class Peers:
    """The tools' interpreters, and the data that they get, in a folder of its own."""

    def __init__(self, pythons: Mapping[str, str], judge: Judge, scratch: Path) -> None:
        self.pythons, self.judge, self.scratch = pythons, judge, scratch
        longest = max(batch["input_ids"].shape[1] for batch in judge.data)

        def joined(name: str) -> np.ndarray:
            rows = (batch[name] for batch in judge.data)
            padded = [torch.nn.functional.pad(r, (0, longest - r.shape[1])) for r in rows]
            return torch.cat(padded).numpy()

        self.data = scratch / "data.npz"
        np.savez(self.data, ids=joined("input_ids"), mask=joined("attention_mask"))

    def row(self, how: str, bits: str, symmetric: bool) -> tuple[str, str]:
        """Perplexity and seconds, or the last line of what the tool said."""
        python, out = self.pythons.get(how.partition("-")[0]), self.scratch / f"{how}-{bits}"
        if python is None:
            return "not given", ""
        folder = str(self.judge.graph.source.folder)
        # -P: a module of this folder must not stand in for a library of its name.
        command = [python, "-P", weight_peer.__file__, how, folder, str(self.data), str(out), bits,
                   str(GROUP), str(symmetric).lower()]  # fmt: skip
        # gptqmodel starts two workers, and finds one processor too few for that.
        extra = {"PYTHONPATH": "", "GPTQMODEL_CPU_WORKERS": "2"}
        try:
            output = measure(command, environment(1, extra)).output
        except CommandFailed as error:
            return str(error).strip().splitlines()[-1], ""
        perplexity = self.judge.perplexity(load(out, cache=False))
        return perplexity, f"{float(output.split()[-1]):.0f}"


def recipe(method: Method, bits: str) -> str:
    name, _, options = method.ours.rstrip("}").partition("{")
    return f"{name}{{bits={bits} group={GROUP} {options} exclude=lm_head}}".replace("  ", " ")


def rows(
    judge: Judge, peers: Peers, bits: Sequence[str], methods: Sequence[str]
) -> Iterator[Sequence[str]]:
    yield "", "source", "", judge.perplexity(judge.graph), ""
    for width in bits:
        for name in methods:
            method = METHODS[name]
            graph, _, seconds = judge.optimized(recipe(method, width))
            yield width, name, "ours", judge.perplexity(graph), f"{seconds:.0f}"
            for how in method.theirs:
                yield width, name, how, *peers.row(how, width, method.symmetric)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="weight_peers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, default=40, help="windows of text to judge by")
    options = parser.parse_args(arguments)
    pythons = dict(pair.split("=", 1) for pair in options.peer)

    def show(console: Console) -> None:
        methods = chosen(options.methods, tuple(METHODS), "method")
        judge = Judge(options.model, options.samples)
        with tempfile.TemporaryDirectory() as place:
            peers = Peers(pythons, judge, Path(place))
            lines = rows(judge, peers, options.bits.split(","), methods)
            console.print(growing(options.model, COLUMNS, lines))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())

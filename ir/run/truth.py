"""What the source itself gives, and whether our reading of it gives the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from ..core.errors import BadInput, BoundExceeded, InvalidGraph, Missing, NodeFailed, first_line
from ..core.view import Original, Run, View
from ..structure.cache_slots import answers, has_cache, later, next_step
from .inputs import sample_inputs
from .locate import first_wrong
from .predict import refuse_unbounded
from .sweep import sweep, sweep_together
from .verify import Difference, check_structure, difference, runtime_tolerance

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]

PROBE_SIZES = (3, 5, 4, 6, 2)
"""Sizes of the symbolic dimensions of a probe: others than a trace or a sample has."""
_HOLDING_LOOPS = ("Loop", "If", "Scan")
CHUNK = 2
"""Tokens that a probe with a cache reads at once after its prompt."""


@dataclass(frozen=True)
class Seen:
    """One run of the source."""

    what: str
    """The inputs in words: ``sample 1``."""
    inputs: Inputs
    outputs: Outputs


@dataclass
class Truth:
    """The source's own outputs on the samples, and on small inputs of other sizes."""

    by: str = ""
    """Who ran it: see ``Original``."""
    samples: list[Seen] = field(default_factory=list)
    probes: list[Seen] = field(default_factory=list)
    unheard: str = ""
    """Why the source was not run, or on no other sizes."""
    refused: bool = False
    """Whether what would run it does not even load it."""


def ask_source(graph: View, samples: Sequence[Inputs]) -> Truth:
    """``ask`` what the graph was read from; nothing where it has been edited since.

    Raises ``BadInput`` where the source does not take the samples.
    """
    original = graph.source.original
    if original is None:
        return Truth(unheard="nothing here runs the source itself")
    if graph.edits:
        return Truth(unheard="the graph was edited after it was read")
    known: Truth | None = graph.source.truth
    if known is None or not _same([sample.inputs for sample in known.samples], samples):
        known = graph.source.truth = ask(graph, original, samples)
    return known


def _same(known: Sequence[Inputs], samples: Sequence[Inputs]) -> bool:
    """Whether the first of ``known`` are these samples."""
    if len(known) < len(samples):
        return False
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(known, samples, strict=False)
    )


def ask(graph: View, original: Original, samples: Sequence[Inputs]) -> Truth:
    """Run the source on the samples, and on a probe of other sizes than a trace has.

    A probe has padding before the text where the graph takes a mask of tokens, and where it has a
    cache, a chunk of tokens and a step follow the prompt.

    Raises ``BadInput`` where the source does not take the samples, for a loop without an end, and
    for a value that does not fit into memory: what runs the source would take it all.
    """
    for batch in samples:
        row = [batch.get(name) for name in graph.input_names()]
        refuse_unbounded(graph, [row], list(graph.nodes()))
    loops = any(graph.native_op(node) in _HOLDING_LOOPS for node in graph.nodes())
    if loops:
        _see_loops_end(graph, samples[0])
    try:
        run = original.start()
    except (BadInput, Missing) as error:
        return Truth(unheard=str(error), refused=isinstance(error, BadInput))
    try:
        theirs = [Seen(f"sample {i}", batch, run(batch)) for i, batch in enumerate(samples, 1)]
    except BadInput as error:
        raise BadInput(
            f"{error}. These are the inputs that the run would be judged on: {_shapes(samples)}. "
            "Give others that the model takes by --calib DATA (samples=[...] in Python), a .npz of "
            f"{_wanted(graph)}"
        ) from None
    truth = Truth(original.by, theirs)
    try:
        inputs = probe(graph)
        if loops:
            _see_loops_end(graph, inputs)
        outputs = run(inputs)
    except BadInput as error:
        truth.unheard = f"no inputs of other sizes: {error}"
        return truth
    shape = " x ".join(str(n) for n in next(iter(inputs.values())).shape)
    truth.probes.append(Seen(f"an input of {shape}{_padded(inputs)}", inputs, outputs))
    for what, tokens in (("a chunk after it", CHUNK), ("a step after that", 1)):
        following = later(inputs, outputs, tokens) if has_cache(graph) else None
        if following is None:
            break
        try:
            inputs, outputs = following, run(following)
        except BadInput as error:
            # GroupQueryAttention, for one, takes a chunk behind a cache of one row alone.
            truth.unheard = f"not on {what}: {first_line(error)}"
            continue
        truth.probes.append(Seen(what, inputs, outputs))
    return truth


def _see_loops_end(graph: View, inputs: Inputs) -> None:
    """Raise ``BadInput`` where loops do not: nothing bounds them in what runs the source.

    Our own run does. What else is wrong with it is told when it is held against the source.
    """
    with contextlib.suppress(NodeFailed, RuntimeError, ValueError, IndexError):
        sweep(graph, inputs)


def check_read(
    read: View, graph: View, samples: Sequence[Inputs], truth: Truth | None = None
) -> None:
    """``check_structure`` of ``read``, which is ``graph`` in the words of the vocabulary.

    Raises ``InvalidGraph`` where our reading is at fault, and ``BadInput`` where the source is:
    what would run it does not load it either. ``truth`` is the source's, if it was asked already.
    """
    try:
        check_structure(read)
    except InvalidGraph as error:
        truth = truth or ask_source(graph, samples)
        if not truth.refused:
            raise
        raise BadInput(
            f"{graph.source.name} contradicts itself: {error}. {truth.unheard}"
        ) from None


def _shapes(samples: Sequence[Inputs]) -> str:
    tensors = samples[0].items() if samples else ()
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors)


def _wanted(graph: View) -> str:
    """The inputs by name with their types: ``x f32[batch, 3, 224, 224]``."""
    named = zip(graph.input_names(), graph.inputs(), strict=True)
    return ", ".join(f"{name} {graph.type(value)}" for name, value in named)


def probe(graph: View) -> dict[str, torch.Tensor]:
    """Small random inputs; of a text the rows after the first are padded on the left.

    Raises ``BadInput`` as ``sample_inputs``.
    """
    inputs = sample_inputs(graph, seed=1, usual=PROBE_SIZES)
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is None or ids is None or mask.shape != ids.shape or graph.source.prompt:
        return inputs
    padded = mask.clone()
    for row in range(1, len(padded)):
        padded[row, : min(row, mask.shape[1] - 1)] = 0
    return {**inputs, "attention_mask": padded}


def _padded(inputs: Inputs) -> str:
    mask = inputs.get("attention_mask")
    return ", padded on the left" if mask is not None and not bool(mask.all()) else ""


def hold(
    read: View, graph: View, truth: Truth, outputs: Sequence[Mapping[str, torch.Tensor]]
) -> Difference | None:
    """Hold our reading against the source; the worst difference, ``None`` where it was not run.

    ``read`` is the graph as it was read, ``graph`` the same in the words of the vocabulary, and
    ``outputs`` are the latter's on the first samples. Raises ``BoundExceeded``, naming the first
    node whose value differs from the source's.
    """
    bound = runtime_tolerance(read)
    if not truth.samples:
        return None
    probed = _probed(read, graph, truth) if truth.probes else []
    pairs = zip([*truth.samples[: len(outputs)], *truth.probes], [*outputs, *probed], strict=True)
    worst = Difference(0.0, 1.0, 0.0, 0.0)
    for theirs, ours in pairs:
        gone = sorted(set(answers(theirs.outputs)) - set(ours))
        if gone:
            raise BoundExceeded(f"{_whose(read)}: it does not give {', '.join(gone)}")
        for name, expected in theirs.outputs.items():
            if name not in ours:  # a cache, which samples are not judged by
                continue
            gap = _gap(expected, ours[name])
            if isinstance(gap, Difference) and gap.within(bound):
                worst = max(worst, gap, key=lambda d: d.rel_l2)
                continue
            raise BoundExceeded(_explanation(read, graph, truth, theirs, name, gap, bound))
        lost = sorted(set(answers(ours)) - set(theirs.outputs))
        if lost:
            raise BoundExceeded(f"{_whose(read)}: the source gives no {', '.join(lost)}")
    return worst


def _probed(read: View, graph: View, truth: Truth) -> list[Outputs]:
    """Our reading on the probes. ``BoundExceeded`` where it fails on what the source takes."""
    try:
        return sweep_together(graph, [probe.inputs for probe in truth.probes])
    except (BadInput, RuntimeError, ValueError, IndexError) as error:
        reason = first_line(error)
        raise BoundExceeded(
            f"{_whose(read)} fails on {', '.join(s.what for s in truth.probes)}, which {truth.by} "
            f"takes: {reason}. "
            "Nothing is published. Please report this as a bug, with the model's structure"
        ) from error


class Reference:
    """The source's outputs on the samples: its own, or by our reading of it where none were heard.

    What ``truth`` does not hold is computed at the first use.
    """

    def __init__(self, source: View, samples: Sequence[Inputs], truth: Truth) -> None:
        self._source, self._samples, self._truth = source, samples, truth

    @cached_property
    def _run(self) -> Run:
        original = self._source.source.original
        if original is not None and (self._truth.samples or not self._truth.unheard):
            with contextlib.suppress(BadInput, Missing):
                return original.start()
        return partial(sweep, self._source)

    @cached_property
    def outputs(self) -> list[Outputs]:
        """On each sample, without a key-value cache."""
        rest = range(1, len(self._samples))
        return [answers(self._first), *(answers(self._on(i)) for i in rest)]

    def first(self, count: int) -> list[Outputs]:
        """On the first sample and, with a cache and ``count`` 2, on the step that follows it."""
        return [self._first, *self._step][:count] if count > 1 else [self._first]

    @cached_property
    def _step(self) -> list[Outputs]:
        step = next_step(self._samples[0], self._first) if has_cache(self._source) else None
        return [] if step is None else [self._run(step)]

    @cached_property
    def _first(self) -> Outputs:
        return self._on(0)

    def _on(self, index: int) -> Outputs:
        known = self._truth.samples
        return known[index].outputs if index < len(known) else self._run(self._samples[index])


def _gap(expected: torch.Tensor, ours: torch.Tensor) -> Difference | str:
    try:
        return difference(expected, ours)
    except InvalidGraph as error:
        return str(error)


def _explanation(
    read: View, graph: View, truth: Truth, theirs: Seen, name: str, gap: Difference | str,
    bound: float,
) -> str:  # fmt: skip
    far = gap if isinstance(gap, str) else f"{gap.rel_l2:.3g} (relative L2; bound {bound:g}) away"
    original = read.source.original
    where = "" if original is None else first_wrong(read, graph, original, theirs.inputs, bound)
    return (
        f"{_whose(read)} differs from the source: on {theirs.what} the output {name} is {far} from "
        f"what {truth.by} gives. {where}Nothing is published. Please report this as a bug, with "
        "the model's structure"
    )


def _whose(read: View) -> str:
    return f"our reading of {read.source.name or 'the model'}"

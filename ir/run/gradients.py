"""How a model's loss over the next token changes with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.view import Value, View
from .blocks import BlockGraph, captured, graph_between

IDS, LOGITS = "input_ids", "logits"


def loss_graph(view: View) -> BlockGraph:
    """The graph from ids to logits.

    Raises ``BadInput`` for a graph that does not predict the next token, or that has an op on the
    way through which no gradient comes.
    """
    inputs = dict(zip(view.input_names(), view.inputs(), strict=True))
    outputs = dict(zip(view.output_names(), view.outputs(), strict=True))
    if IDS not in inputs or LOGITS not in outputs:
        raise BadInput(
            "gradients are those of the loss over the next token: they need input_ids among the "
            "inputs and logits among the outputs"
        )
    graph = graph_between(view, inputs[IDS], outputs[LOGITS])
    node = graph.without_gradient()
    if node is not None:
        raise BadInput(
            f"no gradient comes through {view.name(node)} (`{view.native_op(node)}`), which "
            "computes outside of torch"
        )
    return graph


def gradient_energies(
    graph: BlockGraph, batches: Sequence[Mapping[str, Tensor]], weights: Sequence[Value],
    progress: Callable[[int, int], None],
) -> list[Tensor]:  # fmt: skip
    """``sum over texts of g^2`` f32 of each weight, g the gradient of a text's loss, summed over
    its tokens. In memory at once: the weights of the graph, and gradients and sums of those asked
    for.

    Raises ``BadInput`` where a gradient is NaN or infinite.
    """
    constants = graph.constants()
    learned = [constants[value].detach().requires_grad_() for value in weights]
    constants.update(zip(weights, learned, strict=True))
    sums = [torch.zeros(weight.shape) for weight in learned]
    for done, batch in enumerate(batches):
        progress(done, len(batches))
        rows = range(len(batch[IDS]))
        texts = [{name: t[row : row + 1] for name, t in batch.items()} for row in rows]
        around = captured(graph.view, texts, graph.outside)
        for text, outside in zip(texts, around, strict=True):
            with torch.enable_grad():
                loss = _loss(graph.run(text[IDS], outside, constants), text)
                gradients = torch.autograd.grad([loss], learned, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float())
    if not all(torch.isfinite(total).all() for total in sums):
        raise BadInput("the gradients of the loss are NaN or infinite on the calibration data")
    return sums


def _loss(logits: Tensor, text: Mapping[str, Tensor]) -> Tensor:
    """The negative log-likelihood of the tokens that count, each after those before it."""
    ids = text[IDS].long()
    counts = text.get("attention_mask", torch.ones_like(ids)).bool()
    mask = counts[:, 1:] & counts[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][mask].float(), ids[:, 1:][mask], reduction="sum"
    )

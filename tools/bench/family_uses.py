"""What ``families`` tries beside exactness: a block left out, and text written word by word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...backends.artifacts.pair import export_pair
from ...backends.generation.decode import Decoder
from ...backends.registry import compile as compile_model
from ...ir.core.errors import BadInput
from ...ir.core.quiet import quiet
from ...ir.core.view import View
from ...ir.load.hf.pair import PARTS_OF_PAIR
from ...ir.load.hf.pictures import as_the_library_takes
from ...ir.load.sources import load
from ...ir.load.tracing.original import ModuleOriginal
from ...ir.run.inputs import sample_inputs
from ...ir.structure.layers import Block
from ...ir.structure.recognize import last_tower, recognize
from ..evaluate.seq2seq import Seq2Seq

NEW = 8
"""Tokens that are written."""
Tensors = Mapping[str, torch.Tensor]


def left_out(view: View) -> str:
    """The path of all blocks of the last tower but one: the last, of which no other depends.

    ``view`` is canonical. Raises ``BadInput`` where passes of depth refuse, and where there is one
    block alone.
    """
    blocks = last_tower(recognize(view))
    if len(blocks) == 1:
        raise BadInput("the last tower has one block alone")
    return f"path{{blocks=0-{len(blocks) - 2}}}"


def without_block(view: View, inputs: Tensors) -> dict[str, torch.Tensor]:
    """The library's outputs where the module of that block gives back what it takes.

    ``view`` is canonical, and still of a module.
    """
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    blocks = last_tower(recognize(view))
    homes = [_home(block) for block in blocks]
    with quiet():
        module = original.make().eval()
    part = _submodule(module, homes[-1])
    turn = homes[:-1].count(homes[-1])  # ALBERT's layers are one module
    part.forward = _passing(part.forward, turn)
    with torch.no_grad(), quiet():
        outputs = original.call(module, {name: t.clone() for name, t in inputs.items()})
    return dict(outputs)


def _home(block: Block) -> str:
    """The path of a block's module: what its linears' names share, to the last number in it."""
    columns = zip(*(name.split(".") for name in block.linears), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
    while shared and not shared[-1].isdigit():
        shared.pop()
    if not shared:
        raise BadInput(f"no module is named that holds {', '.join(block.linears)}")
    return ".".join(shared)


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    names = [name for name, _ in module.named_modules() if f".{name}".endswith(f".{path}")]
    if not names:
        raise BadInput(f"the library's model has no module {path}")
    return module.get_submodule(min(names, key=len))


def _passing(forward: Callable[..., Any], turn: int) -> Callable[..., Any]:
    """A forward that gives, at its call number ``turn``, what it was given: in place of each tensor
    the first of the same shape that it took."""
    calls = iter(range(turn + 1))

    def passed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if next(calls, None) != turn:
            return output
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]

        def back(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return next((t for t in inputs if t.shape == value.shape), value)

        return pytree.tree_map(back, output)

    return passed


def written(view: View, artifact: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy tokens behind two prompts: by our loop in ONNX Runtime, and by the library's.

    ``artifact`` is the graph with its cache; images come with the prompts where the model takes
    them.
    """
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    rng = torch.Generator().manual_seed(3)
    words = torch.randint(5, 90, (2, 6), generator=rng).tolist()
    texts = [[5, *view.source.prompt, *row] for row in words]
    types = view.input_types()
    ids = torch.tensor(texts)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = types.get("pixel_values")
    if pixels is not None:
        sides = [int(size) for size in (pixels.shape or ())[1:]]
        inputs["pixel_values"] = torch.randn(2, *sides, generator=rng)
    images = list(inputs["pixel_values"]) if pixels is not None else None
    decoder = Decoder(compile_model(artifact, optimize=False))
    steps = list(decoder.decode(texts, max_new_tokens=NEW, images=images))
    with quiet():
        model: Any = original.make().eval()
        taken = as_the_library_takes(model, inputs)
        with torch.no_grad():
            theirs = model.generate(
                **taken, max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
    return [list(row) for row in zip(*steps, strict=True)], theirs[:, -NEW:].tolist()


def written_by_pair(view: View, folder: Path, out: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The same of an encoder-decoder: by its exported parts, and by the library's forward, which
    reads the whole answer at each step."""
    original = view.source.original
    assert isinstance(original, ModuleOriginal)
    export_pair({part: load(folder, part=part) for part in PARTS_OF_PAIR}, out)
    with quiet():
        model: Any = original.make().eval()
    source = {n: t for n, t in sample_inputs(view, seed=3).items() if n != "decoder_input_ids"}
    start = model.config.decoder_start_token_id
    text = torch.full((len(next(iter(source.values()))), 1), start)
    for _ in range(NEW):
        with torch.no_grad(), quiet():
            logits = model(**source, decoder_input_ids=text, use_cache=False).logits
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return Seq2Seq(out).greedy(source, start, max_new_tokens=NEW).tolist(), text.tolist()

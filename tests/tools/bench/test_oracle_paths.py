"""What an oracle reports holds for the model's own layers."""

from __future__ import annotations

import torch
from graphwright.tools.bench.oracle_paths import oracle

from ... import models as small_models


def test_a_path_that_is_said_to_be_right_is() -> None:
    small = small_models.llama(layers=4)
    view, library = small_models.traced(small), small.module.model
    ids = torch.tensor([[5, 17, 60, 2, 9, 33]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = library.model.layers

    def says(path: tuple[int, ...]) -> int:
        library.model.layers = torch.nn.ModuleList([own[i] for i in path])
        library.config.num_hidden_layers = len(path)
        with torch.no_grad():
            return int(library(ids, use_cache=False).logits[0, -1].argmax())

    itself = says((0, 1, 2, 3))
    known = oracle(view, batch, itself, 40)
    assert known.right and known.best_short and known.shortest is not None
    assert len(known.shortest) <= 4 and says(known.shortest) == itself
    other = next(word for i in range(4) if (word := says((i, i, i))) != itself)
    repaired = oracle(view, batch, other, 200)
    assert not repaired.right and repaired.shortest is not None
    assert says(repaired.shortest) == other
    assert oracle(view, batch, 96, 1).shortest is None

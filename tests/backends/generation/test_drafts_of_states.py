"""Drafts and further paths of models whose layers keep a state that holds every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as Folder

import graphwright as gw
import pytest
from graphwright.backends import Executable
from graphwright.backends.artifacts.entries import branch
from graphwright.backends.generation.decode import Decoder
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.sources import load
from graphwright.ir.moves import Path
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from graphwright.tools.run.drafting import drafting

PROMPT, NEW = [5, 17, 60, 2], 12
LAYERS = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}


def written(run: Executable) -> list[int | None]:
    return [word for (word,) in Decoder(run).decode([PROMPT], max_new_tokens=NEW)]


def test_a_path_of_layers_with_a_state_is_written_and_drafts_nothing(tmp_path: Folder) -> None:
    """Without the attention too; a state cannot be taken back, and ``auto`` then drafts nothing."""
    family = FAMILIES["lfm2"]
    save(replace(family, sizes={**family.sizes, **LAYERS}), tmp_path / "model")
    view = load(tmp_path / "model", cache=True)
    out = gw.export(view, tmp_path / "out", paths={"fast": "0,2"})
    fast = branch(view, "fast", Path.parse("0,2"))
    assert [n for n in fast.input_names() if n.startswith("past")] == ["past.0.conv", "past.2.conv"]
    assert written(gw.compile(out, path="fast")) == written(gw.compile(fast, backend="eager"))
    run = gw.compile(out)
    assert drafting(out, run, "auto", "cpu", 97) is None
    for draft in ("path", "fast", "recycle"):
        with pytest.raises(BadInput, match="a draft that is wrong is taken back"):
            drafting(out, run, draft, "cpu", 97)

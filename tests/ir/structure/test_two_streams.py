"""Graphs of two streams: a decoder that looks at its encoder, and towers side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.load.sources import load
from graphwright.ir.structure.recognize import Structure, last_tower, recognize
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES


def structure_of(folder: Path, part: str | None = None) -> Structure:
    view = load(folder, part=part)
    canonicalize(view)
    return recognize(view)


def linears(structure: Structure) -> list[tuple[int, int]]:
    """Tower and number of linears of each block."""
    return [(block.tower, len(block.linears)) for block in structure.blocks]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_cross_attention_is_a_part_of_its_block(name: str, tmp_path: Path) -> None:
    save(FAMILIES[name], tmp_path)
    whole = structure_of(tmp_path)
    assert linears(whole) == [(0, 6), (0, 6), (1, 10), (1, 10)]
    assert [block.attentions for block in whole.blocks] == [(0,), (1,), (2, 3), (4, 5)]
    assert [block.index for block in last_tower(whole)] == [2, 3]
    outside = [linear.role for linear in whole.linears if linear.block is None]
    assert outside == ["head"]
    assert linears(structure_of(tmp_path, "encoder")) == [(0, 6), (0, 6)]
    # The source's keys and values are there: two linears fewer.
    assert linears(structure_of(tmp_path, "decoder_with_past")) == [(0, 8), (0, 8)]


def test_towers_side_by_side(tmp_path: Path) -> None:
    save(FAMILIES["clip"], tmp_path)
    structure = structure_of(tmp_path)
    assert linears(structure) == [(0, 6), (0, 6), (1, 6), (1, 6)]
    assert {site.block for site in structure.attentions} == {0, 1, 2, 3}
    assert len([linear for linear in structure.linears if linear.block is None]) == 2

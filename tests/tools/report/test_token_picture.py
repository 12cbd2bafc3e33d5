"""The picture with kept tokens marked: what is marked is what went on."""

from __future__ import annotations

import base64
import io
import re

import graphwright as gw
import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.tools.report.token_picture import Kept, draw, kept_entry, kept_tokens
from PIL import Image

from ... import models as small_models


@pytest.fixture(scope="module")
def graph() -> View:
    return gw.load("zoo:tiny-llava", cache=False)


def test_kept_tokens_by_cut(graph: View) -> None:
    prompt = {name: tensor[:1] for name, tensor in graph.source.samples[0].items()}
    recipe = "uniform-tokens{keep=36},visual-exit{layer=3}"
    view = gw.optimize(graph, recipe, samples=[prompt]).graph
    first, last = kept_tokens(view, prompt, "both")
    assert first.tokens.nonzero().squeeze(1).tolist() == [(2 * i + 1) * 2 for i in range(36)]
    assert (first.label, last.label) == ("both, from block 0", "both, from block 3")
    assert not last.tokens.any()
    svg = draw(view, prompt["pixel_values"][0], [first, last, Kept("<all>", first.tokens | True)])
    assert svg.count("<image") == 3 and svg.count("<rect") == 144 - 36 + 144
    assert "both, from block 0: 36 of 144" in svg and "&lt;all&gt;: 144 of 144" in svg
    corners = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', svg)
    assert corners[0] == ("10.00", "28.00"), "the first patch left"
    assert corners[1] == ("26.00", "28.00"), "so did the second; the third stays"
    assert corners[2] == ("58.00", "28.00")
    entry = kept_entry(view, prompt)
    assert entry is not None and len(entry.pictures) == 1
    assert (entry.rows, entry.columns) == (12, 12)
    assert [(cut.name, cut.block) for cut in entry.cuts] == [
        ("uniform-tokens", 0), ("visual-exit", 3)
    ]  # fmt: skip
    assert entry.cuts[0].kept == [(2 * i + 1) * 2 for i in range(36)]
    with Image.open(io.BytesIO(base64.b64decode(entry.pictures[0]))) as image:
        assert (image.format, image.size) == ("JPEG", (96, 96))


def test_a_graph_without_cuts_keeps_all_and_a_text_has_no_picture(graph: View) -> None:
    graph = graph.copy()
    canonicalize(graph)
    assert kept_entry(graph, graph.source.samples[0]) is None
    (whole,) = kept_tokens(graph, graph.source.samples[0], "source")
    assert whole.label == "source" and torch.all(whole.tokens) and len(whole.tokens) == 144
    small = small_models.llama(layers=1)
    text = small_models.raised(small)["fx"]
    with pytest.raises(BadInput, match="there is no picture to draw: the model has no vision"):
        kept_tokens(text, small.inputs, "source")

"""The three graphs that onnxruntime-genai runs a model of images and text by: tower, words, text.

One graph is cut where the images enter the words: ``vision`` gives an image's features, as rows of
``image_features``; ``embedding`` puts them among the words, ``inputs_embeds``; ``text`` reads these
and, of Qwen's line, the places of its tokens, ``position_ids`` ``[3, batch, seq]``, which the
runtime counts. It hands on one tensor of a width that the config says: features that early layers
of the text add (DeepStack) go the same way, behind the others in each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import InvalidGraph, Refusal
from ...ir.core.view import Value, View
from ...ir.rewrite.cleanup import clean
from ...ir.structure.asides import asides
from ...ir.structure.cache_slots import POSITIONS, SHIFT, STREAM, is_state, present_of
from ...ir.structure.cuts import COUNT_KEY
from ...ir.structure.recognize import recognize
from ...ir.structure.vision import find_image_tokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder
from .pictured_ends import inputs_of, only, sizes_of, stand_for
from .pictured_tower import tower_part
from .pictures import FEATURES, IDS, MASK, PIXELS, Pictures


def split(graph: View, pictures: Pictures, *, apart: bool = False) -> dict[str, View]:
    """``vision``, ``embedding`` and ``text`` of a graph with a cache, which stays as it is.

    ``vision`` takes ``pixel_values`` as the graph has them, or, of Qwen's line, the rows of patches
    that the library's processor makes, ``[images * patches, numbers]``, and ``image_grid_thw`` i64
    ``[images, 3]``, of which it reads whether the size is the graph's: it fails for any other. It
    gives features as rows, or image by image where they are to be kept ``apart``. ``text`` takes
    ``input_ids`` too where it looks at them. Raises ``Refusal`` where the graph cannot be cut so.
    """
    if COUNT_KEY in graph.metadata():
        raise Refusal(
            "image tokens leave its text, and the runtime keeps as many keys as a prompt is long"
        )
    whole = graph.copy()
    canonicalize(whole)
    images = find_image_tokens(whole, recognize(whole))
    rows = next((whole.result(user) for user in whole.users(images.features)
                 if whole.type(whole.results(user)[0]).rank == 2), None)  # fmt: skip
    shape = whole.type(images.merged).shape or ()
    places = [value for node in whole.nodes() for value in whole.results(node)
              if whole.type(value).shape == (3, *shape[:2])
              and whole.type(value).dtype == torch.int64]  # fmt: skip
    if rows is None or (pictures.frames and not places):
        raise Refusal("features do not enter the text as rows, or tokens have no places in it")
    deep = [*asides(whole)]
    made = [rows, *(_rows_of(whole, value) for value in deep)]
    cut = _Cut(
        [whole.name(value) for value in made], whole.name(images.features),
        [whole.name(value) for value in (images.merged, *deep)],
        whole.name(places[-1]) if pictures.frames else None, images.tokens,
    )  # fmt: skip
    try:
        return {
            "vision": _vision(whole.copy(), cut, pictures, apart=apart),
            "embedding": _embedding(whole.copy(), cut),
            "text": _text(whole.copy(), cut),
        }
    except InvalidGraph as error:
        raise Refusal(f"one part reads what another one takes: {error}") from None


@dataclass(frozen=True)
class _Cut:
    """Where a graph is cut, by the names of its values, which its copies share."""

    rows: Sequence[str]
    """The features, and those of early layers, each ``[images * tokens, width]``."""
    features: str
    """The first of them before they are rows."""
    streams: Sequence[str]
    """The same where they are among the words, each ``[batch, seq, width]``."""
    places: str | None
    tokens: int
    """Tokens of an image."""


def _rows_of(view: View, aside: Value) -> Value:
    """The rows of which a value that joins the stream from beside is made, with one of zeros
    before them. Raises ``Refusal`` where there are none."""
    picked = view.tensor(view.maker(aside), 1)
    for table in view.arguments(view.maker(picked)):
        maker = view.producer(table)
        if maker is None or view.op(maker) != "concat":
            continue
        for value in view.arguments(maker):
            if view.type(value).rank == 2 and (view.type(value).shape or (1,))[0] != 1:
                return value
    raise Refusal(
        "early layers of its text add features of their own at the image tokens (DeepStack), which "
        "are no rows"
    )


def _named(view: View, name: str) -> Value:
    return next(value for node in view.nodes() for value in view.results(node)
                if view.name(value) == name)  # fmt: skip


def _parts(view: View, whole: Value, count: int, dim: int) -> list[Value]:
    """Equal parts of a value along its last axis."""
    if count == 1:
        return [whole]
    width = (view.type(whole).shape or ())[dim]
    assert isinstance(width, int)
    b, each = Builder(view, next(iter(view.nodes()))), width // count
    return [b.slice(whole, i * each, (i + 1) * each, dim=dim) for i in range(count)]


def _joined(view: View, names: Sequence[str], dim: int) -> Value:
    """Values of these names side by side."""
    values = [_named(view, name) for name in names]
    if len(values) == 1:
        return values[0]
    last = [node for node in view.nodes() if any(v in values for v in view.results(node))][-1]
    return Builder(view, view.after(last)).concat(*values, dim=dim)


def _stand_in(view: View, name: str, names: Sequence[str], dim: int) -> Value:
    """An input for values of these names, which are parts of it from now on."""
    like = _joined(view, names, dim)
    view.type(like)  # an input takes the type that is known
    given = view.add_input(name, like)
    for old, part in zip(names, _parts(view, given, len(names), dim), strict=True):
        view.replace(_named(view, old), part)
    return given


def _text(view: View, cut: _Cut) -> View:
    outputs = dict(zip(view.output_names(), view.outputs(), strict=True))
    given = _stand_in(view, STREAM, cut.streams, 2)
    inputs = inputs_of(view)
    taken = {STREAM: given, MASK: inputs[MASK]}
    if cut.places is not None:
        at = _named(view, cut.places)
        taken[POSITIONS] = view.add_input(POSITIONS, at)
        view.replace(at, taken[POSITIONS])
    caches = {name: value for name, value in inputs.items()
              if name != SHIFT and is_state(name)}  # fmt: skip
    outputs.pop(present_of(SHIFT), None)
    view.set_outputs(outputs)
    clean(view)
    sizes = {user for user, _ in sizes_of(view, inputs[IDS])}
    if {*view.users(inputs[IDS])} - sizes:
        taken[IDS] = inputs[IDS]
    return only(view, {**taken, **caches}, outputs)


def _embedding(view: View, cut: _Cut) -> View:
    given = _stand_in(view, FEATURES, cut.rows, 1)
    for size, axis in [*sizes_of(view, inputs_of(view)[PIXELS])]:
        if not axis:  # how many images there are
            b = Builder(view, size)
            firsts = b.slice(given, 0, END, dim=0, step=cut.tokens)
            stand_for(view, size, b.size(firsts, dim=0))
    stream = _joined(view, cut.streams, 2)
    return only(view, {IDS: inputs_of(view)[IDS], FEATURES: given}, {STREAM: stream})


def _vision(view: View, cut: _Cut, pictures: Pictures, *, apart: bool) -> View:
    features = _named(view, cut.features) if apart else _joined(view, cut.rows, 1)
    return tower_part(view, features, pictures)

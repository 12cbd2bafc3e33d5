"""The three graphs that onnxruntime-genai runs a model of images and text by: tower, words, text.

One graph is cut where the images enter the words: ``vision`` gives an image's features, as rows of
``image_features``; ``embedding`` puts them among the words, ``inputs_embeds``; ``text`` reads these
and, of Qwen's line, the places of its tokens, ``position_ids`` ``[3, batch, seq]``, which the
runtime counts. It hands on one tensor of a width that the config says: features that early layers
of the text add (DeepStack) go the same way, behind the others in each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import InvalidGraph, Refusal
from ...ir.core.types import Dim
from ...ir.core.view import Node, Value, View
from ...ir.core.weights import MemoryWeight
from ...ir.rewrite.cleanup import clean
from ...ir.structure.asides import asides
from ...ir.structure.cache_slots import POSITIONS, SHIFT, STREAM, is_state, present_of
from ...ir.structure.cuts import COUNT_KEY
from ...ir.structure.pictured import read_places, read_squares
from ...ir.structure.recognize import recognize
from ...ir.structure.vision import find_image_tokens
from ...ir.vocab import END
from ...ir.vocab.builder import Builder

IDS, MASK, PIXELS, LOGITS = "input_ids", "attention_mask", "pixel_values", "logits"
FEATURES, GRID = "image_features", "image_grid_thw"
SIZE_CHECK = "image_size.check"
"""The weight that is read past its end where a picture has another size."""


@dataclass(frozen=True)
class Pictures:
    """The images of a graph of which all have one size."""

    rows: int
    """Rows of patches."""
    columns: int
    side: int
    """Pixels along a patch."""
    merge: int
    """Patches along the square that is one token."""
    frames: int
    """Times that a patch stands in its row: the library reads an image as a film of so many; 0 of
    a tower that takes the pixels of an image as they lie."""

    @property
    def height(self) -> int:
        return self.rows * self.side

    @property
    def width(self) -> int:
        return self.columns * self.side


def pictures_of(graph: View, config: Mapping[str, Any]) -> Pictures | None:
    """What a graph and the config of its source say of them; ``None`` of a model that takes
    others, or whose images' size is open."""
    grid, squares = read_places(graph.metadata()), read_squares(graph.metadata())
    if grid is not None and squares is not None:
        side, merge, frames = squares
        return Pictures(grid[0] * merge, grid[1] * merge, side, merge, frames)
    inputs = _inputs(graph)
    shape = (graph.type(inputs[PIXELS]).shape or ()) if PIXELS in inputs else ()
    vision = config.get("vision_config")
    patch = vision.get("patch_size") if isinstance(vision, dict) else None
    sizes = [*shape[2:], patch, config.get("spatial_merge_size", 1)]
    numbers = [size for size in sizes if isinstance(size, int) and size > 0]
    if len(numbers) != 4 or len(sizes) != 4:
        return None
    height, width, side, merge = numbers
    return Pictures(height // side, width // side, side, merge, 0)


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


def _inputs(view: View) -> dict[str, Value]:
    return dict(zip(view.input_names(), view.inputs(), strict=True))


def _ends(view: View, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> View:
    """Only what leads from these inputs to these outputs."""
    view.set_outputs(outputs)
    clean(view)
    for value in _inputs(view).values():
        if value not in inputs.values():
            _measure_others(view, value, [*inputs.values()])
    clean(view)
    view.set_inputs(inputs)
    return view


def _measure_others(view: View, left_out: Value, inputs: Sequence[Value]) -> None:
    """Take sizes of an input that leaves from one that has the same dimension."""
    dims: dict[Dim, tuple[Value, int]] = {
        dim: (value, axis) for value in reversed(inputs)
        for axis, dim in enumerate(view.type(value).shape or ()) if isinstance(dim, str)
    }  # fmt: skip
    shape = view.type(left_out).shape or ()
    for user, axis in _sizes(view, left_out):
        if shape[axis] in dims:
            value, other = dims[shape[axis]]
            _stand_for(view, user, Builder(view, user).size(value, dim=other))


def _sizes(view: View, value: Value) -> Iterator[tuple[Node, int]]:
    """Nodes that take the size of one axis, and which; ONNX's ``Shape`` of one among them."""
    rank = view.type(value).rank or 0
    for user in view.users(value):
        attrs = view.attrs(user)
        if view.op(user) == "size":
            yield user, attrs["dim"]
        elif view.native_op(user) == "Shape":
            axes = range(rank)[attrs.get("start") : attrs.get("end")]
            if len(axes) == 1:
                yield user, axes[0]


def _stand_for(view: View, node: Node, size: Value) -> None:
    """Let what reads a size read another one, as ``i64[1]`` where it is."""
    old = view.result(node)
    if view.type(old).rank:
        size = Builder(view, view.after(view.maker(size))).reshape(size, 1)
    view.replace(old, size)


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
    inputs = _inputs(view)
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
    sizes = {user for user, _ in _sizes(view, inputs[IDS])}
    if {*view.users(inputs[IDS])} - sizes:
        taken[IDS] = inputs[IDS]
    return _ends(view, {**taken, **caches}, outputs)


def _embedding(view: View, cut: _Cut) -> View:
    given = _stand_in(view, FEATURES, cut.rows, 1)
    for size, axis in [*_sizes(view, _inputs(view)[PIXELS])]:
        if not axis:  # how many images there are
            b = Builder(view, size)
            firsts = b.slice(given, 0, END, dim=0, step=cut.tokens)
            _stand_for(view, size, b.size(firsts, dim=0))
    stream = _joined(view, cut.streams, 2)
    return _ends(view, {IDS: _inputs(view)[IDS], FEATURES: given}, {STREAM: stream})


def _vision(view: View, cut: _Cut, pictures: Pictures, *, apart: bool) -> View:
    pixels = _inputs(view)[PIXELS]
    features = _named(view, cut.features) if apart else _joined(view, cut.rows, 1)
    if not pictures.frames:
        return _ends(view, {PIXELS: pixels}, {FEATURES: features})
    p, channels = pictures, (view.type(pixels).shape or ())[1]
    assert isinstance(channels, int)
    b = Builder(view, next(iter(view.nodes())))
    corners = b.slice(b.slice(pixels, 0, 1, dim=2), 0, 1, dim=3)
    likes = (
        b.reshape(
            b.concat(*[pixels] * p.frames, dim=1), -1, channels * p.frames * p.side * p.side
        ),
        b.cast(b.reshape(corners, -1, channels), dtype=torch.int64),
    )
    for like in likes:
        view.type(like)
    given, grid = (view.add_input(f"{name}.rows", like)
                   for name, like in zip((PIXELS, GRID), likes, strict=True))  # fmt: skip
    for like in likes:
        view.erase_dead(view.maker(like))
    b = Builder(view, next(iter(view.nodes())))
    size = MemoryWeight(torch.tensor([[1, p.rows, p.columns]]))
    off = b.sub(grid, view.add_weight(f"{SIZE_CHECK}.grid", size))
    other = b.clamp(b.sum(b.mul(off, off), dims=(0, 1), keepdim=False), max=1)
    nothing = MemoryWeight(torch.zeros(1, 1, dtype=view.type(pixels).dtype))
    zero = view.add_weight(SIZE_CHECK, nothing)
    checked = b.add(given, b.embedding(zero, b.reshape(other, 1)))
    squares = p.rows // p.merge, p.columns // p.merge, p.merge, p.merge
    split = b.reshape(checked, -1, *squares, channels, p.frames, p.side * p.side)
    first = b.slice(split, 0, 1, dim=6)
    corner = b.reshape(first, -1, *squares, channels, p.side, p.side)
    turned = b.transpose(corner, perm=(0, 5, 1, 3, 6, 2, 4, 7))
    view.replace(pixels, b.reshape(turned, -1, channels, p.height, p.width))
    return _ends(view, {PIXELS: given, GRID: grid}, {FEATURES: features})

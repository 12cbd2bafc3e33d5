"""Where a vision-language model's images enter its text: tower, CLS token, patches, projector.

Read off the graph: the language model's stream starts at a ``where`` that takes the tower's
features at the placeholders' positions and the words' embeddings elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..core.errors import Refusal
from ..core.types import Dim
from ..core.view import Node, Value, View, is_value
from ..vocab import traits
from .asides import PICKING, why_elsewhere
from .cuts import tokens_left
from .layers import Block, uncut
from .pictured import read_places, read_prompt
from .recognize import Attention, Linear, Structure
from .token_layout import NO_PATCH, Members, merged_patches, squares, token_layout

_SPREAD = ("unsqueeze", "expand", "cast")


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens in the text sequence of a vision-language model."""

    tower: tuple[Block, ...]
    """Blocks of the vision tower whose result the language model sees."""
    attention: Attention
    """In the last of them: the layer that makes the features."""
    cls_token: bool
    """Whether the tower's first token is not a patch and is cut off before the projector."""
    grid: tuple[int, int] | None
    """Rows and columns of the tokens of one picture; ``None`` where the graph does not tell."""
    patches: int
    """Tokens that one picture gives."""
    members: Members
    """For each of them, in the text's order, the tower's patches that it is made of; empty where
    each is one patch, and where the graph does not tell."""
    mixed: bool
    """Whether each is made of several patches."""
    pictures: int
    """Pictures that stand for one image: 1, or thumbnail and crops."""
    tokens: int
    """Tokens that one image enters the text as."""
    layout: tuple[int, ...]
    """For each token of an image its patch, numbered through the pictures, where they stand in
    another order than the tower's; -1 for what is none, as a newline. Empty where each is a patch
    in order, and where the graph does not tell."""
    projector: tuple[str, ...]
    """Names of the linears between tower and text."""
    features: Value
    """The projected features as they enter the text, ``[images, tokens, width]``, or
    ``[images x pictures, tokens / pictures, width]``."""
    images: Dim
    """How many images there are, as the graph's types say it."""
    merged: Value
    """The stream in which images and words are first together, ``[rows, seq, width]``."""
    placeholders: Value
    """Which positions of the prompt as given are image tokens: bool ``[rows, seq]``."""
    language: tuple[Block, ...]
    """Blocks of the language model."""
    block: int
    """Which of them the stream was asked about, at its entry."""
    kept: tuple[Value, ...]
    """Positions that earlier cuts of the stream kept, each i64 ``[rows, positions]``, in order."""
    count: int
    """Image tokens a row that are left where the stream was asked about."""

    def check_whole(self, reason: str) -> None:
        """Raise ``Refusal`` for the reason, of all patches, where a cut has taken some before."""
        if self.kept:
            raise Refusal(f"image tokens were pruned before already: {reason}")

    @property
    def newlines(self) -> int:
        """Tokens of an image that are no patch; 0 where a cut may have taken some before."""
        return 0 if self.kept else self.layout.count(NO_PATCH)

    def check_patches(self) -> None:
        """Raise ``Refusal`` where it is not known which token each patch is."""
        if sorted(self.layout)[self.newlines :] != [*range(self.patches * self.pictures)]:
            self.check_apart()

    def check_single(self) -> None:
        """Raise ``Refusal`` where a token is made of several patches: of rows of the tower."""
        if not self.mixed:
            return
        if not self.members:
            self.check_members()
        raise Refusal(
            f"each of an image's {self.tokens} tokens is {len(self.members[0])} patches of the "
            "vision tower's, put together behind it. `fopru`, `diverse` and `similarity` "
            "choose among the tokens"
        )

    def check_members(self) -> None:
        """Raise ``Refusal`` where a token is made of patches that the graph does not tell."""
        if self.mixed and not self.members:
            raise Refusal(
                f"each of an image's {self.tokens} tokens is made of several patches of the vision "
                "tower's, and the graph does not tell of which, so that no patch's score is a "
                "token's. `diverse` and `similarity` compare the tokens themselves; `fastv` scores "
                "them in the language model"
            )

    def check_apart(self) -> None:
        """Raise ``Refusal`` where tokens are not the tower's patches, picture by picture: what is
        known of a patch says nothing of a token then."""
        if self.tokens == self.patches * self.pictures:
            return
        raise Refusal(
            f"an image enters the text as {self.tokens} tokens, and the vision tower has "
            f"{self.patches} patches in each of {self.pictures} pictures: patches are merged, or "
            "newlines stand among them. `fastv`, `pyramid-drop` and `uniform-tokens` choose among "
            "the tokens themselves"
        )


@dataclass(frozen=True)
class Patches:
    """What a vision tower's stream is made of, in a model of images alone."""

    grid: tuple[int, int]
    """Rows and columns of patches in one picture."""
    cls_token: bool
    """Whether the stream has one token more, which is not a patch."""


def find_image_tokens(view: View, structure: Structure, layer: int = 0) -> ImageTokens:
    """The image tokens at the entry of the language model's block ``layer``.

    Raises ``Refusal`` where the model has no images, saying what was looked for.
    """
    if not structure.blocks:
        raise Refusal("no block is recognised, so there is no stream that image tokens could enter")
    last = structure.blocks[-1].tower
    language = tuple(b for b in structure.blocks if b.tower == last)
    towers = [b for b in structure.blocks if b.tower == last - 1]
    if not towers:
        if any(True for _ in _pictures(view)):
            raise Refusal("the model has no language model: its images are not put into a text")
        raise Refusal("the model has no vision tower: it takes no images")
    merged, kept = uncut(view, language[0].entry)
    for block in language[1 : layer + 1]:
        kept += uncut(view, block.entry)[1]
    where = view.producer(merged)
    if where is None or view.op(where) != "where":
        raise Refusal(why_elsewhere(view, [b.entry for b in structure.blocks if b.tower < last]))
    condition, picked = view.tensor(where, 0), view.tensor(where, 1)
    placeholders = _unspread(view, condition)
    whole = _given_back(view, towers[-1].exit)
    path = _between(view, whole, picked)
    if not path:
        raise Refusal("what enters the text does not come from the tower before it")
    features = _features(view, path, picked)
    cls_token = any(_cuts_first(view, node) for node in path)
    tokens, images = _static(view, features, 1), (view.type(features).shape or ("images",))[0]
    patches = _patch_count(view, whole) - cls_token
    site = next((s for s in structure.attentions if s.block == towers[-1].index), None)
    if site is None:
        raise Refusal("the vision tower's last layer has no attention")
    crops = _crops(view)
    mixed, grid = crops is None and tokens < patches, _grid(view, patches)
    members = merged_patches(view, path, whole, features, cls_token=cls_token) if mixed else ()
    if mixed:
        own = squares(members, grid) if grid and members else None
        grid, patches = own or read_places(view.metadata()), tokens
    pictures = max(1, tokens // patches) if crops is None else crops[1]
    if crops is not None and tokens <= patches and tokens != len(read_prompt(view.metadata())):
        # Exporters drop the reshape that joins an image's crops where another one follows it.
        images, tokens = crops[0], tokens * crops[1]
    layout = () if tokens == patches * pictures else token_layout(
        view, path, features, pictures, patches
    )  # fmt: skip
    return ImageTokens(
        tuple(towers), site, cls_token, grid, patches, members, mixed,
        pictures, tokens, layout, _names(structure.linears, set(path)), features, images,
        merged, placeholders, language, layer, kept, tokens_left(view, kept, tokens),
    )  # fmt: skip


def find_patches(view: View, structure: Structure) -> Patches:
    """The patches of the first tower. Raises ``Refusal`` where no convolution makes them."""
    if not structure.blocks:
        raise Refusal("no block is recognised, so there is no stream of patches")
    tokens = _static(view, structure.blocks[0].entry, 1)
    for extra in (0, 1):
        grid = _grid(view, tokens - extra)
        if grid is not None:
            return Patches(grid, bool(extra))
    raise Refusal(f"no convolution makes the {tokens} tokens of the stream")


def _given_back(view: View, value: Value) -> Value:
    """A tower's result with a row for each token, where fewer went through it."""
    for user in view.users(value):
        if view.op(user) == "token_select":
            return view.result(user)
    return value


def _unspread(view: View, value: Value) -> Value:
    node = view.producer(value)
    while node is not None and view.op(node) in _SPREAD:
        value = view.tensor(node)
        node = view.producer(value)
    if view.type(value).rank != 2:
        raise Refusal(f"the placeholders' mask is {view.type(value)}, [rows, seq] is needed")
    return value


def _between(view: View, start: Value, end: Value) -> list[Node]:
    """Nodes on the ways from ``start`` to ``end``, in graph order."""
    flow: set[Value] = {start}
    order: list[Node] = []
    for node in view.nodes():
        if any(value in flow for value in view.arguments(node)):
            order.append(node)
            flow.update(view.results(node))
    needed: set[Value] = {end}
    path: list[Node] = []
    for node in reversed(order):
        if needed.intersection(view.results(node)):
            path.append(node)
            needed.update(value for value in view.arguments(node) if value in flow)
    return path[::-1]


def _features(view: View, path: Iterable[Node], picked: Value) -> Value:
    """The last ``[rows, tokens, width]`` with a fixed number of tokens before one is picked."""
    features = None
    for node in path:
        if traits(view.op(node)).picks or view.native_op(node) in PICKING:
            break
        shape = view.type(view.results(node)[0]).shape
        if shape is not None and len(shape) == 3 and isinstance(shape[1], int):
            features = view.results(node)[0]
    if features is None:
        raise Refusal(f"nothing picks image features by position before {view.name(picked)}")
    return features


def _crops(view: View) -> tuple[Dim, int] | None:
    """Images and crops of each, where an input is ``[images, crops, channels, height, width]``."""
    for value in view.inputs():
        kind = view.type(value)
        if kind.shape is None or kind.rank != 5 or kind.dtype is None:
            continue
        images, crops, *_ = kind.shape
        if kind.dtype.is_floating_point and isinstance(crops, int):
            return images, crops
    return None


def _cuts_first(view: View, node: Node) -> bool:
    if view.op(node) != "slice":
        return False
    value, start, _ = view.operands(node)
    # Of crops, the first is the whole image.
    of_tokens = is_value(value) and view.type(value).rank == 3
    return of_tokens and view.number(start) == 1 and view.attrs(node)["dim"] == 1


def _static(view: View, value: Value, axis: int) -> int:
    shape = view.type(value).shape
    size = shape[axis] if shape is not None and len(shape) > axis else None
    if not isinstance(size, int):
        raise Refusal(f"{view.name(value)} has no fixed number of image tokens")
    return size


def _patch_count(view: View, whole: Value) -> int:
    """Tokens of a tower's result, ``[images, tokens, width]`` or, as SAM's, ``[images, rows,
    columns, width]``."""
    axes = (1, 2) if view.type(whole).rank == 4 else (1,)
    return math.prod(_static(view, whole, axis) for axis in axes)


def _grid(view: View, patches: int) -> tuple[int, int] | None:
    for rows, columns in _pictures(view):
        if isinstance(rows, int) and isinstance(columns, int) and rows * columns == patches:
            return rows, columns
    return None


def _pictures(view: View) -> Iterator[tuple[Dim, ...]]:
    """Rows and columns of what each convolution over pictures gives."""
    for node in view.nodes():
        if view.op(node) != "conv":
            continue
        shape = view.type(view.result(node)).shape
        if shape is not None and len(shape) == 4:
            yield shape[2:]


def _names(linears: Iterable[Linear], members: set[Node]) -> tuple[str, ...]:
    return tuple(linear.name for linear in linears if linear.node in members)

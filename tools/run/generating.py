"""Text from a model or an artifact: prompts and images in, words out as they come."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...backends.generation.decode import Decoder
from ...backends.generation.sampling import Sampling
from ...backends.generation.speculate import Speculation
from ...backends.onnx.model_files import MANIFEST_FILE
from ...ir.core.errors import BadInput
from ...ir.core.view import View
from ...ir.load.hf.chat_template import Message
from ...ir.load.side_files import end_tokens, longest_text
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer
from ...ir.run.batches import check_ids, table_rows
from ...ir.structure.cache_slots import has_cache
from ...ir.structure.cuts import COUNT_KEY
from ...ir.structure.tree_input import TREE_KEY
from ..data.images import Placeholders, Preprocessing
from . import drafting
from .prompts import Prompt, as_prompts, check_writes, prompt_text

Image = str | Path | torch.Tensor
"""A file, or pixels that are preprocessed already: ``[3, height, width]``, or crops of that."""
Stream = Callable[[int, str], None]
"""Called with the number of a prompt and the text that was added to its answer."""

MAX_NEW_TOKENS = 64
_UNFINISHED = "\ufffd"
"""What a tokenizer makes of bytes that are not yet a character."""


@dataclass
class Speed:
    """Tokens and seconds of a run over all its prompts: what was read up to the first new token,
    and what was written behind it, one step a row at a time."""

    read: int
    read_seconds: float = 0.0
    written: int = 0
    written_seconds: float = 0.0

    def __str__(self) -> str:
        parts = (("reading", self.read, self.read_seconds),
                 ("writing", self.written, self.written_seconds))  # fmt: skip
        return ", ".join(f"{what} {n / s:.1f} tokens/s" for what, n, s in parts if n and s)


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt."""

    text: str
    ids: tuple[int, ...]
    """The new tokens, the one that ended the text among them."""
    prompt_tokens: int
    """Tokens of the prompt, placeholders of its image among them."""
    ended: str
    """``eos``, ``length`` (``max_new_tokens``), or ``context``, which is then full."""
    speed: Speed = field(compare=False, repr=False)
    """Of the run that this answer was written in, with all its other prompts."""

    drafting: Speculation | None = field(default=None, compare=False, repr=False)
    """What drafting came to, where something drafted."""

    def __str__(self) -> str:
        return self.text


def generate(
    model: View | Executable | str | Path,
    prompts: str | Sequence[Prompt] | Sequence[Message],
    *,
    images: Image | Sequence[Image | None] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stream: Stream | None = None,
    tokenizer: str | Path | None = None,
    device: str = "cpu",
    draft: str = "none",
    chat: bool = False,
) -> list[Generated]:
    """Continue prompts; one answer for each.

    With ``chat`` a prompt is what a user says, or a list of messages (``role`` and ``content``),
    and the model's chat template is put around it; the messages of one chat need no list around
    them.

    ``model`` is an artifact's folder, an ``.onnx`` file, a graph, a compiled executable (with the
    folder of its ``tokenizer``), or the name of a model, which is then loaded with its cache.
    ``images`` are one a prompt, ``None`` for a prompt without; in the prompt an image stands where
    the tokenizer's image token does, else before the text. An image of another size is resized as
    the model's ``preprocessor_config.json`` says. ``temperature``, ``top_p``, ``top_k`` and
    ``seed``: see ``Sampling``. ``stream`` hears the answers as they grow. ``draft`` is ``path``, or
    the name of a path of the artifact, which writes ahead and which the whole model then checks in
    one call, or ``recycle``: what the model said before may come next, and it reads a tree of that
    in one call (of an artifact made with the pass ``tree-mask``). ``auto`` does so where it is
    measured to be faster, ``none`` never. The text is that of the whole model either way
    (``backends.generation.speculate``).

    Raises ``BadInput`` for a graph that is not a text model, for a prompt that is empty or no text,
    for one that is longer than the context and for an image that the model does not take,
    ``Missing`` without a tokenizer, its package, a chat template, a file or Pillow. Warns where the
    graph has no key-value cache.
    """
    writer = Writer(model, tokenizer=tokenizer, device=device, draft=draft, chat=chat)
    if writer.note:
        warnings.warn(writer.note, stacklevel=2)
    asked = as_prompts(prompts)
    shown = [images] if isinstance(images, str | Path | torch.Tensor) else images
    sampling = Sampling(temperature, top_p, seed, top_k)
    return writer.write(asked, shown, sampling, max_new_tokens=max_new_tokens, stream=stream)


class Writer:
    """A model with its tokenizer, ready to continue prompts; ``note`` says what makes it slow."""

    def __init__(
        self, model: View | Executable | str | Path, *, tokenizer: str | Path | None = None,
        device: str = "cpu", draft: str = "none", chat: bool = False,
    ) -> None:  # fmt: skip
        drafting.chosen_path(model, draft)  # which refuses before anything is loaded
        graph, run = _opened(model, device, trees=draft == drafting.RECYCLE)
        words = None if graph is None else table_rows(graph).get("input_ids")
        self._drafting = drafting.drafting(model, run, draft, device, words)
        folder = tokenizer or (None if graph is None else graph.source.folder)
        if folder is None:
            raise BadInput("give tokenizer=FOLDER: the model's folder is not known")
        self._folder, self._chat = Path(folder), chat
        self._graph = graph
        self._vocabulary = words
        self._decoder = Decoder(run, longest_text(folder))
        if graph is not None and not self._decoder.cached:
            check_writes(graph, run, self._folder)
        self._tokenizer: Any = read_tokenizer(self._folder)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._eos = end_tokens(folder)
        self.note = "" if self._decoder.cached else (
            "the graph has no key-value cache, so every step reads the whole text again; make the "
            "artifact with --cache (cache=True in Python)"
        )  # fmt: skip

    def write(
        self, prompts: Sequence[Prompt], images: Sequence[Image | None] | None,
        sampling: Sampling, *, max_new_tokens: int = MAX_NEW_TOKENS, stream: Stream | None = None,
    ) -> list[Generated]:  # fmt: skip
        """See ``generate``."""
        shown = list(images) if images is not None else [None] * len(prompts)
        if len(shown) != len(prompts):
            raise BadInput(f"{len(shown)} images for {len(prompts)} prompts: give one for each")
        self._check_images(shown)
        pairs = zip(prompts, shown, strict=True)
        asked = [self._tokens(prompt, image is not None) for prompt, image in pairs]
        pixels = [None if image is None else self._pixels(image) for image in shown]
        rows = [_Row(self._tokenizer, self._eos) for _ in prompts]
        speculator = None if self._drafting is None else self._drafting.speculator
        if speculator is not None and len(prompts) > 1:
            raise BadInput(f"a draft is for one prompt at a time, and {len(prompts)} are given")
        steps = self._decoder.decode(
            asked, max_new_tokens=max_new_tokens, sampling=sampling, eos=self._eos, images=pixels,
            speculator=speculator,
        )  # fmt: skip
        speed = Speed(sum(map(len, asked)))
        for step in _timed(steps, speed):
            for index, token in enumerate(step):
                added = "" if token is None else rows[index].add(token)
                if added and stream is not None:
                    stream(index, added)
        if self._drafting is not None:
            self._drafting.keep_costs()
        for index, row in enumerate(rows):
            added = row.finish()
            if added and stream is not None:
                stream(index, added)
        return [
            Generated(
                row.text, tuple(row.ids), len(ids), row.ended(max_new_tokens), speed,
                None if speculator is None else speculator.done,
            )
            for row, ids in zip(rows, asked, strict=True)
        ]  # fmt: skip

    def _check_images(self, shown: Sequence[Image | None]) -> None:
        """Refuse prompts without an image of which a pruned graph would drop text: as many tokens
        leave every row of a batch, and those of no row where it has a cache and no image at all."""
        pruned = self._graph is not None and COUNT_KEY in self._graph.metadata()
        lacking = [number for number, image in enumerate(shown, 1) if image is None]
        alone = self._decoder.cached and len(lacking) == len(shown)
        if not pruned or not lacking or alone:
            return
        advice = "ask those without an image apart" if self._decoder.cached else (
            "make the artifact with --cache, which takes prompts of text alone too"
        )
        raise BadInput(
            f"prompt {lacking[0]} has no image, and of this model image tokens were pruned: as "
            f"many tokens leave every prompt. Give each an image, or {advice}"
        )

    def _tokens(self, prompt: Prompt, has_image: bool) -> list[int]:
        if self._chat and self._decoder.takes_images:
            raise BadInput("chat is for models of text alone: write this one's prompt out")
        text = prompt_text(prompt, self._folder if self._chat else None)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not self._chat).ids
        if ids and self._vocabulary is not None:
            check_ids(f"the prompt {prompt!r}", torch.tensor(ids), self._vocabulary)
        if not self._decoder.takes_images:
            if has_image:
                raise BadInput("an image is given, and the model reads text only")
            return ids
        places = Placeholders.of(self._described())
        if has_image:
            return places.expand(ids)
        if places.token in ids:
            raise BadInput(f"the prompt {prompt!r} names an image, and none is given")
        return ids

    def _pixels(self, image: Image) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image
        return Preprocessing.of(self._described()).read(Path(image).expanduser())

    def _described(self) -> View:
        """The graph, by which prompts and images are prepared."""
        if self._graph is None:
            raise BadInput(
                "an executable does not say how images are prepared: give the artifact's folder or "
                "the graph"
            )
        return self._graph


def _timed(
    steps: Iterator[list[int | None]], speed: Speed
) -> Iterator[list[int | None]]:
    """The steps; ``speed`` learns how long each took, without what their reader does with it."""
    began = time.perf_counter()
    for number, step in enumerate(steps):
        seconds = time.perf_counter() - began
        if number == 0:
            speed.read_seconds = seconds
        else:
            speed.written += sum(token is not None for token in step)
            speed.written_seconds += seconds
        yield step
        began = time.perf_counter()


class _Row:
    """One answer in the making."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._tokenizer, self._eos = tokenizer, eos
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> str:
        """Take a token; the text that it completes, which may be none yet."""
        self.ids.append(token)
        return self._grow(self._decoded(), held=True)

    def finish(self) -> str:
        """The text that was held back."""
        return self._grow(self._decoded(), held=False)

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode([i for i in self.ids if i not in self._eos])
        return text

    def _grow(self, whole: str, *, held: bool) -> str:
        # A tokenizer may yet change the end of a text, at bytes and at spaces.
        if held and (whole.endswith(_UNFINISHED) or not whole.startswith(self.text)):
            return ""
        added = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text = whole
        return added

    def ended(self, max_new_tokens: int) -> str:
        if self.ids[-1] in self._eos:
            return "eos"
        return "length" if len(self.ids) == max_new_tokens else "context"


def _opened(
    model: View | Executable | str | Path, device: str, *, trees: bool
) -> tuple[View | None, Executable]:
    """The graph, where there is one, and what runs it; with ``trees``, one that takes trees too,
    but of an artifact, which is run as it was written."""
    if isinstance(model, View):
        return model, compile_model(_taking(model) if trees else model, device=device)
    if not isinstance(model, str | Path):
        return None, model
    path = Path(model).expanduser()
    if (path / MANIFEST_FILE).is_file() or path.suffix == ".onnx":
        return load(path), compile_model(path, device=device)
    view = load(model, cache=path.suffix != ".pt2")
    return view, compile_model(_taking(view) if trees else view, device=device)


def _taking(view: View) -> View:
    """The graph with the mark of ``tree_mask``."""
    if not has_cache(view):
        return view
    marked = view.copy()
    marked.metadata()[TREE_KEY] = "true"
    return marked

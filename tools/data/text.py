"""Text as calibration data: windows of tokens by the tokenizer that lies beside the model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...ir.core.errors import BadInput, Missing
from ...ir.core.view import View
from ...ir.load.side_files import longest_text, padding_token
from ...ir.load.zoo.text import read_tokenizer
from .table_lines import SEPARATORS, table_lines
from .text_lines import Text, read_content, sample_of, text_of

LENGTH = 512
"""Tokens in a window of text, unless the model takes fewer: 128 windows of it are 65,536 tokens,
more than the widest linear of today's models has inputs."""
BATCH = 8
POOL = 16
"""Texts, and windows, that are looked at for each one that is used."""
BEGINNINGS, JOINED = "beginnings", "joined"
WINDOWS = (BEGINNINGS, JOINED)
"""How texts become windows: each text cut from its beginning on, or all of them as one, each behind
the other, as GPTQ's own code does."""
PROMPTS_FILE = "prompts.jsonl"

Tensors = dict[str, torch.Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class CalibrationRequest:
    """A graph and how much data of it is asked for."""

    view: View
    spec: str
    samples: int
    length: int | None
    choose: Callable[[Sequence[str], int], list[int]] | None = None
    """Which of many windows are used, by their text, and at most so many; ``None``: the first."""
    windows: str = BEGINNINGS
    """One of ``WINDOWS``."""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        return self.view.input_names()

    def takes(self, name: str) -> bool:
        return name in self.inputs

    def fixed(self, name: str, dim: int) -> int | None:
        """A dimension of an input, where the graph fixes it."""
        shape = self.view.type(self.view.inputs()[self.inputs.index(name)]).shape
        size = None if shape is None or len(shape) <= dim else shape[dim]
        return size if isinstance(size, int) else None

    def chunks(self, items: list[Item], name: str) -> list[list[Item]]:
        """Parts of the batch size that this input wants; a shorter last one where it wants none.

        Raises ``BadInput`` where there are too few for one batch.
        """
        fixed = self.fixed(name, 0)
        size = fixed or BATCH
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        if fixed is None:
            return parts
        whole = [part for part in parts if len(part) == size]
        if not whole:
            raise BadInput(
                f"{self.spec}: {len(items)} samples, and the graph takes exactly {size} at a time"
            )
        return whole

    def fit(self, tensors: Tensors) -> Tensors:
        """The inputs that the graph takes, in its dtypes, so far as data has none of its own."""
        types = dict(zip(self.inputs, map(self.view.type, self.view.inputs()), strict=True))
        return {n: t.to(types[n].dtype or t.dtype) for n, t in tensors.items() if n in types}

    def refuse(self, content: str, advice: str) -> BadInput:
        return BadInput(
            f"{self.spec}: {content}, and {self.view.source.name or 'the graph'} takes "
            f"{', '.join(self.inputs)}: {advice}"
        )


def read_texts(
    path: Path, folder: str | Path | None = None, suffixes: Sequence[str] = (".jsonl",)
) -> list[str]:
    """The texts of a file: of JSON lines, which ``suffixes`` tell, the text of each as
    ``text_lines`` has it, else the whole as one.

    ``folder`` has the chat template that messages are read by. Raises ``BadInput`` where there is
    no text, and for a file that is not UTF-8 or whose lines are something else, ``Missing`` for
    messages without a template.
    """
    if path.suffix.lower() in suffixes:
        lines = read_lines(path, ())
        texts = [_whole(text_of(line, f"{path}, line {number}", folder))
                 for number, line in enumerate(lines, 1)]  # fmt: skip
    else:
        texts = [read_content(path)]
    if not any(text.strip() for text in texts):
        raise BadInput(f"{path}: empty: it holds no text")
    return [text for text in texts if text.strip()]


def read_samples(path: Path, folder: str | Path | None = None) -> list[Text]:
    """As ``read_texts``, with both texts of a line that holds a pair; of .csv and .tsv too, whose
    first line names the columns."""
    if path.suffix.lower() == ".jsonl":
        lines: Sequence[Mapping[str, Any]] = read_lines(path, ())
    elif path.suffix.lower() in SEPARATORS:
        lines = table_lines(path)
    else:
        return list(read_texts(path, folder))
    held = [sample_of(line, f"{path}, line {n}", folder) for n, line in enumerate(lines, 1)]
    samples = [_whole(s) if isinstance(s, str) else (_whole(s[0]), _whole(s[1])) for s in held]
    samples = [s for s in samples if (s if isinstance(s, str) else "".join(s)).strip()]
    if not samples:
        raise BadInput(f"{path}: empty: it holds no text")
    return samples


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; each must hold these keys as strings.

    Lines end with a line feed alone: U+2028 and its like may stand in a string. A byte order mark
    may start any of them, as where files were put together. Half a surrogate
    pair, which ``\\ud83d`` in JSON can write and no encoding has, becomes U+FFFD.
    """
    entries = []
    for number, line in enumerate(read_content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise BadInput(
                f"{path}, line {number}: is {_KINDS.get(type(entry), 'a number')}, and each line "
                'of the file is an object of its own, as {"text": "..."}'
            )
        lacking = [key for key in keys if not isinstance(entry.get(key), str)]
        if lacking:
            found = ", ".join(map(str, list(entry)[:6])) or "no key"
            raise BadInput(f"{path}, line {number}: has no string `{lacking[0]}`; it has {found}")
        entries.append(entry | {key: _whole(entry[key]) for key in keys})
    return entries


_KINDS: Mapping[type, str] = {list: "a list", str: "a string", type(None): "null"}


def _whole(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair that stands alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_windows(name: str) -> None:
    """Raise ``BadInput`` for what is none of ``WINDOWS``."""
    if name not in WINDOWS:
        raise BadInput(f"--calib-windows {name}: there are {' and '.join(WINDOWS)}")


@dataclass(frozen=True)
class Batches:
    """What data became."""

    batches: list[Tensors]
    length: int | None = None
    """Tokens that windows of text were cut to; ``None`` where there are none."""
    pairs: int = 0
    """How many of the samples are two texts that the model reads as a pair."""


def text_batches(
    request: CalibrationRequest, texts: Sequence[Text], folder: Path | None = None
) -> Batches:
    """Batches of windows of the texts; ``folder`` has a tokenizer for a model that has none.

    Two texts of a line are one sample of a model that gives classes of what it reads, or where in
    it an answer is: joined as the tokenizer joins a pair, each with its type. Other models, which
    read a text at a time, take them as two.
    """
    if request.takes("pixel_values"):
        raise request.refuse("text alone", f"give a folder of images with {PROMPTS_FILE}")
    if not request.takes("input_ids"):
        raise request.refuse("text", "give its inputs as .npz or .safetensors")
    length = _window(request)
    if not reads_pairs(request.view):
        texts = [one for text in texts for one in ((text,) if isinstance(text, str) else text)]
    tokenizer = tokenizer_of(request, folder)
    rows = _windows(tokenizer, texts, length, request)
    pad = padding_token(request.view.source.folder, tokenizer)
    batches = [request.fit(_right_padded(part, pad)) for part in _batched(request, rows)]
    return Batches(batches, length, sum(row.pair for row in rows))


def reads_pairs(view: View) -> bool:
    """Whether a model says something of the whole that it reads, or where an answer is in it."""
    kinds = dict(zip(view.output_names(), map(view.type, view.outputs()), strict=True))
    if {"start_logits", "end_logits"} <= set(kinds):
        return True
    return "logits" in kinds and kinds["logits"].rank == 2


@dataclass(frozen=True)
class _Window:
    """Tokens, their types, and what gives their text."""

    ids: list[int]
    types: list[int]
    text: Callable[[], str]
    pair: bool = False


def _window(request: CalibrationRequest) -> int:
    longest = longest_text(request.view.source.folder)
    fixed = request.fixed("input_ids", 1)
    if request.length is not None:
        for limit in (fixed, longest):
            if limit is not None and request.length > limit:
                raise BadInput(
                    f"--calib-length {request.length} is more than the {limit} tokens that "
                    f"{request.view.source.name} takes"
                )
    return fixed or request.length or min(LENGTH, longest or LENGTH)


def _windows(
    tokenizer: Any, texts: Sequence[Text], length: int, request: CalibrationRequest
) -> list[_Window]:
    """Windows of up to ``length`` tokens.

    Those of one token tell nothing and are left out; so are, where the graph fixes the length,
    those that are shorter.
    """
    least = request.fixed("input_ids", 1) or 2
    cut = _joined if request.windows == JOINED else _by_text
    windows = [window for window in cut(tokenizer, texts, length, request)
               if len(window.ids) >= least]  # fmt: skip
    if not windows:
        raise BadInput(f"{request.spec}: empty: it holds no text of {least} tokens")
    if request.choose is not None:
        windows = windows[: request.samples * POOL]
        shown = [window.text() for window in windows]
        windows = [windows[i] for i in request.choose(shown, request.samples)]
    return windows[: request.samples]


def _by_text(
    tokenizer: Any, texts: Sequence[Text], length: int, request: CalibrationRequest
) -> list[_Window]:
    """The first window of every text, then the second of each, ...; of a pair one, of both."""
    tokenizer.enable_truncation(length)
    parts = []
    for text in texts[: request.samples * POOL]:
        if not isinstance(text, str):
            row = tokenizer.encode(*cut_pair(tokenizer, text, length))
            parts.append([_Window(row.ids, row.type_ids, partial(" ".join, text), pair=True)])
            continue
        encoded = tokenizer.encode(text)
        parts.append([_Window(part.ids, part.type_ids, partial(_text_of, part, text))
                      for part in (encoded, *encoded.overflowing)])  # fmt: skip
    turns = itertools.chain.from_iterable(itertools.zip_longest(*parts))
    return [window for window in turns if window is not None]


def cut_pair(tokenizer: Any, pair: tuple[str, str], length: int) -> tuple[str, str]:
    """Two long texts without what is far behind the ``length`` tokens that are kept of both, the
    longer still the longer one; the tokenizer cuts at ``length`` afterwards.

    It would otherwise join what it cuts off of the one with all that it cuts off of the other: of
    two texts of 4000 tokens 16,767 windows, 1.2 GB.
    """
    if min(map(len, pair)) <= 4 * length:
        return pair
    tokenizer.no_truncation()
    rows = [tokenizer.encode(text) for text in pair]
    tokenizer.enable_truncation(length)
    longer = len(rows[0].ids) > len(rows[1].ids)
    most = (3 * length, 2 * length) if longer else (2 * length, 3 * length)
    first, second = (
        text[: row.offsets[limit][0]] if len(row.ids) > limit + 1 else text
        for text, row, limit in zip(pair, rows, most, strict=True)
    )
    return first, second


def _text_of(window: Any, text: str) -> str:
    """What a window holds of a text: special tokens have no place in it."""
    places = [(start, end) for start, end in window.offsets if end > start]
    return text[places[0][0] : places[-1][1]] if places else ""


def _joined(
    tokenizer: Any, texts: Sequence[Text], length: int, request: CalibrationRequest
) -> list[_Window]:
    """Windows of the tokens of all texts, one behind the other.

    Raises ``BadInput`` where each text ends in a token of the tokenizer's: such a model reads whole
    texts, and makes of the first or the last token what it says of one.
    """
    if not all(isinstance(text, str) for text in texts):
        raise BadInput(
            f"--calib-windows {JOINED}: {request.spec} holds pairs of texts, and "
            f"{request.view.source.name} reads each pair by itself: take {BEGINNINGS}"
        )
    if tokenizer.encode("a").special_tokens_mask[-1:] == [1]:
        raise BadInput(
            f"--calib-windows {JOINED}: {request.view.source.name} reads a text between tokens of "
            f"its own, which windows of joined texts would not begin and end with: take "
            f"{BEGINNINGS}"
        )
    needed = request.samples * (POOL if request.choose is not None else 1) * length
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text).ids
        if len(ids) >= needed:
            break
    rows = (ids[start : start + length] for start in range(0, len(ids), length))
    return [_Window(row, [0] * len(row), partial(tokenizer.decode, row)) for row in rows]


def _size(window: _Window) -> int:
    return len(window.ids)


def _batched(request: CalibrationRequest, rows: list[_Window]) -> list[list[_Window]]:
    """Rows of like length together, longest first; of one length, where no mask can tell."""
    rows = sorted(rows, key=_size, reverse=True)
    if request.takes("attention_mask"):
        return request.chunks(rows, "input_ids")
    groups = [list(group) for _, group in itertools.groupby(rows, key=_size)]
    return [part for group in groups for part in request.chunks(group, "input_ids")]


def _right_padded(rows: Sequence[_Window], pad: int) -> Tensors:
    """Rows padded on the right: no position id of a real token moves."""
    ids = torch.full((len(rows), max(map(_size, rows))), pad)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        types[i, : len(row.ids)] = torch.tensor(row.types)
        mask[i, : len(row.ids)] = 1
    return {**text_inputs(ids, mask), "token_type_ids": types}


def left_padded(rows: Sequence[Sequence[int]], image_token: int) -> Tensors:
    """Prompts padded before their start, so that the last token of each is the prompt's."""
    longest = max(map(len, rows))
    pad = 0 if image_token else 1  # a placeholder among the padding would be given a feature
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return text_inputs(ids, mask)


def text_inputs(ids: torch.Tensor, mask: torch.Tensor) -> Tensors:
    """All that text models are known to take besides a cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": torch.zeros_like(ids),
    }


def tokenizer_of(request: CalibrationRequest, folder: Path | None = None) -> Any:
    """The model's own tokenizer, else that of ``folder``."""
    own = request.view.source.folder
    for place in (Path(own) if own else None, folder):
        if place is not None and (place / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(place)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
    raise Missing(
        f"{request.spec}: text needs the model's tokenizer.json, and there is none "
        + (f"in {own}: put it there" if own else "with the model")
        + ", or give input_ids as .npz or .safetensors"
    )

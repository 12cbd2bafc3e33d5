"""``--calib DATA``: batches for the passes that learn from data, out of files, folders or the zoo.

Text becomes windows of tokens by the tokenizer that lies beside the model; images become pixels by
its preprocessor's settings. The graph's own inputs say what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ...ir.core.errors import BadInput, Missing, near_misses
from ...ir.core.view import View
from ...ir.load.zoo import ZOO, details, scenes, videos
from ...ir.load.zoo.text import shipped_text
from ...ir.load.zoo.tiny_llama import verifying_texts
from ...ir.run.batches import batches_sha256, check_batches, count_samples, count_tokens
from ..report.manifest import CalibrationEntry
from . import text_lines
from .arrays import equally_many, read_rows
from .images import SUFFIXES, Placeholders, Preprocessing
from .selecting import Selection, nearest
from .table_lines import SEPARATORS
from .text import (
    BATCH,
    BEGINNINGS,
    PROMPTS_FILE,
    Batches,
    CalibrationRequest,
    Tensors,
    check_windows,
    left_padded,
    read_lines,
    read_samples,
    text_batches,
    tokenizer_of,
)

FORMS = (
    f"FILE.txt, FILE.jsonl with {text_lines.FORM}, FILE.csv or FILE.tsv with a column of them, "
    "two texts of a pair by their names in GLUE (`sentence1` and `sentence2`, `text` and "
    "`text_pair`), FILE.npz or FILE.safetensors with the graph's inputs, a folder of images (with "
    "prompts.jsonl for a model that reads text too), or zoo:NAME"
)
SAMPLES = 128
"""Windows of text, images or questions, unless a person says otherwise."""
SEED = 1
"""Of drawn images and questions: those that runs are verified on have the seed 0."""
ASKED: Mapping[str, Callable[[int], list[scenes.Question]]] = {
    "tiny-llava": lambda count: scenes.questions("calibration", count, SEED),
    "tiny-llava-details": lambda count: details.questions("calibration", count, SEED),
    "tiny-llava-next": lambda count: scenes.questions("calibration", count, SEED, scenes.LARGE),
    "tiny-video": lambda count: videos.questions("calibration", count, SEED),
}
"""So many questions that a model of this name is asked."""
MORE_WORDS = {"tiny-llava-details": (details.WORD,), "tiny-video": videos.WORDS}
"""What questions of these models need beside the words of the others."""


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs by name, and the words by which they were asked for."""

    name: str
    batches: list[Tensors]
    length: int | None = None
    """Tokens that windows of text were cut to; ``None`` where there are none."""
    select: str = ""
    """How samples were chosen: see ``selecting``; empty for the first ones."""
    windows: str = BEGINNINGS
    """How texts were cut: see ``text.WINDOWS``."""
    pairs: int = 0
    """Samples that are two texts, read as a pair."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the batches."""
        return batches_sha256(self.batches)

    def entry(self) -> CalibrationEntry:
        """As it stands in the manifest."""
        entry = CalibrationEntry(
            name=self.name,
            sha256=self.sha256,
            samples=count_samples(self.batches),
            tokens=count_tokens(self.batches),
            length=self.length,
            select=self.select,
            windows="" if self.windows == BEGINNINGS else self.windows,
        )
        if self.pairs:  # a field that was set is written
            entry.pairs = self.pairs
        return entry


def read(
    spec: str, view: View, *, samples: int | None = None, length: int | None = None,
    select: str = "", windows: str = BEGINNINGS,
) -> Calibration:  # fmt: skip
    """Calibration data for a graph as it was loaded; ``FORMS`` says what ``spec`` may be.

    ``samples`` bounds the windows of text, images, questions or rows that are used (``SAMPLES``),
    ``length`` the tokens of a window (``LENGTH``, or what the model takes), ``select`` which of
    them, as far as no model is asked (``selecting``), ``windows`` how texts are cut
    (``text.WINDOWS``). Raises ``Missing`` for a file that is not
    there, ``BadInput`` for data that is empty, damaged, of the wrong kind, or does not fit the
    graph's inputs.
    """
    if not spec:
        raise BadInput(f"--calib is empty; it takes {FORMS}")
    for option, value in (("--calib-samples", samples), ("--calib-length", length)):
        if value is not None and value < 1:
            raise BadInput(f"{option} {value} must be above 0")
    task = Selection(select).task(view.source.folder)
    choose = partial(nearest, task=task) if task else None
    check_windows(windows)
    request = CalibrationRequest(view, spec, samples or SAMPLES, length, choose, windows)
    held = _read(request)
    if task and held.length is None:
        raise BadInput(f"--calib-select {select} is for text, and {spec} is none")
    if windows != BEGINNINGS and held.length is None:
        raise BadInput(f"--calib-windows {windows} is for text, and {spec} is none")
    check_batches(view, held.batches, spec)
    return Calibration(spec, held.batches, held.length, select, windows, held.pairs)


def _read(request: CalibrationRequest) -> Batches:
    if request.spec.startswith("zoo:"):
        return _from_zoo(request)
    path = Path(request.spec).expanduser()
    if path.is_dir():
        return Batches(_from_folder(request, path))
    if not path.is_file():
        raise Missing(f"{request.spec}: no such file or folder; --calib takes {FORMS}")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".safetensors"):
        return Batches(_rows(request, path))
    if suffix in (".txt", ".jsonl", *SEPARATORS):
        return text_batches(request, read_samples(path, request.view.source.folder))
    kind = "an image" if suffix in SUFFIXES else "not a kind of data that is read"
    raise BadInput(f"{request.spec}: {kind}; --calib takes {FORMS}")


# --- the graph's own inputs ----------------------------------------------------------------------


def _rows(request: CalibrationRequest, path: Path) -> list[Tensors]:
    """Arrays of many samples as batches: cut along the first dimension, which all share; a state
    ``[layers, batch, width]`` where the graph has that dimension.

    What the graph takes once, a rate or a state of fixed shape, goes into each batch as it is.
    """
    most = max([request.samples, *(request.fixed(name, 0) or 1 for name in request.inputs)])
    held = read_rows(path, most)
    if not held:
        raise BadInput(f"{request.spec}: empty: it holds no array")
    unknown = [name for name in held if not request.takes(name)]
    if unknown:
        hint = near_misses(unknown[0], request.inputs)
        raise request.refuse(f"it holds {unknown[0]}", hint or "give these")
    once = {n: rows.tensor for n, rows in held.items() if _is_taken_once(request, n, rows.shape)}
    if len(once) < len(held):
        held = {name: rows for name, rows in held.items() if name not in once}
    axes = dict(sorted(_sample_axes(request, held).items(), key=lambda item: item[1]))
    held = {name: held[name].along(axis) for name, axis in axes.items()}
    total = equally_many(held)
    if total is None:
        listed = ", ".join(f"{name} {list(rows.shape)}" for name, rows in held.items())
        raise BadInput(f"{request.spec}: the arrays do not hold equally many samples: {listed}")
    size = next((s for n in held if (s := request.fixed(n, axes[n]))), None)
    if size is not None and total % size:
        raise BadInput(
            f"{request.spec}: {total} samples, and the graph takes exactly {size} at a time"
        )
    total = min(total, max(size or 1, request.samples))
    size = size or BATCH
    starts = range(0, total, size)
    cut = (
        {n: h.tensor[i : min(i + size, total)].movedim(0, axes[n]).contiguous()
         for n, h in held.items()} for i in starts
    )  # fmt: skip
    return [batch | once for batch in cut]


def _sample_axes(request: CalibrationRequest, names: Iterable[str]) -> dict[str, int]:
    """Which dimension of each input counts samples: the first, unless the graph says by its name
    that another one is as long as the first of the other inputs."""
    values = dict(zip(request.inputs, request.view.inputs(), strict=True))
    shapes = {name: request.view.type(values[name]).shape or () for name in names}
    firsts = [shape[0] for shape in shapes.values() if shape and isinstance(shape[0], str)]
    return {
        name: next((shape.index(dim) for dim in firsts[:1] if dim in shape), 0)
        for name, shape in shapes.items()
    }


def _is_taken_once(request: CalibrationRequest, name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array is not samples: it has no dimensions, or is of the input's own fixed shape
    where that is not one of a single sample."""
    declared = request.view.type(request.view.inputs()[request.inputs.index(name)]).shape
    return shape == declared and shape[:1] != (1,)


# --- images --------------------------------------------------------------------------------------


def _from_folder(request: CalibrationRequest, folder: Path) -> list[Tensors]:
    if not request.takes("pixel_values"):
        raise request.refuse("a folder of images", "give text as .txt or .jsonl")
    if request.takes("input_ids"):
        return _prompted(request, folder)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise BadInput(f"{request.spec}: empty: it holds no image ({', '.join(SUFFIXES)})")
    preprocessing = Preprocessing.of(request.view)
    pixels = [preprocessing.read(path) for path in paths[: request.samples]]
    parts = request.chunks(pixels, "pixel_values")
    return [request.fit({"pixel_values": torch.stack(part)}) for part in parts]


def _prompted(request: CalibrationRequest, folder: Path) -> list[Tensors]:
    listing = folder / PROMPTS_FILE
    if not listing.is_file():
        raise request.refuse(
            f"it holds no {PROMPTS_FILE}",
            'give one, a line {"image": "a.png", "prompt": "..."} for each prompt',
        )
    lines = read_lines(listing, ("image", "prompt"))[: request.samples]
    if not lines:
        raise BadInput(f"{listing}: empty: it holds no prompt")
    preprocessing, marks = Preprocessing.of(request.view), Placeholders.of(request.view)
    tokenizer = tokenizer_of(request)
    rows = [marks.expand(tokenizer.encode(line["prompt"]).ids) for line in lines]
    pixels = [preprocessing.read(folder / line["image"]) for line in lines]
    batches = []
    for part in request.chunks(list(zip(rows, pixels, strict=True)), "input_ids"):
        text = left_padded([row for row, _ in part], marks.token)
        batches.append(request.fit({**text, "pixel_values": torch.stack([p for _, p in part])}))
    return batches


# --- the zoo -------------------------------------------------------------------------------------


def _from_zoo(request: CalibrationRequest) -> Batches:
    """The calibration split of a model's own data, less what runs are verified on by default.

    ``zoo:minilm`` takes the text of ``zoo:tiny-llama``.
    """
    name = request.spec.removeprefix("zoo:")
    folder = Path(scenes.__file__).parent / name
    if name in ("tiny-llama", "minilm"):
        verified = set(verifying_texts())
        texts = [text for text in shipped_text("calibration") if text not in verified]
        return text_batches(request, sorted(texts, key=len, reverse=True), folder)
    if name == "tiny-vit":
        if request.takes("input_ids") or not request.takes("pixel_values"):
            raise request.refuse("images alone", "give zoo:tiny-llava or zoo:tiny-llama")
        batches = scenes.classified("calibration", request.samples, SEED, BATCH)
        return Batches([request.fit({"pixel_values": pixels}) for pixels, _ in batches])
    if name not in ASKED:
        raise BadInput(f"unknown data {request.spec}; {near_misses(name, ZOO)}")
    if not (request.takes("input_ids") and request.takes("pixel_values")):
        raise request.refuse("images with questions", "give zoo:tiny-llama or zoo:tiny-vit")
    tokenizer = tokenizer_of(request, folder)
    needed = ("<image>", "<pad>", *MORE_WORDS.get(name, ()))
    lacking = [word for word in needed if tokenizer.token_to_id(word) is None]
    if lacking:
        raise BadInput(f"{request.spec}: the model's tokenizer lacks {', '.join(lacking)}")
    batched = scenes.prompt_batches(ASKED[name](request.samples), tokenizer, batch=BATCH)
    return Batches([request.fit(batch) for batch in batched])

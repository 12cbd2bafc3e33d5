"""``--calib DATA``: batches for the passes that learn from data, out of files, folders or the zoo.

Text becomes windows of tokens by the tokenizer that lies beside the model; images become pixels by
its preprocessor's settings. The graph's own inputs say what is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...ir.core.errors import BadInput, Missing, near_misses
from ...ir.core.view import View
from ...ir.load.zoo import ZOO, scenes
from ...ir.load.zoo.text import shipped_text
from ...ir.load.zoo.tiny_llama import verifying_texts
from ...ir.run.batches import batches_sha256, check_batches, count_samples, count_tokens
from ..report.manifest import CalibrationEntry
from .arrays import equally_many, read_rows
from .images import SUFFIXES, Placeholders, Preprocessing
from .text import (
    BATCH,
    PROMPTS_FILE,
    CalibrationRequest,
    Tensors,
    left_padded,
    read_lines,
    read_texts,
    text_batches,
    tokenizer_of,
)

FORMS = (
    "FILE.txt, FILE.jsonl with `text`, FILE.npz or FILE.safetensors with the graph's inputs, a "
    "folder of images (with prompts.jsonl for a model that reads text too), or zoo:NAME"
)
SAMPLES = 128
"""Windows of text, images or questions, unless a person says otherwise."""
LLAVA_SIZES = {"tiny-llava": scenes.IMAGE, "tiny-llava-next": scenes.LARGE}
"""Of the scenes that these models are asked about."""
SEED = 1
"""Of drawn images and questions: those that runs are verified on have the seed 0."""


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs by name, and the words by which they were asked for."""

    name: str
    batches: list[Tensors]
    length: int | None = None
    """Tokens that windows of text were cut to; ``None`` where there are none."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the batches."""
        return batches_sha256(self.batches)

    def entry(self) -> CalibrationEntry:
        """As it stands in the manifest."""
        return CalibrationEntry(
            name=self.name,
            sha256=self.sha256,
            samples=count_samples(self.batches),
            tokens=count_tokens(self.batches),
            length=self.length,
        )


def read(
    spec: str, view: View, *, samples: int | None = None, length: int | None = None
) -> Calibration:
    """Calibration data for a graph as it was loaded; ``FORMS`` says what ``spec`` may be.

    ``samples`` bounds the windows of text, images, questions or rows that are used (``SAMPLES``),
    ``length`` the tokens of a window (``LENGTH``, or what the model takes). Raises ``Missing`` for
    a file that is not there, ``BadInput`` for data that is empty, damaged, of the wrong kind, or
    does not fit the graph's inputs.
    """
    if not spec:
        raise BadInput(f"--calib is empty; it takes {FORMS}")
    for option, value in (("--calib-samples", samples), ("--calib-length", length)):
        if value is not None and value < 1:
            raise BadInput(f"{option} {value} must be above 0")
    wanted = CalibrationRequest(view, spec, samples or SAMPLES, length)
    batches, used = _read(wanted)
    check_batches(view, batches, spec)
    return Calibration(spec, batches, used)


def _read(wanted: CalibrationRequest) -> tuple[list[Tensors], int | None]:
    if wanted.spec.startswith("zoo:"):
        return _from_zoo(wanted)
    path = Path(wanted.spec).expanduser()
    if path.is_dir():
        return _from_folder(wanted, path), None
    if not path.is_file():
        raise Missing(f"{wanted.spec}: no such file or folder; --calib takes {FORMS}")
    if path.suffix in (".npz", ".safetensors"):
        return _rows(wanted, path), None
    if path.suffix in (".txt", ".jsonl"):
        return text_batches(wanted, read_texts(path))
    kind = "an image" if path.suffix.lower() in SUFFIXES else "not a kind of data that is read"
    raise BadInput(f"{wanted.spec}: {kind}; --calib takes {FORMS}")


# --- the graph's own inputs ----------------------------------------------------------------------


def _rows(wanted: CalibrationRequest, path: Path) -> list[Tensors]:
    """Arrays of many samples as batches: cut along the first dimension, which all share.

    What the graph takes once, a rate or a state of fixed shape, goes into each batch as it is.
    """
    most = max([wanted.samples, *(wanted.fixed(name, 0) or 1 for name in wanted.inputs)])
    held = read_rows(path, most)
    if not held:
        raise BadInput(f"{wanted.spec}: empty: it holds no array")
    unknown = [name for name in held if not wanted.takes(name)]
    if unknown:
        hint = near_misses(unknown[0], wanted.inputs)
        raise wanted.refuse(f"it holds {unknown[0]}", hint or "give these")
    once = {n: rows.tensor for n, rows in held.items() if _is_taken_once(wanted, n, rows.shape)}
    if len(once) < len(held):
        held = {name: rows for name, rows in held.items() if name not in once}
    total = equally_many(held)
    if total is None:
        listed = ", ".join(f"{name} {list(rows.shape)}" for name, rows in held.items())
        raise BadInput(f"{wanted.spec}: the arrays do not hold equally many samples: {listed}")
    size = next((s for n in held if (s := wanted.fixed(n, 0))), None)
    if size is not None and total % size:
        raise BadInput(
            f"{wanted.spec}: {total} samples, and the graph takes exactly {size} at a time"
        )
    total = min(total, max(size or 1, wanted.samples))
    size = size or BATCH
    starts = range(0, total, size)
    cut = ({n: h.tensor[i : min(i + size, total)] for n, h in held.items()} for i in starts)
    return [once | batch for batch in cut]


def _is_taken_once(wanted: CalibrationRequest, name: str, shape: tuple[int, ...]) -> bool:
    """Whether an array is not samples: it has no dimensions, or is of the input's own fixed shape
    where that is not one of a single sample."""
    declared = wanted.view.type(wanted.view.inputs()[wanted.inputs.index(name)]).shape
    return shape == declared and shape[:1] != (1,)


# --- images --------------------------------------------------------------------------------------


def _from_folder(wanted: CalibrationRequest, folder: Path) -> list[Tensors]:
    if not wanted.takes("pixel_values"):
        raise wanted.refuse("a folder of images", "give text as .txt or .jsonl")
    if wanted.takes("input_ids"):
        return _prompted(wanted, folder)
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise BadInput(f"{wanted.spec}: empty: it holds no image ({', '.join(SUFFIXES)})")
    preprocessing = Preprocessing.of(wanted.view)
    pixels = [preprocessing.read(path) for path in paths[: wanted.samples]]
    parts = wanted.chunks(pixels, "pixel_values")
    return [wanted.fit({"pixel_values": torch.stack(part)}) for part in parts]


def _prompted(wanted: CalibrationRequest, folder: Path) -> list[Tensors]:
    listing = folder / PROMPTS_FILE
    if not listing.is_file():
        raise wanted.refuse(
            f"it holds no {PROMPTS_FILE}",
            'give one, a line {"image": "a.png", "prompt": "..."} for each prompt',
        )
    lines = read_lines(listing, ("image", "prompt"))[: wanted.samples]
    if not lines:
        raise BadInput(f"{listing}: empty: it holds no prompt")
    preprocessing, marks = Preprocessing.of(wanted.view), Placeholders.of(wanted.view)
    tokenizer = tokenizer_of(wanted)
    rows = [marks.expand(tokenizer.encode(line["prompt"]).ids) for line in lines]
    pixels = [preprocessing.read(folder / line["image"]) for line in lines]
    made = []
    for part in wanted.chunks(list(zip(rows, pixels, strict=True)), "input_ids"):
        text = left_padded([row for row, _ in part], marks.token)
        made.append(wanted.fit({**text, "pixel_values": torch.stack([p for _, p in part])}))
    return made


# --- the zoo -------------------------------------------------------------------------------------


def _from_zoo(wanted: CalibrationRequest) -> tuple[list[Tensors], int | None]:
    """The calibration split of a model's own data, less what runs are verified on by default.

    ``zoo:minilm`` takes the text of ``zoo:tiny-llama``.
    """
    name = wanted.spec.removeprefix("zoo:")
    folder = Path(scenes.__file__).parent / name
    if name in ("tiny-llama", "minilm"):
        verified = set(verifying_texts())
        texts = [text for text in shipped_text("calibration") if text not in verified]
        return text_batches(wanted, sorted(texts, key=len, reverse=True), folder)
    if name == "tiny-vit":
        if wanted.takes("input_ids") or not wanted.takes("pixel_values"):
            raise wanted.refuse("images alone", "give zoo:tiny-llava or zoo:tiny-llama")
        batches = scenes.classified("calibration", wanted.samples, SEED, BATCH)
        return [wanted.fit({"pixel_values": pixels}) for pixels, _ in batches], None
    if name not in LLAVA_SIZES:
        raise BadInput(f"unknown data {wanted.spec}; {near_misses(name, ZOO)}")
    if not (wanted.takes("input_ids") and wanted.takes("pixel_values")):
        raise wanted.refuse("images with questions", "give zoo:tiny-llama or zoo:tiny-vit")
    asked = scenes.questions("calibration", wanted.samples, SEED, LLAVA_SIZES[name])
    tokenizer = tokenizer_of(wanted, folder)
    lacking = [word for word in ("<image>", "<pad>") if tokenizer.token_to_id(word) is None]
    if lacking:
        raise BadInput(f"{wanted.spec}: the model's tokenizer lacks {', '.join(lacking)}")
    return [wanted.fit(b) for b in scenes.prompt_batches(asked, tokenizer, batch=BATCH)], None

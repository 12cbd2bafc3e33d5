"""Recordings and what is said in them: JSON lines of ``audio`` and ``text``; their features."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...ir.core.errors import BadInput, Missing, first_line
from ...ir.core.quiet import quiet
from .data_lines import lines_of
from .subject import Subject
from .task import Setting

FORM = 'a line {"audio": "a.wav", "text": "what is said"} for each recording'
_SAMPLES = {1: "u1", 2: "<i2", 4: "<i4"}
"""By bytes: 8 bits have no sign, in a WAV file."""


@dataclass(frozen=True)
class Recording:
    """A sound file, and what is said in it."""

    audio: Path
    text: str


def recordings(setting: Setting) -> list[Recording]:
    """The lines of ``setting.data``, the first ``setting.samples`` of them.

    Raises ``Missing`` without a file, ``BadInput`` for a line that lacks something.
    """
    path = setting.data
    lines = lines_of(path, "transcribe", FORM, ("audio", "text"), "recordings")
    assert path is not None  # without one there are no lines
    rows = [Recording(path.parent / line["audio"], line["text"]) for line in lines]
    if not any(row.text.split() for row in rows):
        raise BadInput(f"{path}: no word is said in it: it takes {FORM}")
    return rows[: setting.samples]


class Features:
    """What a model is given of a sound: by the library's own extractor, from the folder's
    ``preprocessor_config.json``."""

    def __init__(self, subject: Subject) -> None:
        import transformers

        if subject.folder is None or not (subject.folder / "preprocessor_config.json").is_file():
            raise Missing(
                f"{subject.name}: no preprocessor_config.json with it, which says how sound is "
                "prepared: AutoFeatureExtractor.from_pretrained(MODEL).save_pretrained(FOLDER) "
                "writes one"
            )
        with quiet():
            self._extract: Any = transformers.AutoFeatureExtractor.from_pretrained(subject.folder)

    def __call__(self, path: Path) -> dict[str, torch.Tensor]:
        """Inputs of one recording. ``BadInput`` where it is not sampled as the model takes it."""
        usual = int(self._extract.sampling_rate)
        sound, rate = read_sound(path)
        if rate != usual:
            raise BadInput(
                f"{path} has {rate} samples a second, and the model takes {usual}: convert it, as "
                f"by `ffmpeg -i {path.name} -ar {usual} new.wav`"
            )
        return dict(self._extract(sound, sampling_rate=rate, return_tensors="pt"))


def read_sound(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples between -1 and 1, the mean of the channels; and how many there are a second.

    WAV files of whole numbers are read by Python itself, others by the package ``soundfile``.
    Raises ``Missing`` where the file or that package is not there, ``BadInput`` for what is no
    sound.
    """
    if not path.is_file():
        raise Missing(f"{path}: no such recording")
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return _by_soundfile(path)
    if width not in _SAMPLES:
        return _by_soundfile(path)
    values = np.frombuffer(raw, np.dtype(_SAMPLES[width])).astype(np.float32)
    values -= 128 if width == 1 else 0
    values /= 1 << (8 * width - 1)
    return values.reshape(-1, channels).mean(1, dtype=np.float32), rate


def _by_soundfile(path: Path) -> tuple[NDArray[np.float32], int]:
    try:
        import soundfile
    except ImportError:
        raise Missing(
            f"{path} is no WAV file of 8, 16 or 32 bits: pip install soundfile reads others"
        ) from None
    try:
        values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise BadInput(f"{path} is no recording: {first_line(error)}") from None
    return values.mean(1), int(rate)

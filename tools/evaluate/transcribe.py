"""``transcribe``: what is said in recordings, judged by the word error rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...ir.core.errors import BadInput, Missing, first_line
from ...ir.core.quiet import quiet
from ...ir.load.side_files import end_tokens, read_json
from .recordings import Features, Recording, recordings
from .stats import Interval, bootstrap
from .subject import SPEECH, Subject
from .task import EvalResult, Finite, Setting, Task
from .word_scores import edits, plain

Tensors = Mapping[str, torch.Tensor]
Next = Callable[[list[int]], torch.Tensor]
"""From the tokens so far to logits of the next, ``[words]``."""
MOST_TOKENS = 224
"""Of a transcript, where the model's configs do not say: half of what Whisper's decoder reads."""


class Transcribe(Task):
    """Word error rate: words to put in, leave out or replace, by the words that were said.

    A sample is a line of ``--data FILE.jsonl``: ``audio`` (a WAV file's path from it, sampled as
    the model takes it) and ``text``. ``wer`` counts over all recordings, words as they are written;
    ``wer_plain`` without case and punctuation. A model of CTC gives its likeliest token at each
    place, an encoder and decoder writes greedily, of Whisper behind the language that it hears, as
    the library's ``generate`` does. Interval: bootstrap over recordings.
    """

    name = "transcribe"
    kinds = (SPEECH,)
    headlines: ClassVar = {"wer": "lower", "wer_plain": "lower"}

    def check(self, subject: Subject, setting: Setting) -> None:
        super().check(subject, setting)
        recordings(setting)

    def run(
        self, subjects: Sequence[Subject], reference: Subject | None, setting: Setting
    ) -> list[EvalResult]:
        return [self._judge(subject, recordings(setting), setting) for subject in subjects]

    def _judge(self, subject: Subject, rows: Sequence[Recording], setting: Setting) -> EvalResult:
        features, tokenizer = Features(subject), _tokenizer(subject)
        finite = Finite(self.name, subject, "recordings")
        texts = []
        for number, row in enumerate(rows):
            setting.progress(f"{self.name} of {subject.name}", number, len(rows))
            tokens = _heard(subject, features(row.audio), finite)
            texts.append(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip())
        finite.settle()
        pairs = [(text, row.text) for text, row in zip(texts, rows, strict=True)]
        counts = {
            "wer": [_counted(text, spoken) for text, spoken in pairs],
            "wer_plain": [_counted(plain(text), plain(spoken)) for text, spoken in pairs],
        }
        figures: dict[str, float] = {}
        interval: dict[str, Interval] = {}
        for figure, table in counts.items():
            sums = list(zip(*table, strict=True))
            figures[figure] = sum(sums[0]) / max(1, sum(sums[1]))
            ends = bootstrap(sums, lambda s: s[0] / s[1].clip(1), setting.seed)
            interval |= {} if ends is None else {figure: ends}
        return EvalResult(self.name, figures, interval, len(rows), "recordings", {"texts": texts})


def _counted(actual: str, expected: str) -> tuple[int, int]:
    return edits(actual.split(), expected.split()), len(expected.split())


def _tokenizer(subject: Subject) -> Any:
    """The library's, which joins what a model of CTC says several times."""
    import transformers

    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(subject.folder)
    except (OSError, ValueError) as error:
        raise Missing(
            f"{subject.name}: its tokenizer is not read: {first_line(error)}. AutoTokenizer"
            ".from_pretrained(MODEL).save_pretrained(FOLDER) writes one"
        ) from None


def _heard(subject: Subject, inputs: Tensors, finite: Finite) -> list[int]:
    """The tokens of one recording."""
    if "decoder_input_ids" not in subject.input_names:
        logits = subject.run(inputs)["logits"][0]
        finite(logits)
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens

    def following(text: list[int]) -> torch.Tensor:
        logits = subject.run({**inputs, "decoder_input_ids": torch.tensor([text])})["logits"]
        finite(logits[0, -1])
        return logits[0, -1]

    return _written(subject, following)


def _written(subject: Subject, following: Next) -> list[int]:
    """What a decoder writes greedily, to its end."""
    settings = read_json(subject.folder, "config.json") | read_json(
        subject.folder, "generation_config.json"
    )
    start = settings.get("decoder_start_token_id")
    if not isinstance(start, int):
        raise BadInput(f"{subject.name}: its configs name no decoder_start_token_id")
    prompt = _prompt(settings, start, following)
    # Of Whisper it is what follows the prompt.
    most = (settings.get("max_length") or MOST_TOKENS) + len(prompt)
    most = min(most, settings.get("max_target_positions") or most)
    ends, text = end_tokens(subject.folder), list(prompt)
    while len(text) < most and not (len(text) > len(prompt) and text[-1] in ends):
        logits = following(text).clone()
        barred = list(settings.get("suppress_tokens") or [])
        if len(text) == len(prompt):
            barred += settings.get("begin_suppress_tokens") or []
        logits[[token for token in barred if 0 <= token < len(logits)]] = float("-inf")
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def _prompt(settings: Mapping[str, Any], start: int, following: Next) -> list[int]:
    """The tokens that Whisper's answer starts with: the language that it hears, that it is to
    write that down, and without times. Of other models their first token alone."""
    languages = settings.get("lang_to_id") or {}
    prompt = [start]
    if languages:
        logits = following(prompt)
        prompt.append(max(languages.values(), key=lambda token: float(logits[token])))
        prompt.append(settings["task_to_id"]["transcribe"])
    quiet_times = settings.get("no_timestamps_token_id")
    return [*prompt, quiet_times] if isinstance(quiet_times, int) else prompt

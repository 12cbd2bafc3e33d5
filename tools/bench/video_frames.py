"""What helps a model of videos beside its own tokens: ``python -m
graphwright.tools.bench.video_frames [QUESTIONS] [--only quota|frames]``, of ``zoo:tiny-video`` in
ONNX Runtime.

First ``quota``: tokens shared among frames by how relevant they are said to be. ``second model``
is ``zoo:tiny-llava``, asked of every frame and each of the ten digits whether it is there; the most
probable yes counts. ``known`` is what the drawing says, ``even`` nothing; ``uniform-tokens`` stand
beside. Then ``intp-video``: videos of more frames than the model was trained on, as they are and
with stretched positions. Accuracy with its 95 % interval; the same questions in every row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ...backends import Executable
from ...backends import compile as compile_model
from ...ir.core.view import View
from ...ir.load.sources import load
from ...ir.load.zoo import scenes, videos
from ...ir.load.zoo.text import read_tokenizer
from ...ir.structure.cache_slots import RELEVANCE
from ...passes.manager import optimize
from ..evaluate.stats import wilson

MODEL, SCORER = "zoo:tiny-video", "zoo:tiny-llava"
QUESTIONS, BATCH = 200, 8
KEEPS = ("25%", "12.5%", "6%")
FRAMES = (8, 12, 16, 24)
EMPTY = 0.05
"""What is said of a frame without a digit, where it is known."""
Relevance = Callable[[Sequence[scenes.Question]], torch.Tensor]


def compiled(graph: View, recipe: str) -> Executable:
    return compile_model(optimize(graph, recipe).graph, backend="onnxruntime", threads=1)


def right(
    run: Executable, folder: Path, asked: Sequence[scenes.Question], said: torch.Tensor | None
) -> str:
    """The share of questions that are answered right, ``said`` of their frames ``[questions,
    frames]``."""
    tokenizer = read_tokenizer(folder)
    hits = 0
    for number, batch in enumerate(scenes.prompt_batches(asked, tokenizer, batch=BATCH)):
        part = asked[number * BATCH : (number + 1) * BATCH]
        if said is not None:
            batch[RELEVANCE] = said[number * BATCH : (number + 1) * BATCH]
        words = run(**batch)["logits"][:, -1].argmax(-1).tolist()
        hits += sum(tokenizer.id_to_token(w) == q.answer for w, q in zip(words, part, strict=True))
    low, high = (100 * share for share in wilson(hits, len(asked)))
    return f"{hits / len(asked):.1%} ({low:.1f} to {high:.1f})"


def known(asked: Sequence[scenes.Question]) -> torch.Tensor:
    """Whether a digit is drawn in each frame."""
    return torch.tensor([[1.0 if part.digits else EMPTY for part in q.scene.parts] for q in asked])


def by_second_model(asked: Sequence[scenes.Question]) -> torch.Tensor:
    """Of each frame the most probable yes to ``is there a D ?``, by a model of single pictures: a
    frame stands in the middle of one, its edge drawn out."""
    graph = load(SCORER, cache=False)
    run = compiled(graph, "clean")
    tokenizer = read_tokenizer(Path(graph.source.folder or ""))
    yes, no = (tokenizer.token_to_id(word) for word in ("yes", "no"))
    margin = (scenes.IMAGE - videos.FRAME) // 2
    border = ((0, 0), (margin, margin), (margin, margin))
    rows = []
    for question in asked:
        pictures = [np.pad(part.image, border, mode="edge") for part in question.scene.parts]
        yes_no = [
            scenes.Question(scenes.Scene(picture, ()), "contains", f"is there a {digit} ?", "")
            for picture in pictures for digit in range(10)
        ]  # fmt: skip
        (batch,) = scenes.prompt_batches(yes_no, tokenizer, batch=len(yes_no))
        logits = run(**batch)["logits"][:, -1][:, [yes, no]]
        rows.append(torch.softmax(logits, -1)[:, 0].reshape(-1, 10).amax(1))
    return torch.stack(rows)


def quotas(count: int) -> Iterator[str]:
    graph = load(MODEL, cache=False)
    folder = Path(graph.source.folder or "")
    asked = videos.questions("test", count)
    began = time.process_time()
    second = by_second_model(asked)
    seconds = (time.process_time() - began) / count
    of = {"even": None, "second model": second, "known": known(asked)}
    there = known(asked) == 1
    yield (
        f"{SCORER} says {second[there].mean():.2f} on average of frames with a digit and "
        f"{second[~there].mean():.2f} of others, in {seconds:.2f} s of processor time a video"
    )
    whole, began = compiled(graph, "clean"), time.process_time()
    answers = right(whole, folder, asked, None)
    yield f"all tokens: {answers}, in {(time.process_time() - began) / count:.2f} s a video"
    for keep in KEEPS:
        run = compiled(graph, f"quota{{keep={keep}}}")
        cells = [f"{name} {right(run, folder, asked, said)}" for name, said in of.items()]
        spread = compiled(graph, f"uniform-tokens{{keep={keep}}}")
        cells.append(f"uniform-tokens {right(spread, folder, asked, None)}")
        yield f"quota{{keep={keep}}}: {'; '.join(cells)}"


def longer(folder: Path, frames: int, place: Path) -> Path:
    """The model as one of so many frames."""
    out = place / f"of-{frames}"
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["image_seq_length"] = frames * videos.PATCHES
    (out / "config.json").write_text(json.dumps(config))
    return out


def more_frames(count: int) -> Iterator[str]:
    folder = Path(load(MODEL, cache=False).source.folder or "")
    with tempfile.TemporaryDirectory() as place:
        for frames in FRAMES:
            model = longer(folder, frames, Path(place))
            graph, asked = load(model, cache=False), videos.questions("test", count, 0, frames)
            factor = frames / videos.FRAMES
            recipes = {"as it is": "clean"}
            if factor > 1:
                recipes |= {way: f"intp-video{{factor={factor:g} scaling={way}}}"
                            for way in ("ntk", "linear")}  # fmt: skip
            cells = [f"{name} {right(compiled(graph, recipe), folder, asked, None)}"
                     for name, recipe in recipes.items()]  # fmt: skip
            yield f"{frames} frames: {'; '.join(cells)}"


TABLES = {"quota": quotas, "frames": more_frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=QUESTIONS, help="questions")
    parser.add_argument("--only", nargs="*", choices=TABLES, default=[*TABLES], help="tables")
    options = parser.parse_args()
    for name in options.only:
        for line in TABLES[name](options.count):
            print(line, flush=True)


if __name__ == "__main__":
    main()

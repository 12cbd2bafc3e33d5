"""Train ``zoo:tiny-llava``: ``python -m graphwright.tools.zoo.train_llava OUT [--seed 0]``.

A LLaVA of 2.4 M parameters (CLIP vision tower, projector, Llama) that answers questions about
scenes of handwritten digits (``ir/zoo/scenes.py``). First the tower learns alone: its CLS token
says which digits there are, how many, and where, and the patches in the middle of a digit say which
it is (``llava_tower.py``). Then projector and language model learn to answer, the tower frozen.
Last they learn it of images that miss part of their background.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...ir.zoo import scenes
from .llava_figures import accuracy, measure
from .llava_tower import TowerTeacher
from .saving import save_weights, write_preprocessor
from .training import Schedule, train, write_record

BATCH = 16
VISUAL = (scenes.IMAGE // scenes.PATCH) ** 2
TOWER = Schedule(steps=3200, lr=3e-3, evaluate_every=200)
ANSWERS = Schedule(steps=2400, lr=3e-3, evaluate_every=300)
FEWER = Schedule(steps=800, lr=1.5e-3, evaluate_every=200)
LEAST, WHOLE = 0.2, 0.3
"""In the last stage: the least share of visual tokens, and how often all of them stay. Without it
the model reads places off the order of tokens, and answers worse (68 %) of the quarter with the
digits than of a random one (75 %)."""
CROWDED = (5, 9)
"""Digits in a scene while the tower learns to read: more digits an image, so more an hour."""
CROWDED_BATCH, MIXED_BATCH = 8, 16
CROWDED_UNTIL = 0.6
"""Of the tower's steps; after it every second scene has as many digits as it will have later."""
ASKED = (*scenes.TYPES, "where", "where", "contains", "contains")
TOLD = 5
"""Statements about a scene beside the questions: where a named digit is, or that it is not there.
To find what a word names is learned from them; from yes and no alone it was not, in 1400 steps."""
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
WORDS = [
    PAD, BOS, EOS, IMAGE, "<unk>", "?", *map(str, range(10)), "none", "yes", "no", "which",
    "digit", "digits", "is", "at", "the", "how", "many", "are", "there", "a", "largest", "top",
    "bottom", "left", "right", "center",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=TOWER.steps)
    parser.add_argument("--steps", type=int, default=ANSWERS.steps)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    run(given.out, given.seed, given.tower_steps, given.steps, resume=given.resume)


def run(out: Path, seed: int, tower_steps: int, steps: int, *, resume: bool) -> None:
    """Train both stages, measure, write."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(seed)
    model.set_attn_implementation("eager")  # 0.51 s a step where sdpa's backward takes 0.88 in bf16
    stages = {
        "tower": replace(TOWER, steps=tower_steps), "answers": replace(ANSWERS, steps=steps),
        "fewer": replace(FEWER, steps=max(1, FEWER.steps * steps // ANSWERS.steps)),
    }  # fmt: skip
    curves = {"tower": _train_tower(model, stages["tower"], out, seed, resume)}
    learner = Learner(model, tokenizer)
    for number, stage in enumerate(("answers", "fewer"), 2):
        kept = _kept(learner, out / f"{stage}.pt") if resume else None
        curves[stage] = kept or _train_answers(
            learner, stage, number, stages[stage], out, seed, resume
        )
    model.set_attn_implementation("sdpa")
    write_model(model, tokenizer, out)
    figures = measure(model.float(), tokenizer)
    write_record(out, seed=seed, schedules=stages, curves=curves, figures=figures)
    for stage in stages:
        (out / f"{stage}.pt").unlink()
    print(json.dumps(figures, indent=1))


def _train_tower(
    model: Any, schedule: Schedule, out: Path, seed: int, resume: bool
) -> list[dict[str, float]]:
    """The tower's stage, or what an earlier run left of it."""
    done = out / "tower.pt"
    teacher = TowerTeacher(model.model.vision_tower, model.config.vision_config.hidden_size)
    if not (resume and done.is_file()):
        held = [scenes.draw_scene("validation", np.random.default_rng([0, i])) for i in range(128)]

        def loss(step: int) -> torch.Tensor:
            rng = np.random.default_rng([seed, step, 1])
            counts = [CROWDED] * CROWDED_BATCH
            if step >= CROWDED_UNTIL * schedule.steps:
                counts = [CROWDED, scenes.COUNTS] * (MIXED_BATCH // 2)
            return teacher.loss([scenes.draw_scene("train", rng, counts=c) for c in counts])

        curve = train(
            teacher, loss, schedule, out, title="tiny-llava, tower", resume=resume, stage="tower",
            evaluate=lambda: teacher.accuracy(held),
        )  # fmt: skip
        torch.save({"state": teacher.state_dict(), "curve": curve}, done)
    kept = torch.load(done, weights_only=True)
    teacher.load_state_dict(kept["state"])
    before: list[dict[str, float]] = kept["curve"]
    return before


def _train_answers(
    learner: Learner, stage: str, number: int, schedule: Schedule, out: Path, seed: int,
    resume: bool,
) -> list[dict[str, float]]:  # fmt: skip
    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step, number])
        drawn = [scenes.draw_scene("train", rng) for _ in range(BATCH)]
        kept = None
        if stage == "fewer" and rng.random() >= WHOLE:
            kept = part_of(drawn, round(VISUAL * rng.uniform(LEAST, 1)), rng)
        return learner.loss(drawn, rng, kept)

    curve = train(
        learner, loss, schedule, out, title=f"tiny-llava, {stage}", resume=resume, stage=stage,
        evaluate=lambda: {
            "validation": accuracy(learner.model, learner.tokenizer, "validation", 200)
        },
    )  # fmt: skip
    torch.save({"state": learner.state_dict(), "curve": curve}, out / f"{stage}.pt")
    return curve


def part_of(drawn: Sequence[scenes.Scene], count: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` visual tokens of each scene, those on digits first: i64 ``[scenes, count]``,
    ascending."""
    on = torch.stack([scenes.digit_patches(s) for s in drawn]).float()
    chance = torch.from_numpy(rng.random(on.shape, dtype=np.float32))
    return (on + chance).topk(count).indices.sort().values


def _kept(learner: Learner, file: Path) -> list[dict[str, float]] | None:
    """The curve of a stage that an earlier run has finished, its weights taken over."""
    if not file.is_file():
        return None
    kept = torch.load(file, weights_only=True)
    learner.load_state_dict(kept["state"])
    curve: list[dict[str, float]] = kept["curve"]
    return curve


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, BOS, EOS, IMAGE, "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def make_model(seed: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        image_size=scenes.IMAGE, patch_size=scenes.PATCH, hidden_size=128, intermediate_size=384,
        num_hidden_layers=6, num_attention_heads=4, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        pad_token_id=WORDS.index(PAD), bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS), tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORDS.index(IMAGE),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=VISUAL, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _start_well(model.model.vision_tower.embeddings)
    return model


def _start_well(embeddings: Any) -> None:
    """Starting values with which the tower finds that near patches belong together.

    Positions start as sines and cosines of row and column, patches as filters that answer to shape
    and not to brightness.
    """
    table = embeddings.position_embedding.weight
    filters = embeddings.patch_embedding.weight
    grid = scenes.IMAGE // scenes.PATCH
    rates = 1.0 / 30 ** torch.linspace(0, 1, table.shape[1] // 4)
    angles = torch.arange(grid)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    with torch.no_grad():
        table[1:] = 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)
        filters.normal_(std=filters[0].numel() ** -0.5)
        filters -= filters.mean((1, 2, 3), keepdim=True)


class Learner(nn.Module):
    """Projector and language model, learning of a scene by questions and statements.

    The tower is frozen, as LLaVA does it. All that is said of a scene stands in one row; each part
    sees the image and itself alone, at the positions that it would have if it were the only one.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        model.model.vision_tower.requires_grad_(False)

    def loss(
        self, drawn: Sequence[scenes.Scene], rng: np.random.Generator,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Of a batch of scenes; ``kept`` says which visual tokens each has, if not all."""
        said = [self._said(scene, rng) for scene in drawn]
        longest = max(sum(len(ids) for ids, _ in row) for row in said)
        words = torch.zeros(len(drawn), longest, dtype=torch.long)
        turns = torch.full((len(drawn), longest), -1)
        places = torch.zeros(len(drawn), longest, dtype=torch.long)
        labels = torch.full((len(drawn), longest), -100)
        for r, row in enumerate(said):
            at = 0
            for turn, (ids, wanted) in enumerate(row):
                end = at + len(ids)
                words[r, at:end] = torch.tensor(ids)
                turns[r, at:end] = turn
                places[r, at:end] = torch.arange(len(ids))
                labels[r, end - len(wanted) : end] = torch.tensor(wanted)
                at = end
        pixels = scenes.normalized([s.image for s in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            logits = self._logits(pixels, words, places, turns, kept)
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    def _said(
        self, scene: scenes.Scene, rng: np.random.Generator
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens, and what is to follow each of the last of them."""
        asked = [scenes.ask(scene, kind, rng) for kind in ASKED]
        questions = [(self._ids(q.text), self._ids(q.answer)) for q in asked]
        return questions + [self._told(scene, rng) for _ in range(TOLD)]

    def _told(
        self, scene: scenes.Scene, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        values = [digit.value for digit in scene.digits]
        single = [d for d in scene.digits if values.count(d.value) == 1]
        if single and rng.random() < 0.65:
            digit = single[int(rng.integers(len(single)))]
            value, place = digit.value, self._ids(scenes.CELLS[digit.cell])
        else:
            absent = [v for v in range(10) if v not in values]
            value, place = absent[int(rng.integers(len(absent)))], self._ids("none")
        return [*self._ids(f"the {value} is at the"), *place], [*place, WORDS.index(EOS)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _logits(
        self, pixels: torch.Tensor, words: torch.Tensor, places: torch.Tensor,
        turns: torch.Tensor, kept: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """At the questions' tokens, ``[batch, seq, words]``."""
        inner = self.model.model
        with torch.no_grad():
            hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        image = inner.multi_modal_projector(hidden[:, 1:])
        if kept is not None:
            image = image.take_along_dim(kept[:, :, None], 1)
        start = torch.full_like(words[:, :1], WORDS.index(BOS))
        embed = inner.language_model.embed_tokens
        embedded = torch.cat([embed(start), image.to(embed.weight.dtype), embed(words)], 1)
        first = image.shape[1] + 1
        common = torch.arange(first).expand(len(words), -1)
        # -1 is the image's own turn and the padding's, which nobody reads.
        turn = torch.cat([torch.full_like(common, -1), turns], 1)
        seen = torch.ones(embedded.shape[1], embedded.shape[1], dtype=torch.bool).tril()
        same = (turn[:, :, None] == turn[:, None, :]) | (torch.arange(len(seen)) < first)
        mask = torch.zeros(same.shape).masked_fill(~(seen & same), -1e4).unsqueeze(1)
        states = inner.language_model(
            inputs_embeds=embedded, attention_mask=mask.to(torch.bfloat16),
            position_ids=torch.cat([common, places + first], 1), use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits: torch.Tensor = self.model.lm_head(states[:, first:])
        return logits


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    save_weights(model, out)
    write_preprocessor(out, "CLIPImageProcessor", scenes.IMAGE)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
               "pad_token": PAD, "unk_token": "<unk>", "image_token": IMAGE}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n")


if __name__ == "__main__":
    main()

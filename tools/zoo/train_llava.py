"""Train ``zoo:tiny-llava``: ``python -m graphwright.tools.zoo.train_llava OUT [--seed 0]``.

A LLaVA of 2.4 M parameters (CLIP vision tower, projector, Llama) that answers questions about
scenes of handwritten digits (``ir/zoo/scenes.py``). First the tower learns alone: its CLS token
says which digits there are and how many, at the last layer and at the one before, whose features
the language model gets; its patches say which digit they belong to. Then all of it learns to
answer, while the tower keeps its first objective.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ...ir.zoo import scenes
from .training import Schedule, train, write_record

BATCH = 64
VISUAL = (scenes.IMAGE // scenes.PATCH) ** 2
TOWER = Schedule(steps=1500, lr=3e-3, evaluate_every=250)
ANSWERS = Schedule(steps=1500, lr=2e-3, evaluate_every=250)
TOWER_WEIGHT = 0.3
"""Of the tower's own objective while the answers are learned."""
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
    teacher = TowerTeacher(model.model.vision_tower, model.config.vision_config.hidden_size)
    stages = {
        "tower": Schedule(steps=tower_steps, lr=TOWER.lr, evaluate_every=TOWER.evaluate_every),
        "answers": Schedule(steps=steps, lr=ANSWERS.lr, evaluate_every=ANSWERS.evaluate_every),
    }
    learner = Learner(model, teacher, tokenizer)
    curves = {}
    done = out / "tower.pt"
    if not (resume and done.is_file()):
        curves["tower"] = train(
            teacher, lambda step: teacher.loss(_draw(seed, step, 1)), stages["tower"], out,
            title="tiny-llava, tower", resume=resume, stage="tower",
        )  # fmt: skip
        torch.save({"state": teacher.state_dict(), "curve": curves["tower"]}, done)
    kept = torch.load(done, weights_only=True)
    teacher.load_state_dict(kept["state"])
    curves["tower"] = kept["curve"]
    curves["answers"] = train(
        learner, lambda step: learner.loss(_draw(seed, step, 2), seed, step), stages["answers"],
        out, title="tiny-llava, answers", resume=resume, stage="answers",
        evaluate=lambda: {"validation": mean(accuracy(model, tokenizer, "validation", 400))},
    )  # fmt: skip
    rounded = model.to(torch.bfloat16).float()
    figures = measure(rounded, tokenizer)
    write_model(model, tokenizer, out)
    write_record(out, seed=seed, schedules=stages, curves=curves, figures=figures)
    done.unlink()
    print(json.dumps(figures, indent=1))


def _draw(seed: int, step: int, stage: int) -> list[scenes.Scene]:
    rng = np.random.default_rng([seed, step, stage])
    return [scenes.draw_scene("train", rng) for _ in range(BATCH)]


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
        eos_token_id=WORDS.index(EOS), tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORDS.index(IMAGE),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=VISUAL, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


class TowerTeacher(nn.Module):
    """The tower with what it learns by: heads on its CLS token and on its patches."""

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.head_presence = nn.ModuleList([nn.Linear(width, 10) for _ in range(2)])
        self.head_count = nn.ModuleList([nn.Linear(width, 4) for _ in range(2)])
        self.head_patch = nn.Linear(width, 11)

    def hidden(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of every layer, ``[batch, 1 + patches, width]``."""
        found: Sequence[torch.Tensor] = self.tower(
            pixel_values=pixels, output_hidden_states=True
        ).hidden_states
        return found

    def loss(self, drawn: Sequence[scenes.Scene]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.hidden(scenes.normalized([s.image for s in drawn]))
            return self.objective(hidden, drawn)

    def objective(
        self, hidden: Sequence[torch.Tensor], drawn: Sequence[scenes.Scene]
    ) -> torch.Tensor:
        present = torch.zeros(len(drawn), 10)
        for row, scene in enumerate(drawn):
            present[row, [d.value for d in scene.digits]] = 1
        counts = torch.tensor([len(s.digits) - 1 for s in drawn])
        total = torch.zeros(())
        for i, layer in enumerate((-2, -1)):
            token = self.norms[i](hidden[layer][:, 0].float())
            total = total + binary_cross_entropy_with_logits(self.head_presence[i](token), present)
            total = total + 0.3 * cross_entropy(self.head_count[i](token), counts)
        patches = self.head_patch(self.norms[2](hidden[-2][:, 1:].float()))
        weights = torch.tensor([1.0] * 10 + [0.15])
        target = torch.stack([_patch_classes(s) for s in drawn])
        return total + cross_entropy(patches.flatten(0, 1), target.flatten(), weights)


def _patch_classes(scene: scenes.Scene) -> torch.Tensor:
    """The digit that each patch belongs to, 10 for none: ``[patches]`` i64."""
    found = torch.full((VISUAL,), 10)
    for digit in scene.digits:
        found[scenes.digit_patches(scenes.Scene(scene.image, (digit,)))] = digit.value
    return found


class Learner(nn.Module):
    """The whole model, answering four questions a scene, one after another."""

    def __init__(self, model: Any, teacher: TowerTeacher, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.tokenizer = tokenizer

    def loss(self, drawn: Sequence[scenes.Scene], seed: int, step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step, 3])
        rows, marks = [], []
        for scene in drawn:
            kinds = rng.permutation(scenes.TYPES)
            asked = [scenes.ask(scene, str(kind), rng) for kind in kinds]
            text = " ".join(f"{q.text} {q.answer}" for q in asked)
            rows.append(self.tokenizer.encode(text).ids)
            ends = np.cumsum([len(q.text.split()) + 1 for q in asked])
            marks.append([int(end) for end in ends])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = torch.full_like(ids, -100)
        for row, places in enumerate(marks):
            labels[row, places] = ids[row, places]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.teacher.hidden(scenes.normalized([s.image for s in drawn]))
            logits = self._logits(hidden[-2][:, 1:], ids)
            kept = self.teacher.objective(hidden, drawn)
        answers = cross_entropy(
            logits[:, VISUAL:-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        return answers + TOWER_WEIGHT * kept

    def _logits(self, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of ``<s>``, the image, the other ``ids``: ``[batch, VISUAL + seq, words]``."""
        inner = self.model.model
        image = inner.multi_modal_projector(features)
        words = inner.language_model.embed_tokens(ids).to(image.dtype)
        embedded = torch.cat([words[:, :1], image, words[:, 1:]], 1)
        states = inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(states)
        return logits


# --- figures ------------------------------------------------------------------------------------

Keep = Callable[[scenes.Scene, int], torch.Tensor]
"""Which visual tokens stay, ``[VISUAL]`` bool, of a scene and the number of its question."""


def accuracy(
    model: Any, tokenizer: Any, split: scenes.Split, count: int, keep: Keep | None = None
) -> dict[str, float]:
    """Share of right answers by type of question."""
    right: Counter[str] = Counter()
    asked = scenes.questions(split, count)
    inner = model.model
    with torch.no_grad():
        for i, question in enumerate(asked):
            pixels = scenes.normalized([question.scene.image])
            features = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            image = inner.multi_modal_projector(features[:, 1:])
            if keep is not None:
                image = image[:, keep(question.scene, i)]
            ids = torch.tensor([tokenizer.encode(question.text).ids])
            words = inner.language_model.embed_tokens(ids)
            embedded = torch.cat([words[:, :1], image, words[:, 1:]], 1)
            states = inner.language_model(inputs_embeds=embedded, use_cache=False)
            answer = WORDS[int(model.lm_head(states.last_hidden_state[:, -1]).argmax())]
            right[question.type] += answer == question.answer
    each = count // len(scenes.TYPES)
    return {kind: right[kind] / each for kind in scenes.TYPES}


def mean(by_type: dict[str, float]) -> float:
    return sum(by_type.values()) / len(by_type)


def digits_first(quarter: int) -> Keep:
    """A quarter of the tokens: those on digits, then others at random."""

    def keep(scene: scenes.Scene, number: int) -> torch.Tensor:
        order = torch.rand(VISUAL, generator=torch.Generator().manual_seed(number))
        order = order + 2.0 * scenes.digit_patches(scene).float()
        return _highest(order, quarter)

    return keep


def at_random(quarter: int) -> Keep:
    def keep(scene: scenes.Scene, number: int) -> torch.Tensor:
        return _highest(
            torch.rand(VISUAL, generator=torch.Generator().manual_seed(number)), quarter
        )

    return keep


def _highest(order: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.zeros(VISUAL, dtype=torch.bool)
    kept[order.topk(count).indices] = True
    return kept


def cls_attention(model: Any, count: int = 200) -> dict[str, float]:
    """Share of the CLS token's attention, layer -2, mean of heads, that lies on digits' patches."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    mass = share = 0.0
    with torch.no_grad():
        for question in scenes.questions("test", count, seed=1):
            pixels = scenes.normalized([question.scene.image])
            maps = tower(pixels, output_attentions=True).attentions[-2]
            row = maps[0, :, 0, 1:].mean(0)
            on_digits = scenes.digit_patches(question.scene)
            mass += float(row[on_digits].sum() / row.sum()) / count
            share += float(on_digits.float().mean()) / count
    tower.set_attn_implementation(before)
    return {"cls_attention_on_digits": round(mass, 4), "patches_on_digits": round(share, 4)}


def measure(model: Any, tokenizer: Any, count: int = 2000) -> dict[str, Any]:
    """Test accuracy in bf16 weights, whole and with a quarter of the visual tokens."""
    whole = accuracy(model, tokenizer, "test", count)
    quarter = VISUAL // 4
    asked = scenes.questions("test", count)
    common = {k: Counter(q.answer for q in asked if q.type == k) for k in scenes.TYPES}
    each = count // len(scenes.TYPES)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_questions": count,
        "test_accuracy": round(mean(whole), 4),
        "test_accuracy_by_type": {k: round(v, 4) for k, v in whole.items()},
        "quarter_digits_first": round(mean(accuracy(model, tokenizer, "test", count // 2,
                                                    digits_first(quarter))), 4),
        "quarter_at_random": round(mean(accuracy(model, tokenizer, "test", count // 2,
                                                 at_random(quarter))), 4),
        "most_frequent_answer_by_type": {
            k: round(c.most_common(1)[0][1] / each, 4) for k, c in common.items()
        },
        "most_frequent_answer": round(
            max(Counter(q.answer for q in asked).values()) / count, 4
        ),
        **cls_attention(model),
    }  # fmt: skip


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
               "pad_token": PAD, "unk_token": "<unk>", "image_token": IMAGE}  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n")
    process = {"image_mean": [scenes.MEAN] * 3, "image_std": [scenes.STD] * 3,
               "size": {"height": scenes.IMAGE, "width": scenes.IMAGE},
               "rescale_factor": 1 / 255, "do_resize": True, "do_rescale": True,
               "do_normalize": True, "image_processor_type": "CLIPImageProcessor"}  # fmt: skip
    (out / "preprocessor_config.json").write_text(json.dumps(process, indent=1) + "\n")


if __name__ == "__main__":
    main()

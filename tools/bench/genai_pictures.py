"""``python -m graphwright.tools.bench.genai_pictures --peer-python PYTHON``: the same text?

Small models of the families that onnxruntime-genai knows, with a tokenizer of single letters, are
written plain and in 4 bits for ``genai``; the runtime, in an environment of its own, reads a
picture file or two by the folder's own processor and writes greedily behind a prompt. Its tokens
are held against those of ``model.onnx``, and of a plain folder against those of the library's own
model, on pixels that Pillow has resized and the library's processor has made numbers of; its pixels
against these.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RECIPES = (
    ("", "cpu", "float32"), ("quantize{bits=4 group=32}", "genai", "float32"),
    ("quantize{bits=4 group=32},eora{rank=4}", "genai", "float32"),
    ("", "cpu", "float16"), ("quantize{bits=4 group=32}", "genai", "float16"),
    ("", "cpu", "bfloat16"),
)  # fmt: skip
"""Recipe, target and the type of numbers."""
NEW = 12
PICTURES = ((48, 32), (24, 16), (90, 100))
"""Width and height of the picture files: one has no model's size."""
SHOWN = ((), (0,), (1,), (2,), (0, 1))
"""Which of them a prompt shows."""
ENDS = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
LINES = 3
"""The token of a line's end, which the runtime writes around pictures of Gemma 3."""


@dataclass(frozen=True)
class Words:
    """How pictures stand in prompts of a family."""

    special: Mapping[int, str]
    picture: str
    processor: str
    """The library's, of the kind that needs Pillow alone; empty where it has none."""

    @property
    def all_special(self) -> dict[int, str]:
        return {**ENDS, **self.special}

    def prompt(self, pictures: int) -> str:
        return "ab" + "d".join([self.picture] * pictures) + "cde"


_QWEN = Words({
    93: "<|vision_end|>", 94: "<|vision_start|>", 95: "<|video_pad|>", 96: "<|image_pad|>",
}, "<|vision_start|><|image_pad|><|vision_end|>", "Qwen2VLImageProcessorPil")  # fmt: skip
_MISTRAL = Words(
    {93: "[INST]", 94: "[IMG_END]", 95: "[IMG_BREAK]", 96: "[IMG]"}, "[IMG]",
    "PixtralImageProcessorPil",
)  # fmt: skip
WORDS: Mapping[str, Words] = {
    **dict.fromkeys((
        "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5-vl", "qwen3.5-moe-vl",
    ), _QWEN),
    "gemma3-vl": Words(
        {94: "<end_of_image>", 95: "<start_of_image>", 96: "<image_soft_token>"},
        "<start_of_image>", "Gemma3ImageProcessorPil",
    ),
    **dict.fromkeys(("gemma4-vl", "gemma4-e2b-vl"), Words(
        {92: "<image|>", 93: "<|image>", 94: "<|audio|>", 95: "<|video|>", 96: "<|image|>"},
        "<|image|>", "Gemma4ImageProcessorPil",
    )),
    **dict.fromkeys(("mistral3", "pixtral"), _MISTRAL),
    "phi4-multimodal": Words(
        {200010: "<|endoftext10|>", 200011: "<|endoftext11|>"}, "<|image_1|>",
        "",
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and say of each prompt whether its tokens are equal; 1 where some are not."""
    parser = argparse.ArgumentParser(
        prog="genai_pictures", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", required=True, help="of onnxruntime-genai's environment")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the families")
    options = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, recipe, dtype in _written(Path(scratch), options.only):
            plain = not recipe and dtype == "float32"
            for shown, equal, apart, across in _compared(name, folder, options.peer_python,
                                                         plain=plain):  # fmt: skip
                names = " and ".join("{} x {}".format(*PICTURES[i]) for i in shown)
                verdicts = ", ".join(f"{'equal' if same else 'DIFFERENT'} to {other}"
                                     for other, same in equal.items())  # fmt: skip
                far = f"; pixels apart by {apart:.1e}, across first {across:.1e}" if shown else ""
                sys.stdout.write(f"{name} {recipe or 'as it is'} {dtype}, {names or 'no picture'}: "
                                 f"{verdicts}{far}\n")  # fmt: skip
                right &= all(equal.values())
    return int(not right)


def _written(scratch: Path, only: str) -> Iterator[tuple[str, Path, str, str]]:
    """The artifacts, with picture files beside them."""
    import numpy as np
    import torch
    from PIL import Image

    from ...backends.artifacts.exporting import export
    from ...ir.load.sources import load
    from ...passes.manager import optimize
    from .families import save

    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(PICTURES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(scratch / f"{number}.png")
    for name in WORDS:
        if not fnmatchcase(name, only):
            continue
        source = scratch / name
        save(family(name), source)
        _write_words(source, WORDS[name].all_special)
        for recipe, target, dtype in RECIPES:
            graph = load(source, dtype=getattr(torch, dtype))
            form, texts = ("-eora", _texts(graph)) if "eora" in recipe else ("", None)
            graph = optimize(graph, recipe, calibration=texts).graph if recipe else graph
            out = export(graph, scratch / f"{name}-{target}-{dtype}{form}", target=target)
            yield name, out, recipe, dtype


def _texts(graph: Any) -> list[dict[str, Any]]:
    """What passes learn from: rows of letters behind an image each."""
    import torch

    types = graph.input_types()
    pixels, generator = types["pixel_values"], torch.Generator().manual_seed(0)
    words = torch.randint(5, 90, (4, 24), generator=generator)
    image = torch.tensor(graph.source.prompt).expand(4, -1)
    ids = torch.cat([words[:, :2], image, words[:, 2:]], 1)
    drawn = torch.rand(4, *pixels.shape[1:], generator=generator).to(pixels.dtype)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": drawn}]


def family(name: str) -> Any:
    """A small model of a family; of Gemma 3 with as many tokens an image as the runtime writes, of
    Gemma 4 with a number of them that the library's processor knows."""
    from .family_models import FAMILIES

    found = FAMILIES[name]
    sizes: Any = found.sizes
    if name.startswith("gemma4"):
        vision = sizes["vision_config"] | {"image_size": [56, 80], "position_embedding_size": 32}
        text = sizes["text_config"] | {"max_position_embeddings": 1024, "sliding_window": 64}
        return replace(found, sizes={**sizes, "vision_config": vision, "text_config": text})
    if name == "phi4-multimodal":
        vision = sizes["vision_config"] | {
            "image_size": 448, "crop_size": 448, "patch_size": 14, "image_token_id": 200010}
        return replace(found, sizes={
            **sizes, "vision_config": vision, "vocab_size": 200064, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "image_grid_pinpoints": [[448, 448]]})
    if name != "gemma3-vl":
        return found
    vision = sizes["vision_config"] | {"image_size": 64}
    text = sizes["text_config"] | {"max_position_embeddings": 1024, "sliding_window": 64}
    return replace(found, sizes={
        **sizes, "vision_config": vision, "text_config": text, "mm_tokens_per_image": 256,
    })  # fmt: skip


def _write_words(folder: Path, special: Mapping[int, str]) -> None:
    """A tokenizer in which a letter is a token, and the special ones have the model's ids."""
    letters = iter([chr(code) for code in range(33, 127)])
    vocab = {next(letters): i for i in range(97) if i not in {*special, LINES}}
    vocab["\u010a"] = LINES  # a line's end, as bytes are written
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {i: {"content": text, **flags, "special": True} for i, text in special.items()}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": True}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "pre_tokenizer": bytewise, "post_processor": bytewise, "decoder": bytewise,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }))  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "eos_token": special[2],
        "pad_token": special[0], "added_tokens_decoder": {str(i): t for i, t in added.items()},
    }))  # fmt: skip


def _compared(
    name: str, folder: Path, python: str, *, plain: bool
) -> Iterator[tuple[tuple[int, ...], dict[str, bool], float, float]]:
    """For each prompt what it shows, with whose tokens the runtime's agree, and how far apart
    pixels are, also from those that are resized across before they are down, as the runtime does
    it: Pillow since 13 begins with the side that it shrinks more."""
    import torch

    from ...backends.registry import compile
    from ...ir.load.sources import load
    from .processes import environment, measure

    size = _size(folder)
    run, found = compile(folder), folder.parent / "found.json"
    prompts = [WORDS[name].prompt(len(shown)) for shown in SHOWN]
    measure([python, "-P", __file__, str(folder), json.dumps(prompts), str(found)],
            environment(None, {"PYTHONPATH": ""}))  # fmt: skip
    library: Any = load(folder.parent / name).source.original if plain else None
    model = None if library is None else library.make()
    written = load(folder)
    types = written.input_types()
    for shown, prompt, pixels, tokens in json.loads(found.read_text()):
        images = [_pixels(folder, number, size) for number in shown]
        whole = torch.stack(images) if images else torch.zeros(0, 3, size[1], size[0])
        if (types["pixel_values"].rank or 0) > 4:  # one crop, and the image as a whole
            whole = torch.stack([whole, whole], 1)
        # Phi-4's processor needs torchvision.
        words = WORDS[name].processor
        taken = _taken(words, folder, shown, size) if words else whole
        equal = {"model.onnx": _tokens(run, prompt, whole.to(types["pixel_values"].dtype),
                                              len(tokens)) == tokens}
        if model is not None:
            own = _library_tokens(model, prompt, whole, taken, len(tokens))
            equal["the library"] = own == tokens[: len(own)]
        gaps = [0.0, 0.0]
        if shown:
            across = _taken(words, folder, shown, size, across=True) if words else whole
            gaps = [float((torch.tensor(pixels) - other.flatten()).abs().max())
                    for other in (taken, across)]  # fmt: skip
        equal = {other: same and bool(tokens) for other, same in equal.items()}
        yield tuple(shown), equal, gaps[0], gaps[1]


def _size(folder: Path) -> tuple[int, int]:
    """Width and height that the folder's processor gives a picture."""
    steps = json.loads((folder / "genai_processor.json").read_text())["processor"]["transforms"]
    attrs: dict[str, int] = next(step["operation"]["attrs"] for step in steps
                                 if step["operation"]["type"] == "Resize")  # fmt: skip
    return attrs["width"], attrs["height"]


def _taken(
    name: str, folder: Path, shown: Sequence[int], size: tuple[int, int], *, across: bool = False
) -> Any:
    """What the library's processor makes of pictures of the right size."""
    import torch

    if not shown:
        return torch.zeros(0)
    config = json.loads((folder / "config.json").read_text())
    vision, merge = config["vision_config"], config.get("spatial_merge_size", 1)
    kind = getattr(importlib.import_module("transformers"), name)
    statistics = dict(zip(("image_mean", "image_std"), _statistics(folder), strict=True))
    if name.startswith("Qwen"):
        make = kind(patch_size=vision["patch_size"], merge_size=vision["spatial_merge_size"],
                    temporal_patch_size=vision["temporal_patch_size"], min_pixels=1,
                    **statistics)  # fmt: skip
    elif name.startswith("Pixtral"):
        side = vision["patch_size"] * merge
        make = kind(size={"longest_edge": max(size)}, patch_size={"height": side, "width": side})
    elif name.startswith("Gemma4"):
        make = kind(patch_size=vision["patch_size"], max_soft_tokens=70,
                    pooling_kernel_size=vision["pooling_kernel_size"])  # fmt: skip
    else:
        make = kind(size={"height": size[1], "width": size[0]})
    pictures = [_sized(folder, number, size, across=across) for number in shown]
    return torch.as_tensor(make(pictures, return_tensors="pt")["pixel_values"])


def _statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    from ...backends.artifacts.genai_kinds import kind_of

    return kind_of(json.loads((folder / "config.json").read_text())).statistics


def _library_tokens(
    model: Any, prompt: list[int], images: Any, taken: Any, count: int
) -> list[int]:
    """What the library's model writes, the whole sequence a step, of its processor's pixels; up to
    a placeholder that it writes, for which it would want an image."""
    import torch

    from ...ir.load.hf.pictures import as_the_library_takes

    tokens: list[int] = []
    while len(tokens) < count:
        ids = torch.tensor([prompt + tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = as_the_library_takes(model, inputs | ({"pixel_values": images} if len(images)
                                                      else {}))  # fmt: skip
        if len(images):
            key = next(key for key in given if key.endswith("pixel_values"))
            given[key] = taken.reshape(given[key].shape)
        with torch.no_grad():
            tokens.append(int(model(**given).logits[0, -1].argmax()))
        if tokens[-1] == model.config.image_token_id:
            break
    return tokens


def _tokens(run: Any, prompt: list[int], images: Any, count: int) -> list[int]:
    """What ``model.onnx`` writes, word by word with its cache."""
    import torch

    from ...ir.structure.cache_slots import past_of

    feeds = {"input_ids": torch.tensor([prompt]), "pixel_values": images}
    caches: dict[str, Any] = {}
    tokens: list[int] = []
    while len(tokens) < count:
        mask = torch.ones(1, len(prompt) + len(tokens), dtype=torch.int64)
        outputs = run(**feeds, attention_mask=mask, **caches)
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        caches = {past_of(n): t for n, t in outputs.items() if n.startswith("present")}
        feeds = {"input_ids": torch.tensor([tokens[-1:]]), "pixel_values": images[:0]}
    return tokens


def _sized(folder: Path, number: int, size: tuple[int, int], *, across: bool = False) -> Any:
    from PIL import Image

    from ...backends.artifacts.genai_kinds import kind_of

    kind = kind_of(json.loads((folder / "config.json").read_text()))
    method = Image.Resampling(kind.resample)
    with Image.open(folder.parent / f"{number}.png") as image:
        picture: Any = image.resize((size[0], image.height), method) if across else image
        return picture.resize(size, method)


def _pixels(folder: Path, number: int, size: tuple[int, int]) -> Any:
    import numpy as np
    import torch

    mean, std = map(torch.tensor, _statistics(folder))
    sized = np.asarray(_sized(folder, number, size)).astype(np.float32)
    return ((torch.from_numpy(sized / 255) - mean) / std).permute(2, 0, 1)


def peer(folder: str, prompts: str, out: str) -> None:
    """In the other environment: what onnxruntime-genai reads and writes."""
    import numpy as np
    import onnxruntime_genai as library

    model = library.Model(folder)
    processor, rows = model.create_multimodal_processor(), []
    for shown, text in zip(SHOWN, json.loads(prompts), strict=True):
        files = [str(Path(folder).parent / f"{number}.png") for number in shown]
        given = processor(text, images=library.Images.open(*files) if files else None)
        prompt = [int(i) for i in np.array(given["input_ids"].as_numpy()).flatten()]
        pixels = (np.array(given["pixel_values"].as_numpy()).flatten().tolist() if files else [])
        settings = library.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
        running = library.Generator(model, settings)
        running.set_inputs(given)
        while not running.is_done():
            running.generate_next_token()
        tokens = [int(i) for i in running.get_sequence(0)][len(prompt) :]
        rows.append((shown, prompt, pixels, tokens))
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    # By its path, as the other environment runs it, it is in no package.
    sys.exit(main()) if __package__ else peer(*sys.argv[1:])

"""``python -m graphwright.tools.bench.genai_pictures --peer-python PYTHON``: the same text?

Small models of Qwen's line, with a tokenizer of single letters, are written plain and in 4 bits for
``genai``; onnxruntime-genai, in an environment of its own, reads a picture file or two by the
folder's own processor and writes greedily behind a prompt. Its tokens are held against those of
``model.onnx``, on pixels that Pillow has resized, and its pixels against these.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2-vl", "qwen2.5-vl")
RECIPES = (("", "cpu"), ("quantize{bits=4 group=32}", "genai"))
NEW = 12
PICTURES = ((48, 32), (24, 16), (90, 100))
"""Width and height of the picture files: one has no model's size."""
SHOWN = ((0,), (1,), (2,), (0, 1))
"""Which of them a prompt shows."""
SPECIAL = {
    0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 93: "<|vision_end|>",
    94: "<|vision_start|>", 95: "<|video_pad|>", 96: "<|image_pad|>",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and say of each prompt whether its tokens are equal; 1 where some are not."""
    parser = argparse.ArgumentParser(
        prog="genai_pictures", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", required=True, help="of onnxruntime-genai's environment")
    options = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        for folder, what in _written(Path(scratch)):
            for shown, equal, apart in _compared(folder, options.peer_python):
                names = " and ".join("{} x {}".format(*PICTURES[i]) for i in shown)
                words = "equal" if equal else "DIFFERENT"
                sys.stdout.write(f"{what}, {names}: {words}, pixels apart by {apart:.1e}\n")
                right &= equal
    return int(not right)


def _written(scratch: Path) -> Iterator[tuple[Path, str]]:
    """The artifacts, with picture files beside them."""
    import numpy as np
    from PIL import Image

    from ...backends.artifacts.exporting import export
    from ...ir.load.sources import load
    from ...passes.manager import optimize
    from .families import save
    from .family_models import FAMILIES as known

    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(PICTURES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(scratch / f"{number}.png")
    for name in FAMILIES:
        source = scratch / name
        save(known[name], source)
        _write_words(source)
        for recipe, target in RECIPES:
            graph = load(source)
            graph = optimize(graph, recipe).graph if recipe else graph
            out = export(graph, scratch / f"{name}-{target}", target=target)
            yield out, f"{name} {recipe or 'as it is'}"


def _write_words(folder: Path) -> None:
    """A tokenizer in which a letter is a token, and the special ones have the model's ids."""
    letters = iter([chr(code) for code in range(33, 127)])
    vocab = {next(letters): i for i in range(97) if i not in SPECIAL}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {i: {"content": text, **flags, "special": True} for i, text in SPECIAL.items()}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": True}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "pre_tokenizer": bytewise, "post_processor": bytewise, "decoder": bytewise,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }))  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0], "added_tokens_decoder": {str(i): t for i, t in added.items()},
    }))  # fmt: skip


def _compared(folder: Path, python: str) -> Iterator[tuple[tuple[int, ...], bool, float]]:
    """For each prompt what it shows, whether tokens agree, and how far apart pixels are."""
    import torch

    from ...backends.artifacts.pictured import pictures_of
    from ...backends.registry import compile
    from ...ir.load.hf_qwen_vl import patch_rows
    from ...ir.load.sources import load
    from .processes import environment, measure

    pictures = pictures_of(load(folder).metadata())
    assert pictures is not None
    run, found = compile(folder), folder.parent / "found.json"
    measure([python, "-P", __file__, str(folder), str(found)],
            environment(None, {"PYTHONPATH": ""}))  # fmt: skip
    squares = pictures.side, pictures.merge, pictures.frames
    for shown, prompt, pixels, tokens in json.loads(found.read_text()):
        images = torch.stack([_pixels(folder, pictures, number) for number in shown])
        rows = patch_rows(images, (pictures.rows, pictures.columns), squares).flatten()
        own = _tokens(run, prompt, images, len(tokens))
        apart = float((torch.tensor(pixels) - rows).abs().max())
        yield tuple(shown), bool(tokens) and own == tokens, apart


def _tokens(run: Any, prompt: list[int], images: Any, count: int) -> list[int]:
    """What ``model.onnx`` writes, word by word with its cache."""
    import torch

    feeds = {"input_ids": torch.tensor([prompt]), "pixel_values": images}
    caches: dict[str, Any] = {}
    tokens: list[int] = []
    while len(tokens) < count:
        mask = torch.ones(1, len(prompt) + len(tokens), dtype=torch.int64)
        outputs = run(**feeds, attention_mask=mask, **caches)
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        caches = {n.replace("present", "past_key_values"): t
                  for n, t in outputs.items() if n.startswith("present")}  # fmt: skip
        feeds = {"input_ids": torch.tensor([tokens[-1:]]), "pixel_values": images[:0]}
    return tokens


def _pixels(folder: Path, pictures: Any, number: int) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    from ...backends.artifacts.genai_pictures import MEAN, STD

    with Image.open(folder.parent / f"{number}.png") as image:
        sized = image.resize((pictures.width, pictures.height), Image.Resampling.BICUBIC)
    whole = torch.from_numpy(np.asarray(sized).astype(np.float32) / 255)
    return ((whole - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def peer(folder: str, out: str) -> None:
    """In the other environment: what onnxruntime-genai reads and writes."""
    import numpy as np
    import onnxruntime_genai as library

    model = library.Model(folder)
    processor, rows = model.create_multimodal_processor(), []
    for shown in SHOWN:
        files = [str(Path(folder).parent / f"{number}.png") for number in shown]
        text = "ab" + "<|vision_start|><|image_pad|><|vision_end|>" * len(shown) + "cde"
        given = processor(text, images=library.Images.open(*files))
        prompt = [int(i) for i in np.array(given["input_ids"].as_numpy()).flatten()]
        pixels = np.array(given["pixel_values"].as_numpy()).flatten().tolist()
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

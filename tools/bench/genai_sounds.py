"""``python -m graphwright.tools.bench.genai_sounds --peer-python PYTHON``: the same text of sounds?

A small random Phi-4-multimodal is written plain, in 4 bits for ``genai``, in float16 and in
bfloat16; onnxruntime-genai, in an environment of its own, reads sound files, alone and beside a
picture, and writes greedily. Its tokens are held against those of the library's own model in
float32 on the frames that its feature extractor makes (of the plain folder alone), and of the
folder's parts in ONNX Runtime here on the runtime's; its frames against the extractor's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPES = (
    ("", "cpu", "float32"), ("quantize{bits=4 group=32}", "genai", "float32"),
    ("", "cpu", "float16"), ("", "cpu", "bfloat16"),
)  # fmt: skip
NEW = 12
SAMPLES = (20000, 33333)
"""Of the sound files, at 16 kHz."""
SHOWN: tuple[tuple[tuple[int, ...], bool], ...] = (
    ((), False), ((0,), False), ((0, 1), False), ((1,), True)
)  # fmt: skip
"""Which sounds a prompt has, and whether a picture."""
GIVEN = ("audio_embeds", "audio_attention_mask", "audio_sizes", "audio_projection_mode",
         "pixel_values", "image_attention_mask", "image_sizes")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and say of each prompt whether its tokens are equal; 1 where some are not."""
    parser = argparse.ArgumentParser(
        prog="genai_sounds", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", required=True, help="of onnxruntime-genai's environment")
    options = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        for folder, recipe, dtype in _written(Path(scratch)):
            for what, equal, apart in _compared(folder, options.peer_python, plain=not recipe
                                                and dtype == "float32"):  # fmt: skip
                verdicts = ", ".join(f"{'equal' if same else 'DIFFERENT'} to {other}"
                                     for other, same in equal.items())  # fmt: skip
                sys.stdout.write(f"{recipe or 'as it is'} {dtype}, {what}: {verdicts}; frames "
                                 f"apart by {apart:.1e}\n")  # fmt: skip
                right &= all(equal.values())
    return int(not right)


def _written(scratch: Path) -> Iterator[tuple[Path, str, str]]:
    """The artifacts, with sound files and a picture beside them."""
    import numpy as np
    import torch
    from PIL import Image

    from ...backends.artifacts.exporting import export
    from ...ir.load.sources import load
    from ...passes.manager import optimize
    from .families import save
    from .genai_pictures import WORDS, _write_words, family

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)).save(scratch / "0.png")
    for number, count in enumerate(SAMPLES):
        times = np.arange(count) / 16000
        tone = 0.3 * np.sin(880 * np.pi * times * (1 + times)) + 0.05 * rng.standard_normal(count)
        with wave.open(str(scratch / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((tone * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    made = family("phi4-multimodal")
    audio = made.sizes["audio_config"] | {
        "input_size": 80, "nemo_final_size": 10, "audio_token_id": 200011}
    source = scratch / "model"
    save(replace(made, sizes={**made.sizes, "audio_config": audio}), source)
    _write_words(source, WORDS["phi4-multimodal"].all_special)
    for recipe, target, dtype in RECIPES:
        graph = load(source, dtype=getattr(torch, dtype))
        graph = optimize(graph, recipe).graph if recipe else graph
        yield export(graph, scratch / f"{target}-{dtype}", target=target), recipe, dtype


def _compared(
    folder: Path, python: str, *, plain: bool
) -> Iterator[tuple[str, dict[str, bool], float]]:
    """For each prompt what it has, with whose tokens the runtime's agree, and how far apart frames
    are."""
    import torch

    from ...backends.registry import compile
    from ...ir.load.sources import load
    from .processes import environment, measure

    found = folder.parent / "found.json"
    measure([python, "-P", __file__, str(folder), str(found)],
            environment(None, {"PYTHONPATH": ""}))  # fmt: skip
    library: Any = load(folder.parent / "model").source.original if plain else None
    model = None if library is None else library.make()
    parts = {name: compile(folder / f"{name}.onnx")
             for name in ("vision", "speech", "embedding", "text")}  # fmt: skip
    for (sounds, seen), row in zip(SHOWN, json.loads(found.read_text()), strict=True):
        given = {name: torch.tensor(row[name]) for name in GIVEN if name in row}
        ids, tokens = torch.tensor(row["input_ids"]), row["tokens"]
        frames = _frames(folder.parent, sounds)
        equal = {"its parts": _tokens(parts, ids, given, len(tokens)) == tokens}
        if model is not None:
            equal["the library"] = _library_tokens(model, ids, given, frames, len(tokens)) == tokens
        apart = 0.0
        if sounds:
            mask = given["audio_attention_mask"].bool()
            gap = given["audio_embeds"] - frames["audio_input_features"]
            apart = float(gap[mask].abs().max())
        words = [f"{len(sounds)} sounds" if sounds else "no sound"] + ["a picture"] * seen
        yield " and ".join(words), {k: same and bool(tokens) for k, same in equal.items()}, apart


def _frames(scratch: Path, sounds: Sequence[int]) -> Mapping[str, Any]:
    """What the library's extractor makes of the files."""
    import numpy as np
    from transformers import Phi4MultimodalFeatureExtractor

    if not sounds:
        return {}
    clips = []
    for number in sounds:
        with wave.open(str(scratch / f"{number}.wav")) as file:
            raw = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        clips.append(raw.astype(np.float32) / 32768)
    made: Mapping[str, Any] = Phi4MultimodalFeatureExtractor()(
        clips, sampling_rate=16000, return_tensors="pt"
    )
    return made


def _library_tokens(
    model: Any, ids: Any, given: Mapping[str, Any], frames: Mapping[str, Any], count: int
) -> list[int]:
    """What the library's model writes, the whole sequence a step, of its extractor's frames."""
    import torch

    beside = dict(frames)
    if "pixel_values" in given:
        beside |= {"image_pixel_values": given["pixel_values"],
                   "image_sizes": given["image_sizes"].long(),
                   "image_attention_mask": given["image_attention_mask"].long()}  # fmt: skip
    tokens: list[int] = []
    while len(tokens) < count:
        whole = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], 1)
        with torch.no_grad():
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole),
                           use_cache=False, **beside).logits  # fmt: skip
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def _tokens(parts: Mapping[str, Any], ids: Any, given: Mapping[str, Any], count: int) -> list[int]:
    """What the parts write in ONNX Runtime here, the whole sequence a step."""
    import torch

    rows = {}
    for part, name in (("vision", "image_features"), ("speech", "audio_features")):
        type_ = parts["embedding"].input_types[name]
        rows[name] = torch.zeros(0, type_.shape[-1], dtype=type_.dtype)
        types = parts[part].input_types
        if all(put in given for put in types):
            feeds = {put: given[put].to(type_.dtype) for put, type_ in types.items()}
            rows[name] = parts[part](**feeds)[name]
    tokens: list[int] = []
    while len(tokens) < count:
        whole = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], 1).long()
        stream = parts["embedding"](input_ids=whole, **rows)["inputs_embeds"]
        mask = torch.ones_like(whole)
        logits = parts["text"](inputs_embeds=stream, attention_mask=mask)["logits"]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def peer(folder: str, out: str) -> None:
    """In the other environment: what onnxruntime-genai reads and writes."""
    import numpy as np
    import onnxruntime_genai as library

    model = library.Model(folder)
    processor, rows = model.create_multimodal_processor(), []
    for sounds, seen in SHOWN:
        heard = "d".join(f"<|audio_{place}|>" for place in range(1, len(sounds) + 1))
        files = [str(Path(folder).parent / f"{number}.wav") for number in sounds]
        given: Any = {"audios": library.Audios.open(*files)} if files else {}
        if seen:
            given["images"] = library.Images.open(str(Path(folder).parent / "0.png"))
        fed = processor(f"ab{'<|image_1|>' if seen else ''}{heard}cde", **given)
        row = {}
        for name in ("input_ids", *GIVEN):
            try:
                row[name] = np.array(fed[name].as_numpy()).astype(float).tolist()
            except Exception:  # a prompt without such
                continue
        ids = [[int(i) for i in line] for line in row["input_ids"]]
        settings = library.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids[0]) + NEW, do_sample=False)
        running = library.Generator(model, settings)
        running.set_inputs(fed)
        while not running.is_done():
            running.generate_next_token()
        tokens = [int(i) for i in running.get_sequence(0)][len(ids[0]) :]
        rows.append({**row, "input_ids": ids, "tokens": tokens})
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    # By its path, as the other environment runs it, it is in no package.
    sys.exit(main()) if __package__ else peer(*sys.argv[1:])

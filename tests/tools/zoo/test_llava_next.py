"""``zoo:tiny-llava-next`` with what uses it: questions, image files, calibration data, passes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends.generation.decode import Sampling
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.load.zoo import scenes
from graphwright.ir.load.zoo.tiny_vision import LLAVA_NEXT
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.data.calibration import read
from graphwright.tools.data.images import Preprocessing
from graphwright.tools.evaluate import Subject, evaluate
from graphwright.tools.evaluate.pictures import example_batch, scene_size
from graphwright.tools.run.generating import Writer

from ...ir.load.hf.test_llava import IMAGE, save_llava

TOKENS = 5 * 144


@pytest.fixture(scope="module")
def model() -> View:
    return gw.load("zoo:tiny-llava-next", cache=False)


def test_the_graph_and_its_artifact_are_the_library_s_model(model: View, tmp_path: Path) -> None:
    import onnxruntime

    assert [str(model.type(v)) for v in model.inputs()] == [
        "i64[batch, seq]", "i64[batch, seq]", "f32[batch, 5, 3, 96, 96]"
    ]  # fmt: skip
    assert [str(model.type(v)) for v in model.outputs()] == ["f32[batch, seq, 36]"]
    source = model.source
    assert (source.kind, source.name, source.task, source.folder) == (
        "zoo", "zoo:tiny-llava-next", "image-text-to-text", str(LLAVA_NEXT)
    )  # fmt: skip
    assert sum(len(next(iter(batch.values()))) for batch in source.samples) == 32
    assert {w.dtype for w in model.weights().values() if w.dtype.is_floating_point} == {
        torch.float32
    }  # fmt: skip
    feeds = {name: value[:2] for name, value in source.samples[0].items()}
    cls = importlib.import_module("transformers").LlavaForConditionalGeneration
    eager = cls.from_pretrained(LLAVA_NEXT, dtype=torch.float32).eval()
    flat = feeds | {"pixel_values": feeds["pixel_values"].flatten(0, 1)}  # crops are images there
    with torch.no_grad():
        expected = eager(**flat).logits
    gw.export(model, tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (exported,) = session.run(["logits"], {k: v.numpy() for k, v in feeds.items()})
    real = feeds["attention_mask"].bool()  # where there is padding nothing is promised
    for logits in (sweep(model, feeds)["logits"], torch.from_numpy(exported)):
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_each_block_s_attention_is_recognised(model: View) -> None:
    view = model.copy()
    canonicalize(view)
    assert len(recognize(view).attentions) == 11, "the tower's last layer is not used"


def test_it_answers_questions_about_large_scenes(model: View) -> None:
    """The most frequent answer is right in 13 % of cases; 40 questions tell by 10 points or so."""
    vqa = evaluate(model, "vqa", samples=40)["vqa"]
    assert vqa.figures["accuracy"] > 0.8, vqa.detail
    assert vqa.samples == 40 and set(vqa.detail) == set(scenes.TYPES)


@pytest.mark.parametrize("batch", [1, 3])
def test_timing_runs_on_large_scenes(model: View, batch: int) -> None:
    inputs = example_batch(Subject.of(model), batch)
    assert inputs["pixel_values"].shape == (batch, 5, 3, 96, 96)


def test_an_executable_is_known_by_its_config(model: View) -> None:
    assert model.source.folder is not None
    subject = Subject.of(gw.compile(model, backend="eager"), tokenizer=model.source.folder)
    assert subject.view is None and scene_size(subject) == scenes.LARGE


def test_a_quarter_of_each_picture(model: View) -> None:
    sample = {name: value[:2] for name, value in model.source.samples[0].items()}
    result = gw.optimize(model, "fastervlm{keep=25%}", samples=[sample])
    assert result.report.passes[0].result.sites[0].shape == (TOKENS, TOKENS // 4)
    accuracy = evaluate(result.graph, "vqa", samples=24)["vqa"].figures["accuracy"]
    assert accuracy > 0.6, accuracy


# --- files and data -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked() -> scenes.Question:
    return scenes.questions("test", 1, seed=3, size=scenes.LARGE)[0]


@pytest.fixture(scope="module")
def picture(asked: scenes.Question, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("images") / "scene.png"
    pixels = (asked.scene.image * 255).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(path)
    return path


def test_an_image_file_is_cut_as_scenes_are(
    model: View, picture: Path, asked: scenes.Question
) -> None:
    pixels = Preprocessing.of(model).read(picture)
    expected = scenes.normalized([scenes.crops(asked.scene.image)])[0]
    # Half a step of 255 is lost in the file.
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.51 / 255 / scenes.STD)


def test_an_image_of_another_size(model: View, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 31), (255, 0, 0)).save(tmp_path / "red.png")
    pixels = Preprocessing.of(model).read(tmp_path / "red.png")
    assert pixels.shape == (5, 3, 96, 96)
    colour = (torch.tensor([1.0, 0, 0]) - scenes.MEAN) / scenes.STD
    torch.testing.assert_close(pixels, colour[:, None, None].expand(5, -1, 96, 96))


def test_text_is_generated_from_an_image_in_crops(tmp_path: Path, picture: Path) -> None:
    """By a small random model: five crops of 24 pixels, 9 tokens each."""
    tokenizers: Any = importlib.import_module("tokenizers")
    save_llava(tmp_path, image_seq_length=45)
    words = tokenizers.models.WordLevel({"<s>": 1, "what": 2, "is": 3, "<image>": IMAGE})
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    graph = gw.load(tmp_path, cache=True)
    pixels = Preprocessing.of(graph).read(picture)
    assert pixels.shape == (5, 3, 24, 24)
    writer = Writer(graph)
    answer, same = writer.write(["what"] * 2, [picture, pixels], Sampling(), max_new_tokens=3)
    assert answer.ids == same.ids and len(answer.ids) == 3
    assert answer.prompt_tokens == 46
    with pytest.raises(BadInput, match=r"an image is \[3, 24, 24\], the graph takes \[5, 3, 24"):
        writer.write(["what"], [pixels[0]], Sampling(), max_new_tokens=1)


def test_its_calibration_data(model: View) -> None:
    samples = read("zoo:tiny-llava-next", model, samples=9)
    assert samples.entry().samples == 9
    assert samples.batches[0]["pixel_values"].shape == (8, 5, 3, 96, 96)
    with pytest.raises(BadInput, match="pixel_values"):
        read("zoo:tiny-llava", model, samples=9)

"""Decoding in ONNX Runtime: by the cache as by the whole text, as transformers does it."""

from __future__ import annotations

import importlib
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from graphwright.backends import Executable, compile
from graphwright.backends.generation import steps
from graphwright.backends.generation.decode import Decoder
from graphwright.backends.generation.sampling import FLOOR, Chooser, Sampling, candidates
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.types import Type
from graphwright.ir.fx.view import FxView
from graphwright.ir.load.sources import load
from graphwright.ir.structure.cache_slots import PARTS, past_name, present_name

transformers: Any = importlib.import_module("transformers")

TEXTS = {"llama": 1, "qwen2": 1, "gemma2": 2, "gpt2": 1}
"""Families and their numbers of layers."""
WORDS, CONTEXT, IMAGE, TOKENS = 97, 64, 96, 9
STEPS = 18
LENGTHS = ([5], [7, 1, 4, 7])


def llava() -> Any:
    """A small LLaVA with random weights; the last of its words stands for an image's feature."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=24, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        ),
        image_token_id=IMAGE, image_seq_length=TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def folders(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the library's model, and the folder that it is saved in."""
    by_name = {}
    for name in (*TEXTS, "llava"):
        folder = tmp_path_factory.mktemp(name)
        layers = TEXTS.get(name, 1)
        model = llava() if name == "llava" else getattr(models, name)(layers).module.model
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        by_name[name] = model.eval(), folder
    return by_name


@pytest.fixture(scope="module")
def cached(folders: dict[str, Any]) -> dict[str, Executable]:
    return {name: compile(load(path, cache=True)) for name, (_, path) in folders.items()}


@pytest.fixture(scope="module")
def whole(folders: dict[str, Any]) -> dict[str, Executable]:
    """Graphs without a cache, in the reference interpreter."""
    graphs = {name: load(folders[name][1], cache=False) for name in ("llama", "llava")}
    return {name: compile(graph, backend="eager") for name, graph in graphs.items()}


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, IMAGE, (n,), generator=rng).tolist() for n in lengths]


def columns(steps: Any) -> list[list[int]]:
    """The tokens of each row."""
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


class Recorded:
    """An executable that keeps what went in and what came out."""

    def __init__(self, run: Executable) -> None:
        self.run = run
        self.input_names, self.output_names = run.input_names, run.output_names
        self.input_types = run.input_types
        self.inputs: list[dict[str, torch.Tensor]] = []
        self.outputs: list[dict[str, torch.Tensor]] = []

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.inputs.append(inputs)
        self.outputs.append(self.run(*args, **inputs))
        return self.outputs[-1]


def one_shot(model: Any, texts: list[list[int]], **more: Any) -> list[torch.Tensor]:
    """Logits of each text alone, without padding and without a cache."""
    with torch.no_grad():
        return [model(torch.tensor([t]), use_cache=False, **more).logits[0] for t in texts]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_logits_of_all_steps_are_the_one_shot_forwards(
    name: str, lengths: list[int], folders: Any, cached: Any
) -> None:
    run = Recorded(cached[name])
    asked = prompts(lengths)
    grown = columns(Decoder(run, CONTEXT).decode(asked, max_new_tokens=STEPS))
    texts = [prompt + tokens for prompt, tokens in zip(asked, grown, strict=True)]
    expected = one_shot(folders[name][0], texts)
    assert len(run.outputs) == STEPS and [len(tokens) for tokens in grown] == [STEPS] * len(asked)
    for step, outputs in enumerate(run.outputs):
        for row, prompt in enumerate(asked):
            logits = expected[row][len(prompt) - 1 + step]
            torch.testing.assert_close(outputs["logits"][row, -1], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_greedy_text_is_the_librarys(lengths: list[int], folders: Any, cached: Any) -> None:
    asked, longest = prompts(lengths), max(lengths)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
    for name in TEXTS:
        expected = folders[name][0].generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False,
            pad_token_id=0,
        )[:, longest:]  # fmt: skip
        steps = Decoder(cached[name], CONTEXT).decode(asked, max_new_tokens=STEPS)
        assert columns(steps) == expected.tolist(), name


def test_the_cache_is_bound_where_it_lies(cached: Any) -> None:
    run = Recorded(cached["gemma2"])
    list(Decoder(run).decode(prompts([5, 2]), max_new_tokens=4))
    for outputs, inputs in zip(run.outputs, run.inputs[1:], strict=False):
        assert inputs["input_ids"].shape == (2, 1)
        for slot in range(2):
            for part in PARTS:
                assert inputs[past_name(slot, part)] is outputs[present_name(slot, part)]
    assert [g["attention_mask"].shape[1] for g in run.inputs] == [5, 6, 7, 8]
    assert not any(name.startswith("past") for name in run.inputs[0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bound_steps_are_plain_steps(
    name: str, cached: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that take turns and grow within the text, against outputs that the runtime makes."""
    monkeypatch.setattr(steps, "ROOM", 4)
    asked = prompts([7, 1, 4])
    free: list[list[torch.Tensor]] = []
    for run in (cached[name], Recorded(cached[name])):
        heard: list[torch.Tensor] = []
        monkeypatch.setattr(Chooser, "__call__", partial(_hear, heard))
        list(Decoder(run).decode(asked, max_new_tokens=STEPS))
        free.append(heard)
    assert len(free[0]) == STEPS
    for bound, plain in zip(*free, strict=True):
        torch.testing.assert_close(bound, plain, rtol=1e-5, atol=1e-6)


def _hear(heard: list[torch.Tensor], logits: torch.Tensor) -> list[int]:
    heard.append(logits.clone())
    return [5 + len(heard)] * len(logits)


WINDOW = """
<ir_version: 9, opset_import: ["" : 17]>
window (
    int64[batch,seq] input_ids, float[batch,1,past,1] past_key, float[batch,1,past,1] past_value
)
    => (
    float[batch,seq,8] logits,
    float[batch,1,kept,1] present_key, float[batch,1,kept,1] present_value
)
<int64[4] shape = {0, 1, -1, 1}, int64[1] begin = {-3}, int64[1] end = {99}, int64[1] axis = {2},
 int64 words = {8}, float[2] onoff = {0, 1}> {
    read = Cast<to = 1>(input_ids)
    column = Reshape(read, shape)
    keys = Concat<axis = 2>(past_key, column)
    values = Concat<axis = 2>(past_value, column)
    present_key = Slice(keys, begin, end, axis)
    present_value = Slice(values, begin, end, axis)
    seen = ReduceSum<keepdims = 0>(present_key)
    next = Cast<to = 7>(seen)
    word = Mod(next, words)
    shifted = Add(input_ids, word)
    chosen = Mod(shifted, words)
    logits = OneHot<axis = -1>(chosen, words, onoff)
}
"""


def test_a_cache_that_keeps_a_window(tmp_path: Path) -> None:
    """It does not grow by what is read, and the text goes on all the same."""
    model = onnx.parser.parse_model(WINDOW)
    for part in PARTS:  # ONNX's text has no names with dots
        for node in model.graph.node:
            named = {f"past_{part}": past_name(0, part), f"present_{part}": present_name(0, part)}
            for names in (node.input, node.output):
                names[:] = [named.get(name, name) for name in names]
        for value in (*model.graph.input, *model.graph.output):
            value.name = named.get(value.name, value.name)
    onnx.save(model, tmp_path / "window.onnx")
    run = compile(tmp_path / "window.onnx")
    text = [3, 1]
    for _ in range(9):
        text.append((text[-1] + sum(text[-3:])) % 8)
    assert columns(Decoder(run).decode([[3, 1]], max_new_tokens=9)) == [text[2:]]


def test_without_a_cache_the_text_is_the_same(cached: Any, whole: Any) -> None:
    asked = prompts([3, 6, 3])
    slow, fast = Decoder(whole["llama"], CONTEXT), Decoder(cached["llama"], CONTEXT)
    assert fast.cached and not slow.cached
    options = {"max_new_tokens": 6}
    assert columns(slow.decode(asked, **options)) == columns(fast.decode(asked, **options))


@pytest.mark.parametrize("kind", ["cached", "whole"])
def test_images_are_read_with_the_prompt(
    kind: str, folders: Any, cached: Any, whole: Any
) -> None:
    """Rows with an image and a row of text only; steps take no image."""
    model = folders["llava"][0]
    run = Recorded((cached if kind == "cached" else whole)["llava"])
    rng = torch.Generator().manual_seed(3)
    pixels = [torch.randn(3, 24, 24, generator=rng) for _ in range(2)]
    asked = [[1, *[IMAGE] * TOKENS, 7, 5], [1, 9, 4], [1, 8, *[IMAGE] * TOKENS, 11]]
    images = [pixels[0], None, pixels[1]]
    grown = columns(Decoder(run, CONTEXT).decode(asked, max_new_tokens=16, images=images))
    for prompt, tokens, image in zip(asked, grown, images, strict=True):
        more = {} if image is None else {"pixel_values": image.unsqueeze(0)}
        (logits,) = one_shot(model, [prompt + tokens], **more)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    if kind == "cached":
        assert [len(g["pixel_values"]) for g in run.inputs] == [2] + [0] * 15


# --- choosing -------------------------------------------------------------------------------------


class Fixed:
    """A text model of five words whose logits are always the same."""

    input_names = ("input_ids",)
    output_names = ("logits",)
    input_types = {"input_ids": Type(torch.int64, ("batch", "seq"))}  # noqa: RUF012

    def __init__(self, logits: list[float]) -> None:
        self.logits = torch.tensor(logits)

    def __call__(self, *args: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq = inputs["input_ids"].shape
        return {"logits": self.logits.expand(batch, seq, -1)}


LIKELY = [0.5, 0.25, 0.125, 0.0625, 0.0625]


def drawn(count: int, **sampling: Any) -> list[int]:
    run = Decoder(Fixed([math.log(p) for p in LIKELY]))
    (row,) = columns(run.decode([[0]], max_new_tokens=count, sampling=Sampling(**sampling)))
    return row


def test_the_same_seed_draws_the_same_text() -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    assert drawn(40, seed=3, **options) == drawn(40, seed=3, **options)
    assert drawn(40, seed=3, **options) != drawn(40, seed=4, **options)


def test_a_row_draws_alike_alone_and_in_a_batch(cached: Any) -> None:
    asked = prompts([6, 6])
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=5)
    decoder = Decoder(cached["llama"])
    both = columns(decoder.decode(asked, max_new_tokens=12, sampling=sampling))
    (alone,) = columns(decoder.decode(asked[:1], max_new_tokens=12, sampling=sampling))
    assert both[0] == alone


@pytest.mark.parametrize(
    ("top_p", "words"), [(0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2}),
                         (1.0, {0, 1, 2, 3, 4})],
)  # fmt: skip
def test_words_are_drawn_from_the_nucleus(top_p: float, words: set[int]) -> None:
    assert set(drawn(200, temperature=1.0, top_p=top_p)) == words
    kept, likely = candidates(torch.tensor(LIKELY).log(), Sampling(1.0, top_p))
    assert kept.tolist() == sorted(words)
    torch.testing.assert_close(likely, torch.tensor(LIKELY)[: len(words)])


@pytest.mark.parametrize(("top_k", "top_p", "words"), [
    (1, 1.0, {0}), (3, 1.0, {0, 1, 2}), (3, 0.6, {0, 1}), (9, 1.0, {0, 1, 2, 3, 4}),
])  # fmt: skip
def test_words_are_drawn_from_the_top_k_and_its_nucleus(
    top_k: int, top_p: float, words: set[int]
) -> None:
    assert set(drawn(200, temperature=1.0, top_k=top_k, top_p=top_p)) == words


def test_a_nucleus_reaches_below_the_floor() -> None:
    """Words that are too unlikely to be sorted first belong to it where the others do not do."""
    likely = torch.tensor([0.5, *[0.5 / 4096] * 4096])
    words, chances = candidates(likely.log(), Sampling(1.0, 0.75))
    assert likely[1] < FLOOR * likely[0]
    assert len(set(words.tolist())) == len(words) == 2049 and int(words[0]) == 0
    torch.testing.assert_close(chances, likely[: len(words)])


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([LIKELY]).log()

    def words(count: int, temperature: float) -> list[int]:
        chosen = Sampling(temperature).chooser(1)
        return [chosen(logits)[0] for _ in range(count)]

    row = words(4000, 1.0)
    for word, likely in enumerate(LIKELY):
        sigma = math.sqrt(likely * (1 - likely) / len(row))
        assert abs(row.count(word) / len(row) - likely) < 4 * sigma
    cold = words(400, 0.1)
    assert cold.count(0) / len(cold) > 0.98


# --- where a text ends, and refusals --------------------------------------------------------------


def test_a_row_ends_at_its_end_token_and_the_others_go_on(cached: Any) -> None:
    asked = prompts([4, 2])
    free = columns(Decoder(cached["gpt2"]).decode(asked, max_new_tokens=12))
    end = free[0][3]
    first = [row.index(end) + 1 if end in row else 12 for row in free]
    steps = list(Decoder(cached["gpt2"]).decode(asked, max_new_tokens=12, eos={end}))
    assert columns(steps) == [row[:n] for row, n in zip(free, first, strict=True)]
    assert len(steps) == max(first)


@pytest.mark.parametrize("kind", ["cached", "whole"])
def test_a_text_ends_where_the_context_is_full(kind: str, cached: Any, whole: Any) -> None:
    """GPT-2 has no position behind its last: the other row must not be led there."""
    run = cached["gpt2"] if kind == "cached" else whole["llama"]
    rows = columns(Decoder(run, CONTEXT).decode(prompts([CONTEXT - 2, 3]), max_new_tokens=9))
    assert [len(row) for row in rows] == [3, 9]


def refusal(run: Any, asked: list[list[int]], **options: Any) -> str:
    with pytest.raises(BadInput) as refused:
        list(Decoder(run, CONTEXT).decode(asked, **{"max_new_tokens": 2, **options}))
    return str(refused.value)


def test_prompts_that_do_not_fit(cached: Any) -> None:
    run = cached["llama"]
    message = refusal(run, prompts([3, CONTEXT + 1]))
    assert "a prompt has 65 tokens, the model's context is 64" in message
    assert "a prompt is empty" in refusal(run, [[1], []])
    assert "a prompt is empty" in refusal(run, [])
    assert "max_new_tokens 0 must be 1 or more" in refusal(run, [[1]], max_new_tokens=0)
    pixels = torch.zeros(3, 24, 24)
    assert "the model reads text only" in refusal(run, [[1]], images=[pixels])
    assert "1 images for 2 prompts" in refusal(cached["llava"], [[1], [2]], images=[pixels])
    message = refusal(cached["llava"], [[1]], images=[torch.zeros(3, 24, 23)])
    assert "an image is [3, 24, 23], the graph takes [3, 24, 24]" in message


def test_a_graph_that_writes_no_text(view: FxView) -> None:
    with pytest.raises(BadInput, match="text is generated by a graph from input_ids to logits"):
        Decoder(compile(view, backend="eager"))


def test_sampling_out_of_range() -> None:
    for options, reason in (({"temperature": -0.1}, "temperature -0.1 must be 0"),
                            ({"temperature": math.nan}, "temperature nan must be 0"),
                            ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
                            ({"top_p": 1.5}, "top_p 1.5 must be above 0"),
                            ({"top_k": -1}, "top_k -1 must be 0")):  # fmt: skip
        with pytest.raises(BadInput, match=reason):
            Sampling(**options)


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(BadInput, match="the model's logits are NaN"):
        list(Decoder(Fixed([0.0, math.nan])).decode([[1]], max_new_tokens=1))

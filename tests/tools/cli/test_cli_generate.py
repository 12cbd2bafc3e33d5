"""``optimize-model generate`` and ``gw.generate``: text and images in, words out as they come."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.backends.generation.speculate import Speculator
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.core.view import View
from graphwright.ir.load.zoo.text import read_tokenizer
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_table import Family
from graphwright.tools.cli.main import main
from graphwright.tools.evaluate import Subject
from graphwright.tools.report import manifest
from graphwright.tools.report.visible import visible
from graphwright.tools.run import batch_costs, drafting, generating, pipeline, replay

transformers: Any = importlib.import_module("transformers")
tokenizers: Any = importlib.import_module("tokenizers")

PROMPT = "The value of the object"
CONTEXT = 96
WORDS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "what", "is", "there", "a", "seven", "yes"]
TOKENS = 9


@pytest.fixture(scope="module")
def artifact(language_model: Path, publish: Callable[..., Path]) -> Path:
    """An artifact with a cache that computes what the model does."""
    return publish(language_model, "clean{optional=true}")


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random LLaVA, its tokenizer and its preprocessing."""
    folder = tmp_path_factory.mktemp("llava")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=24, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        ),
        image_token_id=WORDS.index("<image>"), image_seq_length=TOKENS,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    table = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vision_graph(vision_model: Path) -> View:
    """Its graph with a cache, in ONNX."""
    return translated(gw.load(vision_model, cache=True))


@pytest.fixture(scope="module")
def vision_artifact(vision_graph: View, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gw.export(vision_graph, tmp_path_factory.mktemp("made") / "vision")


@pytest.fixture
def command(command: Any) -> Any:
    """Runs ``generate`` as the shared fixture runs the command."""
    return partial(command, "generate")


def greedy(folder: Path, ids: list[int], count: int, **more: Any) -> list[int]:
    """What the library writes."""
    cls = "LlavaForConditionalGeneration" if more else "LlamaForCausalLM"
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    prompt = torch.tensor([ids])
    written = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
        do_sample=False, pad_token_id=0, **more,
    )  # fmt: skip
    return [int(token) for token in written[0, len(ids) :]]


def test_the_command_writes_what_the_model_does(
    artifact: Path, language_model: Path, command: Any
) -> None:
    ids = read_tokenizer(language_model).encode(PROMPT).ids
    expected = greedy(language_model, ids, 12)
    (answer,) = gw.generate(artifact, PROMPT, max_new_tokens=12)
    assert list(answer.ids) == expected and answer.prompt_tokens == len(ids)
    code, out, err = command(str(artifact), PROMPT, "--max-new-tokens", "12")
    assert code == 0 and out == f"{visible(answer.text)}\n"
    assert f"{len(ids)} tokens read, {len(expected)} written, ended by {answer.ended}" in err
    assert "note:" not in err
    speeds = re.search(r"reading ([0-9.]+) tokens/s, writing ([0-9.]+) tokens/s", err)
    assert speeds is not None and min(map(float, speeds.groups())) > 1


def test_several_prompts_are_one_batch(artifact: Path, command: Any) -> None:
    asked = [PROMPT, "If"]
    answers = gw.generate(artifact, asked, max_new_tokens=6)
    code, out, err = command(str(artifact), *asked, "--max-new-tokens", "6")
    assert code == 0 and out == "".join(f"{visible(answer.text)}\n" for answer in answers)
    assert err.count("tokens read, 6 written") == 2
    speed = answers[0].speed
    assert answers[1].speed is speed and speed.written == 2 * 5
    assert speed.read == sum(answer.prompt_tokens for answer in answers)


def test_without_a_cache_it_says_so(
    artifact: Path, plain_artifact: Path, command: Any
) -> None:
    code, out, err = command(str(plain_artifact), PROMPT, "--max-new-tokens", "5")
    assert code == 0 and out == command(str(artifact), PROMPT, "--max-new-tokens", "5")[1]
    assert "note: the graph has no key-value cache" in err and "--cache" in err
    with pytest.warns(UserWarning, match="no key-value cache"):
        gw.generate(plain_artifact, PROMPT, max_new_tokens=1)


def test_a_chat_is_read_by_the_models_template(
    artifact: Path, command: Any, tmp_path: Path
) -> None:
    """With its own special tokens alone; the same in Python, of messages too."""
    template = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    told = gw.generate(artifact, f"<s>user: {PROMPT}\n", max_new_tokens=5)
    with pytest.raises(Missing, match="messages are read by a chat template, and there is none"):
        gw.generate(artifact, PROMPT, chat=True)
    folder = tmp_path / "chatty"
    shutil.copytree(artifact, folder)
    (folder / "chat_template.jinja").write_text(template)
    assert gw.generate(folder, PROMPT, max_new_tokens=5, chat=True) == told
    messages = [{"role": "user", "content": PROMPT}]
    assert gw.generate(folder, [messages], max_new_tokens=5, chat=True) == told
    assert gw.generate(folder, messages, max_new_tokens=5, chat=True) == told
    for wrong in ([["user"]], [{"role": "user"}], [[]]):
        with pytest.raises(BadInput, match="each a dict with role and content, and this is"):
            gw.generate(folder, wrong, chat=True)
    code, out, _ = command(str(folder), PROMPT, "--chat", "--max-new-tokens", "5")
    assert code == 0 and out == f"{told[0].text}\n"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([1, 2], "a prompt is of type int, and must be a text"),
     ([None], "of type NoneType"),
     ([{"role": "user", "content": "x"}], r"of type list, .* \(messages need chat=True\)"),
     ([[{"role": "user", "content": "x"}]], r"of type list, .* \(messages need chat=True\)"),
     ("the \udcff", r"the prompt 'the \\udcff' is not UTF-8 text")],
)  # fmt: skip
def test_prompts_are_texts(artifact: Path, prompt: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gw.generate(artifact, prompt)


@pytest.mark.parametrize("head", ["TokenClassification", "MaskedLM"])
def test_what_reads_a_text_writes_none(tmp_path: Path, language_model: Path, head: str) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16,
        vocab_size=700,
    )  # fmt: skip
    getattr(transformers, f"BertFor{head}")(config).save_pretrained(tmp_path)
    shutil.copy(language_model / "tokenizer.json", tmp_path)
    with pytest.raises(BadInput, match=f"BertFor{head}. writes no text: its logits are of the te"):
        gw.generate(gw.load(tmp_path), PROMPT)


def test_what_looks_behind_a_token_writes_none(tmp_path: Path, language_model: Path) -> None:
    """XLM's library puts a mask behind a text and reads what stands there: it wrote other words."""
    sizes = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 700, "n_langs": 1,
             "max_position_embeddings": 64}  # fmt: skip
    save(Family("XLMWithLMHeadModel", "XLMConfig", sizes), tmp_path)
    shutil.copy(language_model / "tokenizer.json", tmp_path)
    told = "XLMWithLMHeadModel. writes no text from left to right: the logits of a token change by"
    with pytest.raises(BadInput, match=told):
        gw.generate(gw.load(tmp_path), PROMPT)


def test_sampling_from_the_command(artifact: Path, command: Any) -> None:
    options = ["--temperature", "1.5", "--top-p", "0.9", "--max-new-tokens", "16", "--seed"]
    first, again, other = (command(str(artifact), PROMPT, *options, s)[1] for s in "778")
    assert first == again != other
    greedy = command(str(artifact), PROMPT, "--max-new-tokens", "16")[1]
    assert command(str(artifact), PROMPT, *options, "7", "--top-k", "1")[1] == greedy


def test_batches_and_streams(artifact: Path) -> None:
    asked = [PROMPT, "If", "A name is bound to the first"]
    heard: dict[int, list[str]] = {}
    answers = gw.generate(
        artifact, asked, max_new_tokens=10, stream=lambda i, t: heard.setdefault(i, []).append(t)
    )
    assert ["".join(heard[i]) for i in range(3)] == [str(answer) for answer in answers]
    assert len(heard[0]) > 3
    for prompt, answer in zip(asked, answers, strict=True):
        assert gw.generate(artifact, prompt, max_new_tokens=10)[0].ids == answer.ids


def test_graphs_executables_and_models(artifact: Path, language_model: Path) -> None:
    (expected,) = gw.generate(artifact, PROMPT, max_new_tokens=3)
    graph = gw.load(artifact)
    run = gw.compile(artifact)
    options = {"max_new_tokens": 3}
    assert gw.generate(graph, PROMPT, **options) == [expected]
    assert gw.generate(artifact / "model.onnx", PROMPT, **options) == [expected]
    assert gw.generate(run, PROMPT, tokenizer=language_model, **options) == [expected]
    assert gw.generate(str(language_model), PROMPT, **options) == [expected]
    with pytest.raises(BadInput, match="give tokenizer=FOLDER"):
        gw.generate(run, PROMPT)


def test_a_character_of_several_tokens_comes_whole(language_model: Path) -> None:
    tokenizer = read_tokenizer(language_model)
    text = " naïve 😀 – done"
    row = generating._Row(tokenizer, frozenset({0}))
    ids = tokenizer.encode(text).ids
    pieces = [row.add(token) for token in ids]
    assert "".join([*pieces, row.finish()]) == tokenizer.decode(ids) == row.text
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)
    broken = generating._Row(tokenizer, frozenset())
    emoji = tokenizer.encode("😀").ids
    assert len(emoji) > 1 and broken.add(emoji[0]) == "" and "\ufffd" in broken.finish()


# --- the rest of the command line with a cache ----------------------------------------------------


def test_the_manifest_tells_of_the_cache(
    artifact: Path, plain_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = manifest.load(artifact)
    assert done.source.cache and "cache" not in manifest.load(plain_artifact).to_json()["source"]
    assert {output.name for output in done.verification.outputs} == {"logits"}
    asked: list[pipeline.Request] = []

    def stop(request: pipeline.Request, progress: Any) -> None:
        asked.append(request)
        raise BadInput("stop")

    monkeypatch.setattr(pipeline, "run", stop)
    with pytest.raises(BadInput, match="stop"):
        replay.replay(artifact, None, lambda *_: None)
    assert asked[0].cache


def test_evaluation_starts_with_an_empty_cache(artifact: Path, plain_artifact: Path) -> None:
    cached, plain = Subject.of(artifact), Subject.of(plain_artifact)
    example = cached.example(2, 7)
    assert example["attention_mask"].shape == (2, 7)
    assert set(example) == {"input_ids", "attention_mask"}
    batch = {name: example[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(cached.run(batch)["logits"], plain.run(batch)["logits"])


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of another size than the model's."""
    image: Any = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("images") / "picture.png"
    pixels = torch.randint(0, 256, (30, 41, 3), generator=torch.Generator().manual_seed(0))
    image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def test_an_image_and_a_question(
    vision_artifact: Path, vision_model: Path, picture: Path, command: Any
) -> None:
    from graphwright.tools.data.images import Preprocessing

    pixels = Preprocessing.of(gw.load(vision_artifact)).read(picture)
    assert pixels.shape == (3, 24, 24)
    ids = [1, *[3] * TOKENS, 5, 6, 7]
    expected = greedy(vision_model, ids, 8, pixel_values=pixels.unsqueeze(0))
    question = "what is there"
    (answer,) = gw.generate(vision_artifact, question, images=picture, max_new_tokens=8)
    assert list(answer.ids) == expected and answer.prompt_tokens == len(ids)
    code, out, _ = command(
        str(vision_artifact), question, "--image", str(picture), "--max-new-tokens", "8"
    )
    assert code == 0 and out == f"{visible(answer.text)}\n"
    (placed,) = gw.generate(vision_artifact, f"<image> {question}", images=pixels, max_new_tokens=8)
    assert placed.ids == answer.ids
    blind = gw.generate(vision_artifact, question, max_new_tokens=8)[0]
    assert blind.prompt_tokens == 4 and blind.ids != answer.ids
    both = gw.generate(
        vision_artifact, [question, f"is <image> {question}"], images=[None, picture],
        max_new_tokens=8,
    )  # fmt: skip
    assert both[0].ids == blind.ids
    ids = [1, 6, *[3] * TOKENS, 5, 6, 7]
    assert list(both[1].ids) == greedy(vision_model, ids, 8, pixel_values=pixels.unsqueeze(0))


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_generated(
    artifact: Path, vision_artifact: Path, picture: Path, command: Any, tmp_path: Path
) -> None:
    text, sight = str(artifact), str(vision_artifact)
    long = "word " * CONTEXT
    for arguments, code, reason in (
        ([text, PROMPT, "--image", str(picture)], 2, "the model reads text only"),
        ([text, long], 2, f"the model's context is {CONTEXT}: shorten it"),
        ([text, ""], 2, "a prompt is empty"),
        ([text, PROMPT, "--top-p", "0"], 2, "top_p 0.0 must be above 0"),
        ([text, PROMPT, "--top-k", "-1"], 2, "top_k -1 must be 0"),
        ([text, PROMPT, "--temperature", "-1"], 2, "temperature -1.0 must be 0"),
        ([text, PROMPT, "--max-new-tokens", "0"], 2, "max_new_tokens 0 must be 1 or more"),
        ([text, PROMPT, "--device", "tpu"], 2, "--device tpu is unknown"),
        ([sight, "what <image> ?"], 2, "names an image, and none is given"),
        ([sight, "<image> <image>", "--image", str(picture)], 2, "2 image tokens in one prompt"),
        ([sight, "what", "--image", "gone.png"], 3, "gone.png: no such image"),
        ([str(tmp_path / "nothing"), PROMPT], 3, "no such file or folder"),
    ):
        status, out, err = command(*arguments)
        assert (status, out) == (code, ""), (arguments, err)
        assert reason in err
    shutil.copytree(artifact, tmp_path / "larger")
    known = json.loads((artifact / "tokenizer.json").read_text())
    added = {"id": 700, "content": "new", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}  # fmt: skip
    known["added_tokens"].append(added)
    (tmp_path / "larger" / "tokenizer.json").write_text(json.dumps(known))
    status, out, err = command(str(tmp_path / "larger"), "a new word")
    assert (status, out) == (2, "") and "the id 700, and the model knows ids 0 to 699" in err
    with pytest.raises(BadInput, match="2 images for 1 prompts"):
        gw.generate(sight, "what", images=[None, None])


def test_prompts_without_an_image_of_a_pruned_model(
    vision_model: Path, vision_graph: View, picture: Path
) -> None:
    question = "what is there"
    ids = torch.tensor([[1, *[3] * TOKENS, 5, 6]])
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.zeros(1, 3, 24, 24)}]  # fmt: skip
    plain = gw.load(vision_model, cache=False)
    for graph, message in ((vision_graph, "apart"), (plain, "make the artifact with")):
        pruned = gw.optimize(graph, "fastervlm{keep=4}", samples=samples).graph
        with pytest.raises(BadInput, match=f"prompt 1 has no image, and .* were pruned.*{message}"):
            gw.generate(pruned, [question] * 2, images=[None, picture], max_new_tokens=2)
        if graph is vision_graph:
            (whole,) = gw.generate(vision_graph, question, max_new_tokens=4)
            (answer,) = gw.generate(pruned, question, max_new_tokens=4)
            assert answer.ids == whole.ids


def test_a_model_without_a_tokenizer(artifact: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data", "graphwright.json", "config.json"):
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
    with pytest.raises(Missing, match=r"no tokenizer\.json there"):
        gw.generate(tmp_path, PROMPT)


def test_a_draft_writes_the_same_text(
    language_model: Path, publish: Callable[..., Path], command: Any,
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(batch_costs, "busy", lambda: False)
    out = publish(language_model, "tree-mask", "--path", "draft=0", "--path", "half=0,1.mlp")
    capsys.readouterr()  # the manifest
    known = manifest.load(out)
    assert {name: entry.blocks for name, entry in known.paths.items()} == {
        "draft": "0", "half": "0,1.mlp"
    }  # fmt: skip
    assert set(known.files) >= {"path-draft.onnx", "path-half.onnx"}
    texts = []
    for draft in ("none", "path", "half", "recycle", "auto"):
        options = ("--draft", draft, "--max-new-tokens", "12")
        code, text, err = command(str(out), PROMPT, *options)
        assert code == 0 and ("draft:" in err) == (draft != "none")
        texts.append(text)
    assert len(set(texts)) == 1
    (machine,) = json.loads(batch_costs.place().read_text()).values()
    assert {key.split()[2] for key in machine} == {"draft", "half", "recycle"}
    (answer,) = gw.generate(gw.load(out), PROMPT, max_new_tokens=12, draft="recycle")
    assert f"{visible(answer.text)}\n" == texts[0], "of a graph, which is compiled to take trees"
    monkeypatch.setattr(Speculator, "_measured", None)
    assert gw.generate(out, PROMPT, max_new_tokens=12, draft="recycle")[0].drafting is not None
    table = json.loads(batch_costs.place().read_text())
    for row in (row for rows in table.values() for row in rows.values()):
        row["call_ms"] = {"1": 1.0, "2": 4.0}
    batch_costs.place().write_text(json.dumps(table))
    with monkeypatch.context() as context:
        context.setattr(drafting, "PathDraft", None)
        context.setattr(drafting, "Recycled", None)
        (answer,) = gw.generate(out, PROMPT, max_new_tokens=12, draft="auto")
    assert f"{visible(answer.text)}\n" == texts[0] and "whatever is guessed" in str(answer.drafting)
    batch_costs.place().write_text("{")
    assert batch_costs.known(("cpu", "cpu", "recycle")) is None
    code, _, err = command(str(out), PROMPT, "--draft", "draught")
    assert code == 2 and "did you mean draft" in err
    code, _, err = command(str(out), PROMPT, PROMPT, "--draft", "path")
    assert code == 2 and "one prompt at a time" in err
    code, _, err = command(str(language_model), PROMPT, "--draft", "path")
    assert code == 2 and "make an artifact that has one" in err
    with pytest.raises(SystemExit):
        main([str(language_model), "-p", "clean", "--path", "draft"])
    assert "--path draft has no blocks" in capsys.readouterr().err

"""Which blocks leave: the scores against the library's own hidden states; refusals; the paths."""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import graphwright as gw
import numpy as np
import pytest
import torch
from graphwright.backends.onnx.lowering import translated
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import Source, View
from graphwright.ir.core.weights import MemoryWeight
from graphwright.ir.load.sources import load
from graphwright.ir.load.zoo.text import read_tokenizer, shipped_text, token_batches
from graphwright.ir.moves import Path as BlockPath
from graphwright.ir.moves import follow
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.recognize import recognize
from graphwright.ir.structure.units import whole
from graphwright.passes import Recipe
from graphwright.passes.base import Context
from graphwright.passes.depth.drop_blocks import DropBlocks
from graphwright.passes.depth.path_runner import PathRunner
from torch import Tensor

from ... import models as small_models

transformers: Any = importlib.import_module("transformers")
LAYERS = 5
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, View]]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
        model.model.layers[2].mlp.down_proj.weight.mul_(0.01)
        model.model.layers[2].self_attn.o_proj.weight.mul_(0.01)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    fx = load(folder, cache=False)
    return model, {"fx": fx, "onnx": translated(fx)}


def batches(rows: int = 3) -> list[Batch]:
    """Two batches; rows padded on the left and on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 40, (rows, length), generator=generator) for length in (9, 12)]
    masks = [torch.ones_like(i) for i in ids]
    masks[0][0, :4] = 0
    masks[1][2, 7:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def begun_before(batch: Batch) -> Batch:
    """The same rows, but for the first token of each that counts."""
    mask = batch["attention_mask"].clone()
    mask[torch.arange(len(mask)), mask.argmax(1)] = 0
    return {**batch, "attention_mask": mask}


def states(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    """The stream before each block and behind the last, which the library norms."""
    stream = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0].double()))
        for layer in model.model.layers
    ]
    hooks.append(
        model.model.norm.register_forward_pre_hook(
            lambda _, inputs: stream.append(inputs[0].double())
        )
    )
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return tuple(stream)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def scores(report: Any, what: str) -> list[float]:
    (note,) = [n for n in report.passes[0].result.notes if n.startswith(what)]
    return [float(part.split(":")[1]) for part in note.split(": ")[1].split()]


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_block_influence(models: Any, kind: str) -> None:
    model, graphs = models
    shorter = gw.optimize(graphs[kind], "drop-blocks{count=2}", calibration=batches())
    turned = [torch.zeros(0, dtype=torch.float64)] * LAYERS
    for batch in batches():
        stream, counts = states(model, batch), batch["attention_mask"].bool()
        for i in range(LAYERS):
            cosine = cosines(stream[i], stream[i + 1])[counts]
            turned[i] = torch.cat([turned[i], 1 - cosine])
    expected = [float(t.mean()) for t in turned]
    assert scores(shorter.report, "block influence") == pytest.approx(expected, rel=2e-3)
    weakest = sorted(sorted(range(LAYERS), key=lambda i: expected[i])[:2])
    assert 2 in weakest
    sites = shorter.report.passes[0].result.sites
    assert [site.name for site in sites] == [f"block {i}" for i in weakest]
    assert len(recognize(shorter.graph).blocks) == LAYERS - 2


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("of", ["attn", "half"])
def test_influence_of_halves(models: Any, kind: str, of: str) -> None:
    model, graphs = models
    shorter = gw.optimize(graphs[kind], f"drop-blocks{{count=2 of={of}}}", calibration=batches())
    turned: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * (2 * LAYERS)
    for batch in batches():
        between: list[Tensor] = []
        hooks = [
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, inputs, to=between: to.append(inputs[0].double())
            )
            for layer in model.model.layers
        ]
        stream = states(model, batch)
        for hook in hooks:
            hook.remove()
        counts = batch["attention_mask"].bool()
        ends = [x for pair in zip(stream, between, strict=False) for x in pair] + [stream[-1]]
        for i, (before, behind) in enumerate(itertools.pairwise(ends)):
            turned[i] = torch.cat([turned[i], 1 - cosines(before, behind)[counts]])
    expected = [float(t.mean()) for t in turned]
    assert scores(shorter.report, "block influence") == pytest.approx(expected, rel=2e-3)
    free = range(0, 2 * LAYERS, 2 if of == "attn" else 1)
    weakest = sorted(sorted(free, key=lambda i: expected[i])[:2])
    (done,) = shorter.report.passes
    names = [f"block {i // 2}.{'mlp' if i % 2 else 'attn'}" for i in weakest]
    # Both halves of a block are the block.
    names = ["block 2"] if names == ["block 2.attn", "block 2.mlp"] else names
    assert [s.name for s in done.result.sites] == names
    with pytest.raises(BadInput, match=r"score=angular is of runs of whole blocks, not of=attn"):
        gw.optimize(graphs[kind], "drop-blocks{of=attn score=angular}", calibration=batches())


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("count", [1, 3])
def test_angular_distance(models: Any, kind: str, count: int) -> None:
    model, graphs = models
    recipe = f"drop-blocks{{count={count} score=angular}}"
    shorter = gw.optimize(graphs[kind], recipe, calibration=batches())
    angles: list[list[float]] = [[] for _ in range(LAYERS - count)]
    for batch in batches():
        stream, mask = states(model, batch), batch["attention_mask"]
        last = [int(row.nonzero().max()) for row in mask]
        for start, row in enumerate(angles):
            for sample, place in enumerate(last):
                a, b = stream[start][sample, place], stream[start + count][sample, place]
                row.append(math.acos(float(cosines(a, b))) / math.pi)
    expected = [sum(row) / len(row) for row in angles]
    assert scores(shorter.report, "angular distance") == pytest.approx(expected, rel=2e-3)
    start = min(range(len(expected)), key=expected.__getitem__)
    names = [s.name for s in shorter.report.passes[0].result.sites]
    assert names == [f"block {i}" for i in range(start, start + count)]


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("recipe", ["path{blocks=0-1,3-4}", "path{blocks=0,1,1,2-4}"])
def test_a_path_equals_the_models_own_layers(models: Any, kind: str, recipe: str) -> None:
    model, graphs = models
    (batch, _) = batches()
    rerouted = gw.optimize(graphs[kind], recipe)
    blocks = {"path{blocks=0-1,3-4}": [0, 1, 3, 4], "path{blocks=0,1,1,2-4}": [0, 1, 1, 2, 3, 4]}
    own = model.model.layers
    model.model.layers = torch.nn.ModuleList([own[i] for i in blocks[recipe]])
    model.config.num_hidden_layers = len(blocks[recipe])
    try:
        with torch.no_grad():
            expected = model(**batch, use_cache=False).logits
    finally:
        model.model.layers = own
        model.config.num_hidden_layers = LAYERS
    real = batch["attention_mask"].bool()
    actual = sweep(rerouted.graph, batch)["logits"]
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_whole_path_changes_no_bit(models: Any) -> None:
    _, graphs = models
    (batch, _) = batches()
    raised = graphs["fx"].copy()
    canonicalize(raised)
    whole = gw.optimize(graphs["fx"], f"path{{blocks=0-{LAYERS - 1} optional=true}}")
    assert torch.equal(sweep(whole.graph, batch)["logits"], sweep(raised, batch)["logits"])


def logits_of(model: Any, batch: Batch, blocks: list[int]) -> Tensor:
    """The library's own through these layers, at the tokens that count."""
    own = model.model.layers
    try:
        model.model.layers = torch.nn.ModuleList([own[i] for i in blocks])
        model.config.num_hidden_layers = len(blocks)
        with torch.no_grad():
            logits: Tensor = model(**batch, use_cache=False).logits
    finally:
        model.model.layers, model.config.num_hidden_layers = own, LAYERS
    return logits[batch["attention_mask"].bool()].double().log_softmax(-1)


def divergence(model: Any, blocks: list[int]) -> float:
    """Mean KL divergence of the words that come next from those of all layers."""
    source, changed = (
        torch.cat([logits_of(model, batch, path) for batch in batches()])
        for path in (list(range(LAYERS)), blocks)
    )
    return float((source.exp() * (source - changed)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("score", ["kl", "greedy"])
def test_blocks_by_what_the_outputs_do_without_them(models: Any, kind: str, score: str) -> None:
    model, graphs = models
    recipe = f"drop-blocks{{count=2 score={score}}}"
    (done,) = gw.optimize(graphs[kind], recipe, calibration=batches()).report.passes
    path, rounds = list(range(LAYERS)), []
    for _ in range(2 if score == "greedy" else 1):
        rounds.append([divergence(model, [b for b in path if b != i]) for i in path])
        path.pop(rounds[-1].index(min(rounds[-1])))
    notes = [n.split(": ")[1] for n in done.result.notes if n.startswith("outputs move")]
    for note, expected in zip(notes, rounds, strict=True):
        moved = [float(part.split(":")[1]) for part in note.split()]
        assert moved == pytest.approx(expected, rel=2e-3)
    if score == "kl":
        path = sorted(sorted(range(LAYERS), key=lambda i: rounds[0][i])[2:])
    assert str(BlockPath.of(path)) == done.result.notes[-1].split(": ")[1]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_paths_of_other_models_are_measured_too(name: str) -> None:
    """A model without a head: the relative L2 of its output, at the tokens that count."""
    small = getattr(small_models, name)(layers=3)
    view = small_models.traced(small)
    structure = recognize(view)
    units = whole(structure.blocks)
    runner = PathRunner(view, structure, units, [small.inputs])
    for path in ((0, 2), (0, 1, 1, 2), (1,)):
        changed = view.copy()
        follow(changed, recognize(changed).blocks, BlockPath.of(path), rule="test")
        source, moved = (next(iter(sweep(g, small.inputs).values())) for g in (view, changed))
        counts = small.inputs["attention_mask"].bool()
        source, moved = source[counts], moved[counts]
        if name == "bert":
            expected = float((moved - source).norm() / source.norm())
        else:
            a, b = source.log_softmax(-1), moved.log_softmax(-1)
            expected = float((a.exp() * (a - b)).sum(-1).mean())
        assert runner.divergence(path) == pytest.approx(expected, rel=1e-3)
    assert runner.divergence((0, 2)) == runner.divergence((0, 2)), "none is run twice"
    assert (runner.units_asked, runner.units_run) == (7, 6)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
@pytest.mark.parametrize("recipe", ["drop-blocks{count=2 score=angular", "path{blocks=0-1,2.mlp,4"])
def test_healing_is_the_least_squares_map(models: Any, kind: str, recipe: str) -> None:
    """What stands in for a run of blocks, against numpy's own least squares on hidden states."""
    model, graphs = models
    calibration = batches(64)
    (plain, mean, linear) = (
        gw.optimize(graphs[kind], f"{recipe}{heal}}}", calibration=calibration)
        for heal in ("", " heal=mean", " heal=linear heal_rank=24")
    )
    sites = linear.report.passes[0].result.sites
    healed = [s for s in sites if s.kind == "heal"]
    assert [(s.shape, s.bytes_after) for s in healed] == [((24, 24), 49 * 24 * 4)] * len(healed)
    assert [s for s in sites if s.kind != "heal"] == plain.report.passes[0].result.sites
    rows: list[Tensor] = []
    for batch in [*calibration, *map(begun_before, calibration)]:
        stream = torch.stack(states(model, batch))
        rows.append(stream[:, batch["attention_mask"].bool()])
    stream = torch.cat(rows, 1)
    if recipe.startswith("drop"):
        start = int(sites[0].name.split()[1])
        x, d = stream[start].numpy(), (stream[start + 2] - stream[start]).numpy()
        one = np.c_[x, np.ones(len(x))]
        rest = d - one @ np.linalg.lstsq(one, d, rcond=None)[0]
        best = 1 - (rest**2).sum() / (d**2).sum()
        note = next(n for n in linear.report.passes[0].result.notes if n.startswith("healed"))
        assert float(note.split(": ")[1].split("%")[0]) / 100 == pytest.approx(best, abs=0.01)
    (batch, _) = calibration
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits[real]
    errors = [
        float((sweep(optimized.graph, batch)["logits"][real] - expected).norm())
        for optimized in (plain, mean, linear)
    ]
    assert errors[2] < errors[1] < errors[0]
    assert len(recognize(linear.graph).blocks) == len(recognize(plain.graph).blocks)


@pytest.mark.parametrize("kind", ["fx", "onnx"])
def test_nothing_stands_in_where_data_held_back_says_so(models: Any, kind: str) -> None:
    """Six rows are too few for a map of all 24 channels: it is worse than none elsewhere."""
    graph, few = models[1][kind], batches()
    plain, healed = (
        gw.optimize(graph, f"path{{blocks=0-2,4{heal}}}", calibration=few)
        for heal in ("", " heal=linear heal_rank=24")
    )
    (done,) = healed.report.passes
    assert done.result.sites == plain.report.passes[0].result.sites
    assert any(n.startswith("not healed, block 3: a map fitted") for n in done.result.notes)
    assert torch.equal(*(sweep(g.graph, few[0])["logits"] for g in (plain, healed)))


def test_random_blocks_are_drawn_by_seed(models: Any) -> None:
    context = Context(models[1]["fx"].copy())
    canonicalize(context.view)
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        planned = DropBlocks(count=2, score="random", seed=seed).plan(context)
        drawn.append([site.name for site in planned.sites])
    assert drawn[0] == drawn[1]
    assert len({tuple(d) for d in drawn}) > 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("drop-blocks{count=0}", "count=0 must be at least 1"),
        ("drop-blocks{count=5 score=random}", "count=5 of 5 blocks; at least one must stay"),
        ("drop-blocks", "drop-blocks needs calibration data"),
        ("path{blocks=0-9}", "there is no block 5; there are 0 to 4"),
        ("path{blocks=3-1}", "the run 3-1 goes backwards"),
        ("path{blocks=x}", "'x' is not a block"),
        ("path{blocks=2,0,1}", "comes first after a later one"),
    ],
)
def test_bad_input(models: Any, recipe: str, message: str) -> None:
    _, graphs = models
    with pytest.raises(BadInput, match=message):
        gw.optimize(graphs["fx"], recipe)


def test_states_that_are_not_finite(models: Any) -> None:
    broken = models[1]["fx"].copy()
    broken.source = Source()
    canonicalize(broken)
    down = next(x for x in recognize(broken).linears if x.name.endswith("1.mlp.down_proj"))
    broken.set_weight(down.weight, MemoryWeight(torch.full((24, 32), math.nan)))
    with pytest.raises(BadInput, match="NaN or infinite on the calibration data"):
        gw.optimize(broken, "drop-blocks", calibration=batches())


def test_a_path_prints_as_it_is_written() -> None:
    for text in ("path{blocks=0-3,3,5-11}", "drop-blocks{count=2 score=angular}"):
        assert str(Recipe.parse(text)) == text


# --- every block of a trained model, in steps with its cache --------------------------------------

STEPS = 16
TINY = 10
"""Blocks of zoo:tiny-llama."""
SMALL: list[Batch] = [{"input_ids": torch.ones(1, 3, dtype=torch.int64),
                       "attention_mask": torch.ones(1, 3, dtype=torch.int64)}]  # fmt: skip
PROMPT = [1, 523, 77, 1801, 40, 3007, 9]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, dict[str, View]]:
    """The library's zoo:tiny-llama, and its graphs with the cache by kind."""
    fx = load("zoo:tiny-llama", cache=True)
    model = transformers.LlamaForCausalLM.from_pretrained(fx.source.folder, dtype=torch.float32)
    graphs: dict[str, View] = {"fx": fx, "onnx": translated(fx)}
    for graph in graphs.values():
        canonicalize(graph)  # once: every run raises a copy
    return model.eval(), graphs


def without_block(model: Any, dropped: int, tokens: list[int]) -> Tensor:
    """What the library says behind the prompt and each of the tokens without one decoder layer."""
    own = model.model.layers
    rest = torch.nn.ModuleList([layer for i, layer in enumerate(own) if i != dropped])
    try:
        model.model.layers, model.config.num_hidden_layers = rest, len(rest)
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([PROMPT + tokens[:-1]]), use_cache=False).logits
    finally:
        model.model.layers, model.config.num_hidden_layers = own, len(own)
    return logits[0, len(PROMPT) - 1 :]


def in_steps(run: Any) -> tuple[list[int], Tensor]:
    """What ``run``, from inputs to outputs by name, writes by its cache, and the logits."""
    tokens, logits = [], []
    state = {"input_ids": torch.tensor([PROMPT])}
    for step in range(STEPS):
        mask = torch.ones(1, len(PROMPT) + step, dtype=torch.int64)
        outputs = run({**state, "attention_mask": mask})
        logits.append(outputs.pop("logits")[0, -1])
        tokens.append(int(logits[-1].argmax()))
        past = {name.replace("present", "past_key_values"): t for name, t in outputs.items()}
        state = {"input_ids": torch.tensor([tokens[-1:]]), **past}
    return tokens, torch.stack(logits)


def assert_same_text(run: Any, model: Any, dropped: int) -> None:
    tokens, logits = in_steps(run)
    expected = without_block(model, dropped, tokens)
    assert tokens == expected.argmax(-1).tolist()
    assert float((logits - expected).abs().max()) < 1e-4


def rest_of(dropped: int) -> BlockPath:
    return BlockPath.of(i for i in range(TINY) if i != dropped)


@pytest.mark.parametrize("dropped", (0, 3, TINY - 1))
def test_without_a_block_a_trained_model_writes_what_the_library_does(
    tiny: Any, dropped: int
) -> None:
    model, graphs = tiny
    shorter = graphs["fx"].copy()
    follow(shorter, recognize(shorter).blocks, rest_of(dropped), rule="path")
    assert len(recognize(shorter).blocks) == TINY - 1
    assert_same_text(lambda inputs: sweep(shorter, inputs), model, dropped)


@pytest.mark.parametrize("dropped", [0, TINY - 1])
def test_so_it_does_in_onnx_runtime(tiny: Any, dropped: int) -> None:
    model, graphs = tiny
    shorter = graphs["onnx"].copy()
    follow(shorter, recognize(shorter).blocks, rest_of(dropped), rule="path")
    run = gw.compile(shorter, backend="onnxruntime")
    assert_same_text(lambda inputs: run(**inputs), model, dropped)


def test_the_block_that_a_score_drops_is_gone_in_onnx_runtime(tiny: Any) -> None:
    model, graphs = tiny
    done = gw.optimize(graphs["onnx"], "drop-blocks{score=random seed=3}", samples=SMALL)
    (site,) = done.report.passes[0].result.sites
    dropped = int(site.name.removeprefix("block "))
    assert 0 < dropped < TINY - 1, "neither end, which are tried above"
    run = gw.compile(done.graph, backend="onnxruntime")
    assert_same_text(lambda inputs: run(**inputs), model, dropped)


def test_healing_serves_text_that_begins_anywhere(tiny: Any) -> None:
    """Each calibration text begins with a BOS, which all tokens look at: a map that knew nothing
    else was worse than none where there is no BOS (85 against 53 in perplexity)."""
    view = tiny[1]["fx"]
    tokenizer = read_tokenizer(Path(view.source.folder or ""))
    texts = [text for text in shipped_text("calibration") if len(text) > 900]
    learned, other = (token_batches(tokenizer, part, batch=8, longest=48)
                      for part in (texts[:8], texts[8:12]))  # fmt: skip
    (unseen,) = [{name: x[:, 1:] for name, x in batch.items()} for batch in other]
    expected = sweep(view, unseen)["logits"].log_softmax(-1)
    moved = []
    for heal in ("none", "linear"):
        recipe = f"path{{blocks=0-2,5-9 heal={heal}}}"
        done = gw.optimize(view, recipe, calibration=learned, samples=learned[:1])
        actual = sweep(done.graph, unseen)["logits"].log_softmax(-1)
        moved.append(float((expected.exp() * (expected - actual)).sum(-1).mean()))
    assert moved[1] < moved[0]

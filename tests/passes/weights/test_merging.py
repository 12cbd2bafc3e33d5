"""What fine-tuning changed elsewhere: sums of checkpoints, dropped differences, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.core.view import View
from graphwright.ir.run.sweep import sweep
from graphwright.passes.weights.delta_pass import dropped
from safetensors.torch import save_file

from ..calibrated import optimize, rel
from ..conftest import toy

KINDS = ("fx", "onnx")
Graphs = Callable[..., View]
Inputs = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 6


def state(seed: int | None = None, size: float = 0.02) -> Tensors:
    """The toy's tensors, fine-tuned if there is a seed."""
    tensors = {name: tensor.detach().clone() for name, tensor in toy().state_dict().items()}
    if seed is None:
        return tensors
    rng = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=rng)
        for name, tensor in tensors.items()
    }


def computed(tensors: Tensors, inputs: Inputs) -> torch.Tensor:
    """What the toy itself makes of other tensors."""
    module = toy()
    module.load_state_dict(tensors)
    with torch.no_grad():
        logits: torch.Tensor = module(**inputs)
    return logits


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base and two fine-tuned checkpoints: a file, a folder, and a folder of shards."""
    folder, shards = tmp_path / "one", tmp_path / "two"
    folder.mkdir()
    shards.mkdir()
    save_file(state(), tmp_path / "base.safetensors")
    save_file(state(1), folder / "model.safetensors")
    tensors = state(2)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, shards / shard)
    index = {"weight_map": where}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"base": tmp_path / "base.safetensors", "one": folder, "two": shards}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["", " base={base}"])
def test_a_merge_computes_what_the_sum_does(
    base: str, kind: str, files: dict[str, Path], toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    recipe = f"merge{{deltas=[{files['one']} {files['two']}] scale=0.5{base.format(**files)}}}"
    merged = optimize(toy_graph(kind), recipe, toy_inputs)
    source, one, two = state(), state(1), state(2)
    total = {n: w + 0.5 * (one[n] - w) + 0.5 * (two[n] - w) for n, w in source.items()}
    (out,) = sweep(merged.graph, toy_inputs).values()
    torch.testing.assert_close(out, computed(total, toy_inputs), rtol=1e-4, atol=1e-5)
    planned = gw.plan(toy_graph(kind), recipe).passes[0][1]
    done = merged.report.passes[0].result
    assert [s.name for s in planned.sites] == [s.name for s in done.sites]
    assert {s.name for s in done.sites} == set(source)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_behind_compensates_the_gap_to_the_sum(
    kind: str, files: dict[str, Path], toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    recipe = f"merge{{deltas=[{files['one']}]}},quantize{{bits=2 group=16}}"
    for propagate in ("compensated", "dense"):
        path = f"eora{{rank=40 factors=float32 propagate={propagate}}}"
        repaired = optimize(toy_graph(kind), f"{recipe},{path}", toy_inputs)
        (out,) = sweep(repaired.graph, toy_inputs).values()
        torch.testing.assert_close(out, computed(state(1), toy_inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dare_drops_and_rescales(
    kind: str, files: dict[str, Path], toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    recipe = f"dare{{base={files['one']} p=0.75 seed=3}}"
    merged = optimize(toy_graph(kind), recipe, toy_inputs).graph
    source, base = state(), state(1)
    rescaled = {n: base[n] + dropped(w - base[n], 0.75, 3, n) for n, w in source.items()}
    delta = torch.cat([(rescaled[n] - base[n]).flatten() for n in source])
    assert abs(float((delta == 0).float().mean()) - 0.75) < 0.02
    (out,) = sweep(merged, toy_inputs).values()
    torch.testing.assert_close(out, computed(rescaled, toy_inputs), rtol=1e-4, atol=1e-5)
    nothing = optimize(toy_graph(kind), f"dare{{base={files['one']} p=0}}", toy_inputs).graph
    assert rel(sweep(toy_graph(kind), toy_inputs), sweep(nothing, toy_inputs)) < 1e-5


def test_the_largest_differences_stay_as_they_are(
    files: dict[str, Path], graph: View, toy_inputs: Inputs
) -> None:
    recipe = f"dare{{base={files['one']} p=0.75 keep=largest}}"
    merged = optimize(graph, recipe, toy_inputs).graph
    source, base = state(), state(1)
    largest = {}
    for name, weight in source.items():
        delta = (weight - base[name]).abs()
        bound = delta.flatten().sort(descending=True).values[round(delta.numel() * 0.25) - 1]
        largest[name] = torch.where(delta >= bound, weight, base[name])
    (out,) = sweep(merged, toy_inputs).values()
    torch.testing.assert_close(out, computed(largest, toy_inputs), rtol=1e-4, atol=1e-5)


def test_the_mean_and_the_variance_of_dropped_differences() -> None:
    rng = torch.Generator().manual_seed(0)
    delta, x = 0.01 * torch.randn(1, 64, generator=rng), torch.randn(64, generator=rng)
    draws = torch.stack([(dropped(delta, 0.9, seed, "w") @ x)[0] for seed in range(4000)])
    variance = 9 * float((delta * x).square().sum())
    apart = abs(float(draws.mean()) - float((delta @ x)[0]))
    assert apart < 4 * (variance / len(draws)) ** 0.5
    assert float(draws.var()) == pytest.approx(variance, rel=0.1)
    assert torch.equal(dropped(delta, 0.9, 1, "w"), dropped(delta, 0.9, 1, "w"))
    assert not torch.equal(dropped(delta, 0.9, 1, "w"), dropped(delta, 0.9, 1, "v"))


def test_excluded_weights_stay(
    files: dict[str, Path], toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    recipe = f"merge{{deltas=[{files['one']}] exclude=[head.* embed.*]}}"
    merged = optimize(toy_graph("fx"), recipe, toy_inputs)
    source, one = state(), state(1)
    weights = {n: w if n[:4] in ("head", "embe") else one[n] for n, w in source.items()}
    (out,) = sweep(merged.graph, toy_inputs).values()
    torch.testing.assert_close(out, computed(weights, toy_inputs), rtol=1e-4, atol=1e-5)


def test_checkpoints_that_do_not_fit(
    files: dict[str, Path], tmp_path: Path, graph: View, toy_inputs: Inputs
) -> None:
    other, less, spoilt = state(), state(), state()
    other["up.weight"] = torch.zeros(40, 30)
    del less["down.weight"]
    spoilt["gate.bias"][2] = torch.nan
    paths = {}
    for name, tensors in (("other", other), ("less", less), ("spoilt", spoilt)):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    first = files["one"]
    for recipe, reason in (
        (f"merge{{deltas=[{paths['other']}]}}", r"up.weight is \S+ \[40, 30\] and .*archit"),
        (f"merge{{deltas=[{first} {paths['less']}]}}", r"deltas\[1\]=.*no tensor.*down.weight"),
        (f"dare{{base={paths['less']}}}", "base=.*holds no tensor of this name: down.weight"),
        (f"merge{{deltas=[{paths['spoilt']}]}}", "gate.bias would hold NaN or infinities"),
        (f"merge{{deltas=[{tmp_path / 'nowhere'}]}}", "there is no such file or folder"),
        (f"merge{{deltas=[{tmp_path / 'pickled'}]}}", "of a pickled checkpoint"),
        (f"merge{{deltas=[{tmp_path / 'torn.safetensors'}]}}", "not a safetensors file"),
        (f"quantize,merge{{deltas=[{first}]}}", "an earlier pass changed gate: put merge first"),
        (f"magnitude,dare{{base={first}}}", "an earlier pass changed gate: put dare first"),
        (f"merge{{deltas=[{first}] exclude=[*]}}", "no weight of the model is left to change"),
        ("merge{deltas=[]}", "deltas= names no checkpoint"),
        (f"merge{{deltas=[{first}] drop=1}}", "drop=1.0 must be at least 0 and below 1"),
        (f"dare{{base={first} p=1}}", "p=1.0 must be at least 0 and below 1"),
    ):
        with pytest.raises(BadInput, match=reason):
            optimize(graph, recipe, toy_inputs)
        if "NaN" not in reason:  # the forecast reads no tensor
            with pytest.raises(BadInput, match=reason):
                gw.plan(graph, recipe)


# --- adapters ------------------------------------------------------------------------------------


def adapter(folder: Path, changed: Tensors | None = None, **config: Any) -> Path:
    """An adapter of ``up`` and ``down`` as PEFT writes it; ``changed`` tensors replace its own."""
    rng = torch.Generator().manual_seed(5)
    sizes = {"up": (40, 32), "down": (32, 40)}
    tensors = {}
    for name, (out, fan_in) in sizes.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(RANK, fan_in, generator=rng)
        tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(out, RANK, generator=rng)
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **(changed or {})}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
            "base_model_name_or_path": "a/toy", **config}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def adapted(folder: Path, scaling: float | dict[str, float]) -> Tensors:
    from safetensors.torch import load_file

    factors, tensors = load_file(folder / "adapter_model.safetensors"), state()
    for name in ("up", "down"):
        stem = f"base_model.model.{name}"
        product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
        own = scaling[name] if isinstance(scaling, dict) else scaling
        tensors[f"{name}.weight"] += own * product
        lengths = factors.get(f"{stem}.lora_magnitude_vector")
        if lengths is not None:
            rows = torch.nn.functional.normalize(tensors[f"{name}.weight"], dim=1)
            tensors[f"{name}.weight"] = lengths[:, None] * rows
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", ["true", "false"])
@pytest.mark.parametrize("root", [False, True])
def test_an_adapter_computes_what_peft_defines(
    root: bool, fold: str, kind: str, tmp_path: Path, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    folder = adapter(tmp_path / "lora", use_rslora=root)
    recipe = f"adapter{{path={folder} fold={fold} scale=0.5}}"
    optimized = optimize(toy_graph(kind), recipe, toy_inputs)
    scaling = 0.5 * ALPHA / (RANK**0.5 if root else RANK)
    expected = computed(adapted(folder, scaling), toy_inputs)
    ran = gw.compile(optimized.graph, backend="onnxruntime")(**toy_inputs)
    for out in (*sweep(optimized.graph, toy_inputs).values(), *ran.values()):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    planned = gw.plan(toy_graph(kind), recipe).passes[0][1]
    done = optimized.report.passes[0].result
    assert [(s.name, s.bytes_after) for s in planned.sites] == [
        (s.name, s.bytes_after) for s in done.sites
    ]


DORA = {"base_model.model.up.lora_magnitude_vector": torch.rand(40) + 0.5,
        "base_model.model.down.lora_magnitude_vector": torch.rand(32) + 0.5}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_dora_gives_their_length(
    kind: str, tmp_path: Path, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    folder = adapter(tmp_path / "dora", DORA, use_dora=True)
    optimized = optimize(toy_graph(kind), f"adapter{{path={folder}}}", toy_inputs)
    expected = computed(adapted(folder, ALPHA / RANK), toy_inputs)
    (out,) = sweep(optimized.graph, toy_inputs).values()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="DoRA's, which scales the rows of down itself: no path"):
        optimize(toy_graph(kind), f"adapter{{path={folder} fold=false}}", toy_inputs)


def test_ranks_and_alphas_of_their_own(tmp_path: Path, graph: View, toy_inputs: Inputs) -> None:
    """By the end of a module's name; r and alpha are those of the rest."""
    small = {"base_model.model.up.lora_A.weight": torch.randn(2, 32),
             "base_model.model.up.lora_B.weight": torch.randn(40, 2)}  # fmt: skip
    folder = adapter(tmp_path / "lora", small, rank_pattern={"^u.": 2}, alpha_pattern={"down": 1})
    expected = computed(adapted(folder, {"up": ALPHA / 2, "down": 1 / RANK}), toy_inputs)
    optimized = optimize(graph, f"adapter{{path={folder}}}", toy_inputs)
    (out,) = sweep(optimized.graph, toy_inputs).values()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_path_beside_quantized_weights(
    tmp_path: Path, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    folder = adapter(tmp_path / "lora")
    quantized = optimize(toy_graph("fx"), "quantize{bits=8}", toy_inputs)
    both = optimize(
        toy_graph("fx"), f"quantize{{bits=8}},adapter{{path={folder} fold=false}}", toy_inputs
    )
    expected = computed(adapted(folder, ALPHA / RANK), toy_inputs)
    error = rel({"o": expected}, {"o": next(iter(sweep(both.graph, toy_inputs).values()))})
    own = rel(sweep(toy_graph("fx"), toy_inputs), sweep(quantized.graph, toy_inputs))
    assert error < 3 * own < 0.1


def test_adapters_that_do_not_fit(tmp_path: Path, graph: View, toy_inputs: Inputs) -> None:
    wide = {"base_model.model.up.lora_A.weight": torch.zeros(RANK, 48)}
    stray = {f"base_model.model.layers.0.q.lora_{x}.weight": torch.zeros(RANK, RANK) for x in "AB"}
    lone = {"base_model.model.gate.lora_A.weight": torch.zeros(RANK, 32)}
    cases: list[tuple[Tensors, dict[str, Any], str]] = [
        (wide, {}, r"\[40, 4\] and \[4, 48\] for up, which is \[40, 32\] .*its base is a/toy"),
        (stray, {}, "changes layers.0.q, which this model does not have .*its base is a/toy"),
        (lone, {}, "gate has no pair of matrices"),
        ({}, {"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({}, {"use_dora": True}, "use_dora is True, and .*down.lora_magnitude_vector is not there"),
        (DORA, {}, "use_dora is False, and .*down.lora_magnitude_vector is there"),
        (
            {**DORA, "base_model.model.up.lora_magnitude_vector": torch.ones(3)},
            {"use_dora": True},
            r"\[40, 4\] and \[4, 32\] and \[3\] for up, which is \[40, 32\]",
        ),
        ({}, {"modules_to_save": ["head"]}, "it has whole modules beside the adapter"),
        ({}, {"rank_pattern": {"up": 2}}, "up.lora_A.weight has rank 2, and it has 4"),
        ({}, {"rank_pattern": {"(": 2}}, r"rank_pattern has the key '\('"),
        ({}, {"alpha_pattern": {"up": "x"}}, "alpha_pattern is .*no table of numbers"),
        ({}, {"bias": "all"}, "it has biases, which is not read"),
        ({}, {"r": 8}, r"by adapter_config.json .*down.lora_A.weight has rank 8, and it has 4"),
        ({}, {"r": "many"}, "r='many' and lora_alpha=6 are no rank"),
    ]
    for i, (changed, config, reason) in enumerate(cases):
        folder = adapter(tmp_path / f"lora{i}", changed, **config)
        with pytest.raises(BadInput, match=reason):
            optimize(graph, f"adapter{{path={folder}}}", toy_inputs)
        with pytest.raises(BadInput, match=reason):
            gw.plan(graph, f"adapter{{path={folder}}}")
    fine = adapter(tmp_path / "fine")
    for recipe, reason in (
        (f"adapter{{path={tmp_path}}}", "not a folder with adapter_config.json and"),
        (f"quantize,adapter{{path={fine}}}", "changed down: put adapter first, or .*fold=false"),
    ):
        with pytest.raises(BadInput, match=reason):
            optimize(graph, recipe, toy_inputs)


def test_an_adapter_of_a_weight_that_is_shared(
    tmp_path: Path, toy_graph: Graphs, toy_inputs: Inputs
) -> None:
    def tie(toy: Any) -> None:
        toy.head.weight = toy.embed.weight

    changed = {
        "base_model.model.head.lora_A.weight": torch.zeros(RANK, 32),
        "base_model.model.head.lora_B.weight": torch.zeros(17, RANK),
    }
    folder = adapter(tmp_path / "lora", changed)
    with pytest.raises(BadInput, match="the weight of head is shared, and the adapter is for one"):
        optimize(toy_graph("fx", tie), f"adapter{{path={folder}}}", toy_inputs)

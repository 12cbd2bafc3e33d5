"""The developers' benches, as far as they can be wrong without being slow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import graphwright as gw
import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.tools.bench import checkpoints, eora, int4, large, phases, translation
from graphwright.tools.bench.checkpoints import SHAPES, Shape, write
from graphwright.tools.bench.processes import CommandFailed, Usage, environment, measure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

TINY = {"layers": 1, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "vocab": 40}
LLAMA = Shape("llama", **TINY, dtype=torch.float32)
QWEN2 = Shape("qwen2", **TINY, dtype=torch.bfloat16, tied=True)


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "POOL", 4093)


def printed(table: Table) -> str:
    console = Console(file=StringIO(), width=250)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LLAMA, QWEN2], ids=lambda s: s.model_type)
def test_transformers_reads_what_was_written(shape: Shape, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write(shape, tmp_path, shard_bytes=12_000)
    stored = _stored(tmp_path, 12_000)
    assert sum(t.nbytes for t in stored.values()) == shape.nbytes
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values()), notes
    assert model.dtype == shape.dtype
    head, table = model.lm_head.weight, model.get_input_embeddings().weight
    assert (head is table) == shape.tied == ("lm_head.weight" not in stored)
    read = model.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


def _stored(folder: Path, most: int) -> dict[str, torch.Tensor]:
    """What lies in the shards, none of which is larger than it may be."""
    tensors: dict[str, torch.Tensor] = {}
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        part = load_file(shard)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= most
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def test_we_read_what_was_written(tmp_path: Path) -> None:
    write(QWEN2, tmp_path, shard_bytes=12_000)
    weights = gw.load(str(tmp_path)).weights()
    for name, tensor in _stored(tmp_path, 12_000).items():
        assert torch.equal(weights[name].read(), tensor)


def test_no_rows_and_no_tensors_are_equal(tmp_path: Path) -> None:
    write(LLAMA, tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    stored = load_file(shard)
    for tensor in stored.values():
        assert bool(torch.isfinite(tensor).all()) and float(tensor.std()) > 0
        assert len(tensor) == len(tensor.unique(dim=0)) or tensor.dim() == 1
    alike = [(a, b) for a, b in combinations(stored.values(), 2) if a.shape == b.shape]
    assert alike and not any(torch.equal(a, b) for a, b in alike)


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(QWEN2, tmp_path / name, seed=seed)
    a, b, c = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in "abc")
    assert a == b != c


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(BadInput, match="holds something already"):
        write(LLAMA, tmp_path)


@pytest.mark.parametrize(
    ("name", "billions", "gigabytes"),
    [("l01", 0.12, 0.5), ("q01", 0.09, 0.19), ("q05", 0.49, 0.99), ("q15", 1.54, 3.09),
     ("l7", 6.74, 13.48)],
)  # fmt: skip
def test_the_named_shapes(name: str, billions: float, gigabytes: float) -> None:
    shape = SHAPES[name]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.006)
    assert shape.nbytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


# --- processes -----------------------------------------------------------------------------------

BUSY = "import time; x = b'1' * 60_000_000; time.sleep(.3)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"


def test_seconds_and_memory_of_a_descendant_count() -> None:
    usage = measure([sys.executable, "-c", f"print('done'); {CHILD}"], environment(1))
    assert usage.peak_anonymous > 60_000_000
    assert 60_000_000 < usage.peak_rss < 150_000_000  # of the child, not of what runs this test
    assert usage.seconds > 0 and usage.wall > 0.3
    assert (usage.status, usage.output) == (0, "done\n")


def test_a_process_is_killed_where_the_bench_says_so() -> None:
    endless = [sys.executable, "-c", "while True: pass"]
    usage = measure(endless, environment(None), lambda: True, check=False)
    assert usage.status == -9


def test_a_failure_shows_what_was_said() -> None:
    with pytest.raises(CommandFailed, match="ended with 3:\nbecause"):
        measure(
            [sys.executable, "-c", "import sys; sys.stderr.write('because'); sys.exit(3)"],
            environment(None),
        )


def test_threads_are_set_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(1)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(None)
    assert int4.thread_counts("1,default") == [1, None]
    with pytest.raises(ValueError, match="1 or more"):
        int4.thread_counts("0")


# --- what is printed -----------------------------------------------------------------------------


def usage(seconds: float, memory: int) -> Usage:
    return Usage(seconds, 2 * seconds, 2 * memory, memory, 0, "")


def test_int4_compares_runs_of_the_same_checkpoint_and_threads() -> None:
    runs = [
        int4.Run(name, 10**9, threads, tool, usage(seconds, memory), 10**8)
        for name, threads, tool, seconds, memory in (
            ("q05", 1, int4.OURS, 30.0, 10**9), ("q05", 1, int4.PEER, 10.0, 4 * 10**9),
            ("q05", None, int4.OURS, 80.0, 10**9), ("q05", None, int4.PEER, 20.0, 2 * 10**9),
            ("q15", 1, int4.OURS, 77.0, 10**9),
        )
    ]  # fmt: skip
    lines = [line for line in printed(int4.table(runs)).splitlines() if int4.OURS in line]
    assert "3.00" in lines[0] and "0.25" in lines[0]
    assert "4.00" in lines[1] and "0.50" in lines[1]
    assert lines[2].replace("│", "").split()[-1] == "100"


def test_translation_says_how_it_grows() -> None:
    timings = [translation.Timing(16, 1, 2, 1, 500), translation.Timing(48, 3, 6, 4.5, 1500)]
    assert "10.50" in (text := printed(translation.table(timings)))
    assert "3.00" in text and "3.50" in text


def test_eora_compares_residuals() -> None:
    runs = [
        eora.Run("ours", usage(60, 10**9), eora.Residual(84, 0.1, 0.04)),
        eora.Run("script", usage(40, 10**9), eora.Residual(84, 0.1, 0.05)),
    ]
    ratios = printed(eora.table(runs)).splitlines()[-2].replace("│", "").split()
    assert ratios == ["ratio", "1.50", "1.50", "1.00", "1.00", "1.00", "1.00", "0.80"]


def test_eora_reads_our_residual_from_the_manifest() -> None:
    note = "mean relative error of the linears' outputs: 0.1082, compensated 0.04521"
    steps: list[Mapping[str, Any]] = [
        {"notes": [], "sites": [1]}, {"notes": ["x", note], "sites": [1, 2]}
    ]  # fmt: skip
    assert eora._from_manifest({"passes": steps}) == eora.Residual(2, 0.1082, 0.04521)
    with pytest.raises(BadInput, match="no pass of the run compensates"):
        eora._from_manifest({"passes": steps[:1]})


def test_compensation_by_hand_is_what_eckart_and_young_promise() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 24, bias=False).requires_grad_(False), torch.randn(2, 100, 64)
    hook = eora.Compensation(rank=24)
    out = hook(linear, (x,), torch.empty(0))
    assert torch.allclose(out, linear(x), atol=1e-4)  # with every rank nothing is left
    ((before, after),) = hook.errors
    rounded = torch.nn.functional.linear(x, eora.round_to_nearest(linear.weight.data))
    distance = torch.linalg.norm(linear(x) - rounded) / torch.linalg.norm(linear(x))
    assert before == pytest.approx(float(distance), rel=1e-3) and after < 1e-4


def test_large_holds_the_forecast_against_the_run() -> None:
    forecast = {"seconds": 100.0, "peak_rss_bytes": 3e9, "artifact_bytes": 4e9}
    outcome = large.Outcome(forecast, usage(30, 10**9), usage(70, 2 * 10**9), None, 4 * 10**9, None)
    ratios = printed(large.table(outcome, LLAMA)).splitlines()[-2].replace("│", "").split()
    assert ratios == ["forecast", "/", "run", "1.00", "0.50", "0.75", "1.50", "1.00"]


def test_large_kills_at_half_of_the_sites(tmp_path: Path) -> None:
    half = large._half_done(tmp_path / "out", {"passes": [{"sites": [1, 2, 3, 4]}]})
    state = tmp_path / "out.partial"
    assert not half()
    state.mkdir()
    (state / "run.json").write_text(json.dumps({}))
    (state / "1.result").write_text("")
    assert not half()
    (state / "2.result").write_text("")
    assert half()


def test_phases_leave_out_what_only_passes_on() -> None:
    seconds = {
        ("run", "load"): 3.0, ("run", "load", "read"): 1.0, ("run", "check"): 0.01,
        ("imports",): 2.0, ("run", "write", "store"): 4.0,
    }  # fmt: skip
    assert list(phases.rows(seconds)) == [
        (1, "run", 8.01, 0.0),
        (2, "load", 4.0, 3.0), (3, "read", 1.0, 1.0),
        (2, "store", 4.0, 4.0),
        (1, "imports", 2.0, 2.0),
    ]  # fmt: skip
    last = printed(phases.table(seconds, 1.0)).splitlines()[-2]
    assert last.replace("│", "").split() == ["11.0", "100", "all"]

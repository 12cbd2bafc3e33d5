"""``optimize-model`` end to end on real weights: the artifact, the exit codes, the messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphwright.ir.load.zoo import minilm
from graphwright.tools.report import manifest


@pytest.fixture(scope="module")
def artifact(publish: Callable[..., Path]) -> Path:
    """Judged on a quarter of its sentences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilm, "SAMPLE_COUNT", 64)
        return publish("zoo:minilm", "quantize{bits=4 group=32 accuracy_level=0}")


def test_the_manifest_keeps_to_its_schema_and_tells_what_happened(
    artifact: Path, keeps_schema: Any
) -> None:
    keeps_schema(json.loads((artifact / manifest.FILE_NAME).read_bytes()))
    done = manifest.load(artifact)
    (step,) = done.passes
    assert len(step.sites) == 36 and step.refused == []
    before, after = sum(s.bytes_before for s in step.sites), sum(s.bytes_after for s in step.sites)
    assert after / before == pytest.approx(4.5 / 32)
    assert done.sizes.artifact_bytes < 0.62 * done.sizes.source_bytes
    assert done.verification.samples == 64
    unoptimized = done.verification.runtime.unoptimized
    assert unoptimized is not None and unoptimized.rel_l2 is not None
    assert unoptimized.rel_l2 < 1e-5
    assert done.source.name == "zoo:minilm" and len(done.source.sha256) == 64
    assert {"model.onnx", "model.onnx.data", "report.html", "tokenizer.json"} <= {
        path.name for path in artifact.iterdir()
    }


def test_the_target_decides_what_the_recipe_leaves_open_and_a_replay_gives_the_same_bytes(
    publish: Callable[..., Path], command: Any
) -> None:
    folder = publish("zoo:tiny-vit", "quantize{bits=4 group=16}", "--target", "portable")
    done = manifest.load(folder)
    assert (done.target, done.recipe) == ("portable", "quantize{bits=4 group=16 accuracy_level=4}")
    assert "activations are rounded to 8 bits" in done.passes[0].notes[-1]
    code, out, _ = command("replay", str(folder))
    assert code == 0 and "byte-identical" in out
    code, _, err = command("zoo:tiny-vit", "--target", "portabel")
    assert code == 2 and "did you mean portable?" in err


def test_a_bound_that_fails_publishes_nothing(tmp_path: Path, command: Any) -> None:
    out = tmp_path / "out"
    code, _, err = command(
        "zoo:tiny-vit", "-p", "quantize{bits=2 group=16}", "-o", str(out), "--max-error", "0.001"
    )
    assert code == 1 and not list(tmp_path.iterdir())
    assert "after quantize the output" in err and "Rolled back" in err
    assert "Worst site: vit.layers." in err and "Try more bits" in err


def test_a_foreign_folder_is_left_alone(tmp_path: Path, command: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = command("zoo:minilm", "-p", "quantize", "-o", str(tmp_path))
    assert code == 2 and "--force" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("zoo:minlm", "-p", "clean"), 2, "minilm"),
        (("nowhere.onnx",), 3, "nowhere.onnx"),
        (("zoo:minilm", "-p", "quantise"), 2, "did you mean quantize"),
        (("zoo:minilm", "-p", "quantize{bits=4 group=48}"), 2, "group=48 must be one of"),
        (("zoo:tiny-vit", "-p", "quantize{exclude=[nothing.*]}"), 2, "exclude=nothing.* matches"),
        (("zoo:minilm", "-r", "w5"), 2, "no recipe 'w5'"),
        (("zoo:minilm", "-r", "w4", "-p", "clean"), 2, "either -r or -p"),
        (("zoo:minilm", "--max-error", "0"), 2, "must be above 0"),
        (("zoo:minilm", "--backend", "triton"), 3, "use --backend onnxruntime or eager"),
        (("zoo:minilm", "--backend", "tensorrt"), 2, "onnxruntime"),
        (("zoo:minilm", "-p", "quantize{bits=4,group=32}"), 2, "by a comma: bits=4 group=..."),
        (("zoo:minilm", "--nonsense"), 2, "No such option"),
        (("nobody/nothing", "-p", "bitstack"), 2, "bitstack needs calibration data: give --calib"),
        (("insect", "zoo:minilm"), 2, "no command 'insect', and no model of that name; did you"),
        (("bogus",), 2, "error: bogus: a model is zoo:NAME"),
        (("diff", "nowhere", "nowhere"), 2, "nowhere"),
        (("passes", "quantise"), 2, "did you mean quantize"),
        (("passes", "nosuch"), 2, "there is no pass 'nosuch'; `optimize-model passes` lists"),
        (("zoo:minilm", "-p", ""), 2, "--passes is empty: give a value, or leave it out"),
        (("zoo:minilm", "-r", " "), 2, "--recipe is empty: give a value"),
        (("zoo:minilm", "--budget", ""), 2, "--budget is empty: give a value"),
        (("zoo:minilm", "-p", "clean", "--eval", ""), 2, "--eval is empty: give a value"),
        (("zoo:minilm", "-p", "clean", "--tasks", ""), 2, "--eval is empty: give a value"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], code: int, message: str, command: Any) -> None:
    status, out, err = command(*arguments)
    assert message in err
    assert (status, out) == (code, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words", ["bogus -p clean", "inspect zoo:bogus", "generate bogus hi", "eval bogus"]
)
def test_a_wrong_name_is_told_before_torch_is_imported(words: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from graphwright.tools.cli.main import main; "
        f"main({words.split()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model" in done.stderr and "loading" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("empty.onnx", b"", "empty"), ("garbage.onnx", b"garbage" * 9, "garbage.onnx"),
     ("garbage.pt2", b"PK garbage", "garbage.pt2")],
)  # fmt: skip
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path, command: Any) -> None:
    (tmp_path / name).write_bytes(content)
    code, _, err = command(str(tmp_path / name), "-p", "quantize", "-o", str(tmp_path / "out"))
    assert code == 2 and message in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_that_does_not_trace_says_where(
    tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "branching.py").write_text(
        "import torch\n"
        "class Gate(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "class Whole(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gate = Gate()\n"
        "    def forward(self, x):\n"
        "        return self.gate(x)\n"
        "def make():\n"
        "    return Whole(), (torch.randn(2, 3),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = command("branching:make", "-p", "quantize")
    sys.modules.pop("branching", None)
    assert code == 2 and "gate" in err


def test_dry_run_reads_no_weight(tmp_path: Path, command: Any, keeps_schema: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    }))  # fmt: skip
    code, out, err = command(str(tmp_path), "-p", "quantize{bits=4}", "--dry-run", "--json")
    assert code == 0, err
    planned = json.loads(out)
    keeps_schema(planned)
    assert len(planned["passes"][0]["sites"]) == 15
    assert planned["predicted"]["artifact_bytes"] < planned["sizes"]["source_bytes"]
    code, _, err = command(str(tmp_path), "-p", "quantize", "-o", str(tmp_path / "out"))
    assert code == 3 and "weights" in err


def test_listings(command: Any, artifact: Path) -> None:
    for arguments, part in (
        (("passes",), "easyquant"), (("passes", "hqq"), "round_zero"), (("recipes",), "w8"),
        (("diff", str(artifact), str(artifact)), ""),
        (("inspect", "zoo:minilm"), "36 linears"),
        (("explain", "zoo:minilm", "-p", "quantize{include=[*.query]}"), "attention.self.query"),
    ):  # fmt: skip
        code, out, err = command(*arguments)
        assert (code, part in out) == (0, True), (arguments, out, err)

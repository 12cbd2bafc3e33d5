"""The command's contract on a model of a file of one's own: codes, streams, what is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir
import pytest
import torch
from graphwright.backends.artifacts import artifact as artifact_files
from graphwright.ir.core.errors import BadInput
from graphwright.tools.report import manifest
from graphwright.tools.run import pipeline, replay

from ...models import NET_SOURCE

MODEL = "graphwright_toy_factory:make"
FACTORY = f"""{NET_SOURCE}
def make():
    return Net(), (torch.randn(2, 32),)
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; the factory can be imported."""
    home = tmp_path / "modules"
    home.mkdir()
    (home / "graphwright_toy_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(home))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    sys.modules.pop("graphwright_toy_factory", None)


def state(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_json_is_all_of_stdout_and_the_model_may_come_last(
    workplace: Path, command: Any, keeps_schema: Any
) -> None:
    code, out, err = command("--json", "-p", "quantize{bits=8 group=16}", "-o", "out8", MODEL)
    assert (code, err) == (0, "")
    printed = json.loads(out)
    keeps_schema(printed)
    assert printed == json.loads((workplace / "out8" / "graphwright.json").read_text())
    assert [site["name"] for site in printed["passes"][0]["sites"]] == ["wide", "last"]
    model = onnx_ir.load(workplace / "out8" / "model.onnx")
    assert model.metadata_props["graphwright.recipe"] == "quantize{bits=8 group=16}"
    sizes = [(workplace / "out8" / name).stat().st_size for name in artifact_files.MODEL_FILES]
    assert printed["sizes"]["artifact_bytes"] == sum(sizes)


def _replace(folder: Path) -> None:
    """Other weights, and a manifest that was made for them."""
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff\xff")
    known = manifest.load(folder)
    known.files = manifest.files(folder)
    manifest.write(folder, known)


def test_replay_and_diff(workplace: Path, command: Any) -> None:
    assert command(MODEL, "-p", "hqq{group=16}", "-o", "a")[0] == 0
    code, out, _ = command("replay", "a", "-o", "b", "--json", "--trust-source")
    assert code == 0 and json.loads(out)["identical"] is True
    for name in artifact_files.MODEL_FILES:
        assert (workplace / "a" / name).read_bytes() == (workplace / "b" / name).read_bytes()
    assert "agree in all but times" in command("diff", "a", "b")[1]
    _replace(workplace / "a")
    code, out, err = command("replay", "a", "--trust-source")
    assert (code, out) == (1, "") and "model.onnx.data came out different" in err
    known = manifest.load("a")
    known.machine.threads, known.machine.cpu = torch.get_num_threads() + 1, "an abacus"
    known.versions["torch"] = "0"
    manifest.write("a", known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "MOST_THREADS", 1)
        err = command("replay", "a", "--trust-source")[2]
    assert "(changed since: torch 0 to" in err and "processor an abacus to" in err
    assert f"threads {torch.get_num_threads() + 1} to {torch.get_num_threads()}" in err
    assert command(MODEL, "-p", "quantize{group=16}", "-o", "c")[0] == 0
    code, out, _ = command("diff", "a", "c", "--json")
    assert code == 0 and "hqq{group=16 accuracy_level=4}" in [row["a"] for row in json.loads(out)]


def test_a_source_that_has_changed_is_not_replayed(workplace: Path, command: Any) -> None:
    assert command(MODEL, "-p", "quantize", "-o", "a")[0] == 0
    factory = workplace.parent / "modules" / "graphwright_toy_factory.py"
    assert command(MODEL, "-p", "hqq", "-o", "precious")[0] == 0
    before = state(workplace)
    factory.write_text(FACTORY + "\n# another\n")
    for more in ((), ("-o", "precious"), ("-o", "new")):
        code, _, err = command("replay", "a", "--trust-source", *more)
        assert code == 2 and "has changed since a was made" in err
    assert state(workplace) == before


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_an_artifact_that_was_damaged_is_not_opened(
    name: str, workplace: Path, command: Any
) -> None:
    assert command(MODEL, "-p", "quantize{bits=8 group=16}", "-o", "a")[0] == 0
    content = bytearray((workplace / "a" / name).read_bytes())
    content[-1] ^= 1
    (workplace / "a" / name).write_bytes(content)
    for arguments in (
        ("replay", "a"), ("resize", "a", "--max-bytes", "9", "-o", "b"), ("inspect", "a"),
        ("diff", "a", "a"), ("eval", "a", "--tasks", "latency"), ("generate", "a", "x"),
        ("a", "-p", "clean"),
    ):  # fmt: skip
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and f"a/{name}: not as it was written" in err, arguments
    assert not (workplace / "b").exists()


def test_a_replay_that_differs_replaces_nothing(workplace: Path, command: Any) -> None:
    assert command(MODEL, "-p", "quantize", "-o", "a")[0] == 0
    assert command(MODEL, "-p", "hqq", "-o", "precious")[0] == 0
    _replace(workplace / "a")
    before = state(workplace)
    assert command("replay", "a", "--trust-source", "-o", "precious")[0] == 1
    assert state(workplace) == before


def test_an_artifact_does_not_take_the_place_of_its_source(workplace: Path, command: Any) -> None:
    assert command(MODEL, "-p", "quantize", "-o", "a")[0] == 0
    before = state(workplace)
    for model in ("a", "a/model.onnx"):
        code, _, err = command(model, "-p", "clean", "-o", "a", "--force")
        assert code == 2 and f"a holds the source, {model}" in err
    assert state(workplace) == before


def test_a_replay_runs_on_as_many_threads(
    workplace: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(MODEL, "-p", "quantize", "-o", "a")[0] == 0
    known, mine, counts = manifest.load("a"), torch.get_num_threads(), []
    assert known.machine.threads == mine
    known.machine.threads = mine + 1
    manifest.write("a", known)
    run = pipeline.run
    monkeypatch.setattr(
        pipeline, "run", lambda *a: (counts.append(torch.get_num_threads()), run(*a))[1]
    )
    assert command("replay", "a", "--trust-source")[0] == 0
    assert (counts, torch.get_num_threads()) == ([mine + 1], mine)


def test_a_manifest_runs_no_code_unless_asked(
    workplace: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of source it claims. A factory that runs here says so."""
    assert command(MODEL, "-p", "quantize{group=16}", "-o", "a")[0] == 0
    Path("evil.py").write_text(
        "import graphwright_toy_factory as toy\ntoy.ran = True\nmake = toy.make"
    )
    known = json.loads(Path("a", "graphwright.json").read_text())
    for kind in ("factory", "zoo", "hf", "onnx", "pt2"):
        known["source"] |= {"kind": kind, "name": "evil:make"}
        Path("a", "graphwright.json").write_text(json.dumps(known))
        for arguments in (("replay", "a"), ("replay", "a", "-o", "b"), ("bench", "a")):
            code, out, err = command(*arguments)
            warns = "evil:make" in err and "--trust-source" in err
            assert (code, out, warns or kind == "pt2") == (2, "", True), err
    toy = sys.modules["graphwright_toy_factory"]
    assert not hasattr(toy, "ran")
    known["source"]["kind"] = "factory"
    Path("a", "graphwright.json").write_text(json.dumps(known))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    assert "has changed since a was made" in command("replay", "a", "--trust-source")[2]
    assert hasattr(toy, "ran") and not Path("b").exists()
    sys.modules.pop("evil")


def test_a_manifest_fetches_no_model_unless_asked(
    workplace: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, *, local_files_only: bool = False, **_: Any) -> NoReturn:
        asked.append((name, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert command(MODEL, "-p", "quantize{group=16}", "-o", "a")[0] == 0
    known = json.loads(Path("a", "graphwright.json").read_text())
    known["source"] |= {"kind": "zoo", "name": "who/knows"}
    Path("a", "graphwright.json").write_text(json.dumps(known))
    for verb in ("replay", "bench"):
        code, _, err = command(verb, "a")
        assert code == 3 and "is not fetched unasked: `hf download who/knows`" in err
    assert asked == [("who/knows", True)] * 2
    assert command("replay", "a", "--trust-source")[0] == 3 and asked[-1] == ("who/knows", False)


def test_the_default_recipe_is_said(command: Any) -> None:
    code, out, err = command(MODEL)
    assert code == 0 and "quantize" in out
    assert err.startswith("No recipe given: using w8 (clean{optional=true},quantize{bits=8")


def test_with_data_and_a_folder_the_default_is_a_search(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(request: Any, steps: Any) -> NoReturn:
        asked.append((str(request.budget), request.calibration))
        raise BadInput("not now")

    monkeypatch.setattr(pipeline, "run", run)
    for arguments in (("zoo:tiny-vit",), (MODEL, "--calib", "zoo:tiny-vit")):
        code, _, err = command(*arguments, "-o", "out")
        assert code == 2 and "smallest artifact with a measured loss below 1 %" in err
    assert asked == [("loss=1%", "zoo:tiny-vit")] * 2
    command("zoo:tiny-vit", "-o", "out", "-r", "w8")
    assert asked[-1] == ("None", "")


def test_without_arguments_there_is_help(command: Any) -> None:
    code, out, err = command()
    assert (code, err) == (0, "") and "replay" in out and "explain" in out


# --- an older artifact stays whole --------------------------------------------------------------


def _stop(*args: object) -> NoReturn:
    raise KeyboardInterrupt


def _fill(*args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [(_stop, 130, "interrupted; nothing was published"), (_fill, 3, "ran full")],
)
def test_a_run_that_ends_midway(
    failure: Any, code: int, message: str, workplace: Path, command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert command(MODEL, "-p", "quantize", "-o", "out")[0] == 0
    before = state(workplace)
    # The model's files are written by then, and the rest is not.
    monkeypatch.setattr(artifact_files, "copy_side_files", failure)
    status, out, err = command(MODEL, "-p", "hqq", "-o", "out")
    assert (status, out) == (code, "") and message in err
    assert state(workplace / "out") == {name.removeprefix("out/"): h for name, h in before.items()}
    names = ["out", "out.partial"] if code == 130 else ["out"]
    assert sorted(path.name for path in workplace.iterdir()) == names
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace.parent / "modules"))
    assert command(MODEL, "-p", "hqq", "-o", "out", "--resume")[0] == 0
    assert [path.name for path in workplace.iterdir()] == ["out"]


def test_resume_without_an_artifact(command: Any) -> None:
    assert "give its -o" in command(MODEL, "-p", "hqq", "--resume")[2]


def test_a_bound_leaves_the_older_artifact(workplace: Path, command: Any) -> None:
    assert command(MODEL, "-p", "quantize", "-o", "out")[0] == 0
    before = state(workplace)
    code, out, err = command(MODEL, "-p", "hqq{bits=2}", "-o", "out", "--max-error", "1e-9")
    assert (code, out) == (1, "") and state(workplace) == before
    assert "after hqq the output" in err and "Worst site: " in err and "Try more bits" in err


@pytest.mark.parametrize(
    ("wrong_by", "message"),
    [
        ({True: 1.01, False: 1.01}, "(graph optimisation off): the output output is 0.01 (relat"),
        ({True: 1.05, False: 1.0}, "without the rounding of activations to 8 bits, which moves it"),
        ({True: 1.001, False: 1.0}, "alone moves the output output by 0.001 (relative L2; bound 0"),
    ],
)
def test_a_runtime_that_computes_something_else(
    wrong_by: dict[bool, float], message: str, workplace: Path, command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from graphwright.backends.artifacts import judging

    whole = judging.compile

    def wrong(*args: Any, **options: Any) -> Any:
        run, factor = whole(*args, **options), wrong_by[options["optimize"]]
        return lambda **inputs: {name: factor * out for name, out in run(**inputs).items()}

    monkeypatch.setattr(judging, "compile", wrong)
    code, out, err = command(MODEL, "-p", "quantize", "-o", "out")
    assert (code, out) == (1, "") and list(workplace.iterdir()) == []
    assert message in err


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((MODEL, "--device", "cuda"), 3, "torch sees no CUDA device: run with --device cpu"),
        ((MODEL, "--device", "cpuu"), 2, "did you mean cpu"),
        ((MODEL, "-p", "quantize{bits=five}"), 2, "bits=five is wrong: expected int"),
        ((MODEL, "-p", "quantize{bits=5}"), 2, "bits=5 must be one of 2, 3, 4, 8"),
        ((MODEL, "-p", "quantize{bts=4}"), 2, "no option 'bts'; did you mean bits"),
        ((MODEL, "-p", "quantize{"), 2, "'}' is missing"),
        ((MODEL, "-p", "quantize{exclude=[*]}"), 2, "quantize found nothing to do"),
        ((MODEL, "-r", "mine.toml"), 2, "no recipe 'mine.toml'"),
        ((MODEL, "--calib-samples", "0"), 2, "--calib-samples says how much of --calib is used"),
        ((MODEL, "--max-error", "nan"), 2, "--max-error nan must be above 0"),
        (("graphwright_toy_factory:mak",), 2, "no 'mak' there; did you mean make"),
        (("no_such_module:make",), 2, "No module named 'no_such_module'"),
        (("run",), 2, "Missing argument 'MODEL'"),
        (("replay", "nowhere"), 2, "there is no such folder"),
        (("bench",), 2, "name at least one artifact folder"),
        (("bench", "nowhere", "--batches", "0"), 2, "--batches '0' must be above 0"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], code: int, message: str, workplace: Path, command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = arguments[0] not in ("run", "replay", "bench")
    status, out, err = command(*arguments, *(("-o", "out") if run else ()))
    assert message in err
    assert (status, out) == (code, "")
    assert "Traceback" not in err and list(workplace.iterdir()) == []


def test_a_traceback_is_shown_on_request_only(command: Any) -> None:
    assert "Traceback" not in command("no_such_module:make", "-p", "clean")[2]
    assert "Traceback" in command("no_such_module:make", "-p", "clean", "-v")[2]


def _external(data: str) -> onnx_ir.Model:
    """``y = x + w``; the bytes of ``w`` lie in the file ``data``."""
    floats, shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape((400,))
    x = onnx_ir.Value(name="x", type=floats, shape=shape)
    w = onnx_ir.Value(name="w", type=floats, shape=shape)
    w.const_value = onnx_ir.ExternalTensor(
        data, 0, 1600, onnx_ir.DataType.FLOAT, shape=shape, name="w", base_dir=""
    )
    node = onnx_ir.Node("", "Add", [x, w])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", floats, shape
    graph = onnx_ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20}, name="g"
    )
    return onnx_ir.Model(graph, ir_version=10)


CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "vocab_size": 9,
          "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "model", "code", "message"),
    [
        ({"w.safetensors": b"garbage"}, "w.safetensors", 2, "holds weights, but no model"),
        ({"w.bin": b"pickle"}, "w.bin", 2, "pickles are never opened"),
        ({"m.onnx": "w.data"}, "m.onnx", 3, "w.data"),
        ({"m.onnx": "../w.data"}, "m.onnx", 2, "../w.data"),
        ({"m/config.json": CONFIG}, "m", 3, "no weights (model.safetensors"),
        ({"m/config.json": b"{"}, "m", 2, "config.json"),
        (
            {"m/config.json": CONFIG, "m/model.safetensors": b"garbage"},
            "m", 2, "model.safetensors: not a safetensors file",
        ),
        (
            {"m/config.json": CONFIG, "m/model.safetensors.index.json":
             {"weight_map": {"a": "model-1-of-2.safetensors"}}},
            "m", 3, "model-1-of-2.safetensors",
        ),
        (
            {"m/config.json": CONFIG, "m/pytorch_model.bin": b"pickle"},
            "m", 2, "pickles are never opened",
        ),
    ],
)  # fmt: skip
def test_damaged_models(
    files: dict[str, Any], model: str, code: int, message: str, workplace: Path, command: Any
) -> None:
    for name, content in files.items():
        path = workplace / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            onnx_ir.save(_external(content), path)
        else:
            text = json.dumps(content) if isinstance(content, dict) else content.decode()
            path.write_text(text)
    before = state(workplace)
    status, out, err = command(model, "-p", "quantize", "-o", "out")
    assert message in err
    assert (status, out) == (code, "")
    assert "Traceback" not in err and state(workplace) == before


def test_a_target_below_a_file(workplace: Path, command: Any) -> None:
    (workplace / "file").write_text("mine")
    code, _, err = command(MODEL, "-p", "quantize", "-o", "file/out")
    assert code == 2 and "is not writable: choose another --out" in err
    code, _, err = command(MODEL, "-p", "quantize", "-o", "file")
    assert code == 2 and "exists and is not a folder" in err
    assert state(workplace) == {"file": hashlib.sha256(b"mine").hexdigest()}

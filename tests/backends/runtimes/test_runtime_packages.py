"""Builds of ONNX Runtime that share one folder: told, with what runs and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from graphwright.backends.runtimes import onnxruntime as backend
from graphwright.backends.runtimes import runtime_packages
from graphwright.backends.runtimes.runtime_packages import installed, mixed_builds
from graphwright.ir.core.errors import BadInput, Missing


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    versions = {"onnxruntime": "1.40.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(runtime_packages, "installed", versions.get)
    mixed_builds.cache_clear()
    yield
    mixed_builds.cache_clear()


def test_one_build_is_nothing_to_tell() -> None:
    mixed_builds.cache_clear()
    there = [name for name in runtime_packages.BUILDS if installed(name)]
    assert len(there) == 1 and mixed_builds() == ""


def test_two_builds(both: None, tmp_path: Path) -> None:
    message = mixed_builds()
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with (
        pytest.warns(RuntimeWarning, match="are both installed, in one folder"),
        pytest.raises(BadInput, match=r"does not load it: (.|\n)*are both installed"),
    ):
        backend.build(tmp_path)
    assert "onnxruntime 1.40.0 and onnxruntime-gpu 1.31.1 are both installed" in message
    assert f"here {onnxruntime.__version__} with " in message and "CPU" in message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in message


@pytest.mark.parametrize(
    ("device", "built", "providers", "message"),
    [
        (False, None, ["CUDAExecutionProvider"],
         r"is a CPU build, unlike this ONNX Runtime, which has a CUDA provider: install one"),
        (False, None, [], r"is a CPU build: install one for CUDA"),
        (False, "13.0", [], r"is built for CUDA 13\.0, and no driver is there: install NVIDIA's"),
        (True, "13.0", [], r"is a build for CUDA, this ONNX Runtime is not: pip uninstall -y"),
    ],
)  # fmt: skip
def test_builds_of_two_kinds(
    device: bool, built: str | None, providers: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mixed_builds.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(Missing, match=message) as caught:
        backend.check_device("cuda")
    assert caught.value.exit_code == 3


def test_a_missing_provider_names_the_other_build(
    both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Missing, match=r"has no CUDA provider: .*are both installed"):
        backend.check_device("cuda")

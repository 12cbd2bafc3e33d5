"""Builds of ONNX Runtime that share one folder: told, with what runs and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from graphwright.backends import onnxruntime as backend
from graphwright.backends import runtime_packages
from graphwright.backends.runtime_packages import installed, mixed_builds
from graphwright.ir.core.errors import BadInput, Missing


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found = {"onnxruntime": "1.40.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(runtime_packages, "installed", found.get)
    mixed_builds.cache_clear()
    yield
    mixed_builds.cache_clear()


def test_one_build_is_nothing_to_tell() -> None:
    mixed_builds.cache_clear()
    there = [name for name in runtime_packages.BUILDS if installed(name)]
    assert len(there) == 1 and mixed_builds() == ""


def test_two_builds(both: None, tmp_path: Path) -> None:
    told = mixed_builds()
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with (
        pytest.warns(RuntimeWarning, match="are both installed, in one folder"),
        pytest.raises(BadInput, match=r"does not load it: (.|\n)*are both installed"),
    ):
        backend.build(tmp_path)
    assert "onnxruntime 1.40.0 and onnxruntime-gpu 1.31.1 are both installed" in told
    assert f"here {onnxruntime.__version__} with " in told and "CPU" in told
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in told


def test_a_missing_provider_names_the_other_build(
    both: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Missing, match=r"has no CUDA provider: .*are both installed"):
        backend.check_device("cuda")

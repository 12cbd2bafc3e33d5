"""Pages of a mapped file: they leave memory, and what they hold is there at the next touch."""

import time
from pathlib import Path

import pytest
import torch
from graphwright.ir.core import mapped_pages
from graphwright.ir.core.mapped_pages import release_files, release_in_turn, releasing_files
from graphwright.ir.core.weights import read_safetensors_header
from safetensors.torch import save_file

SIDE = 2048
MEGABYTES = SIDE * SIDE * 4 / 1e6


def _resident_megabytes(path: Path) -> float:
    """Of the mappings of a file, by what the system says of them."""
    kilobytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            inside = line.endswith(str(path))
        elif first == "Rss:" and inside:
            kilobytes += int(line.split()[1])
    return kilobytes / 1e3


@pytest.fixture(autouse=True)
def small_files_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_pages, "LEAST_FILE", 1 << 20)


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[torch.nn.Linear, torch.Tensor, Path]:
    """A linear whose weight is mapped from a file, the same weight in memory, and the file."""
    path = tmp_path / "model.safetensors"
    weight = torch.randn(SIDE, SIDE)
    save_file({"weight": weight}, path)
    linear = torch.nn.Linear(SIDE, SIDE, bias=False)
    ((_, handle),) = read_safetensors_header(path)
    linear.weight = torch.nn.Parameter(handle.read(), requires_grad=False)
    return linear, weight, path


def test_a_modules_weights_leave_memory_after_it_has_run(mapped) -> None:
    linear, weight, path = mapped
    x = torch.randn(3, SIDE)
    linear(x)
    assert _resident_megabytes(path) > 0.9 * MEGABYTES
    release_in_turn(linear)
    for _ in range(2):
        assert torch.equal(linear(x), torch.nn.functional.linear(x, weight))
        assert _resident_megabytes(path) < 0.1 * MEGABYTES


def test_the_files_of_a_folder_leave_memory(mapped) -> None:
    linear, weight, path = mapped
    assert torch.equal(linear.weight, weight)
    release_files(path.parent.parent)
    assert _resident_megabytes(path) > 0.9 * MEGABYTES
    release_files(path.parent)
    assert _resident_megabytes(path) < 0.1 * MEGABYTES
    assert torch.equal(linear.weight, weight)


def test_a_folder_is_left_while_a_block_runs(mapped) -> None:
    linear, weight, path = mapped
    deadline = time.monotonic() + 30
    with releasing_files(path.parent, seconds=0.001):
        assert torch.equal(linear.weight, weight)
        while _resident_megabytes(path) > 0.1 * MEGABYTES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert _resident_megabytes(path) < 0.1 * MEGABYTES
    assert torch.equal(linear.weight, weight)


def test_what_was_written_to_a_mapping_stays(mapped) -> None:
    linear, _, path = mapped
    linear.weight[7, 7] = 5
    release_in_turn(linear)
    linear(torch.ones(1, SIDE))
    release_files(path.parent)
    assert linear.weight[7, 7] == 5

"""The reading of ONNX by the onnx package's node tests: none is read wrongly.

One in three of some 1,900; all by ``python -m graphwright.tools.bench.node_tests``.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from graphwright.tools.bench.node_tests import Verdict, collect, judge, judge_written

pytestmark = pytest.mark.slow  # the package makes all of its tests when one is asked for
REASONS = {
    r"gives other numbers at each run": "noise",
    r"does not take its operands \(ONNX Runtime: ": "a limit of the runtime's kernel",
    r"opset 8 is older than 18 and cannot be converted here": "a scan over a batch",
}
"""Why a test may be refused."""
OF_THE_RUNTIME = {
    # Where its own matrix of products is asked for, it has no -inf at what is masked.
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal",
    "test_maxunpool_export_with_output_shape",
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}
"""Where ONNX Runtime 1.31 gives other numbers than the test, and we what it gives."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    folder: Path = tmp_path_factory.mktemp("node-tests")
    tests = {test.name: test for test in [*collect()[::3], *collect("test_bernoulli")]}
    return [judge(test, folder) for test in tests.values()]


def test_no_node_test_is_read_wrongly(verdicts: list[Verdict]) -> None:
    assert [v for v in verdicts if v.outcome == "wrong"] == []
    counts = Counter(v.outcome for v in verdicts)
    assert counts["equal"] > 0.98 * len(verdicts) > 500


def test_what_is_refused_is_refused_for_a_known_reason(verdicts: list[Verdict]) -> None:
    refused = [v for v in verdicts if v.outcome == "refused"]
    unknown = [v for v in refused if not any(re.search(r, v.words) for r in REASONS)]
    assert unknown == []
    assert "test_bernoulli" in {v.name for v in refused}


def test_what_the_runtime_has_otherwise(verdicts: list[Verdict]) -> None:
    assert {v.name for v in verdicts if v.outcome == "runtime"} <= OF_THE_RUNTIME


def test_what_is_written_again_computes_the_same(tmp_path: Path) -> None:
    """One test in ten, and all of sequences, whose types are the easiest to lose; all with
    ``python -m graphwright.tools.bench.node_tests --written``."""
    tests = {test.name: test for test in [*collect()[::10], *collect("test_*seq*")]}
    verdicts = [judge_written(test, tmp_path) for test in tests.values()]
    assert [v for v in verdicts if v.outcome == "wrong"] == []
    assert sum(v.outcome == "equal" for v in verdicts) > 0.6 * len(verdicts)

"""Options of another type than their field are refused in Python, as a recipe's texts are."""

from __future__ import annotations

from typing import Any

import graphwright as gw
import pytest
from graphwright.ir.core.errors import BadInput


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "4"}, r"bits='4' \(str\) is wrong: it takes int"),
        ({"group": 64.0}, r"group=64.0 \(float\) is wrong: it takes int"),
        ({"symmetric": 1}, r"symmetric=1 \(int\) is wrong: it takes bool"),
        ({"include": "encoder.*"}, r"include='encoder.\*' \(str\) is wrong: it takes \[globs\]"),
        ({"scales": "f16"}, r"scales='f16' \(str\) is wrong: it takes float32\|float16"),
        ({"accuracy_level": False}, r"accuracy_level=False \(bool\) is wrong: it takes 0\|4"),
    ],
)
def test_a_wrong_type_is_shown(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gw.passes.Quantize(**options)


def test_a_whole_number_is_a_float_too() -> None:
    assert gw.passes.Quantize(max_error=1).max_error == 1
    assert gw.passes.EasyQuant(nsig=3).nsig == 3

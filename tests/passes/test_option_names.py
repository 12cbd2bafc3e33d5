"""Names of passes and options, read in their sources, are those of the classes themselves."""

from __future__ import annotations

from dataclasses import fields

import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.passes import pass_class, pass_names
from graphwright.passes.option_names import check_names, option_names
from graphwright.passes.registry import source_of


def test_options_are_the_fields_of_each_pass_in_their_order() -> None:
    places = {name: place for name in pass_names() if (place := source_of(name)) is not None}
    assert len(places) > 50
    for name, place in places.items():
        assert option_names(*place) == [field.name for field in fields(pass_class(name))], name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize{bitz=4}", "quantize has no option 'bitz'; did you mean bits"),
        ("clean,quantise", "there is no pass 'quantise'; did you mean quantize"),
        ("clean{optional=true},eora{rank=4 ranks=5}", "eora has no option 'ranks'"),
        ("quantize{bits}", "needs '='"),
    ],
)
def test_a_wrong_name_is_told(text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        check_names(text)
    assert message in str(error.value)


def test_what_other_tools_call_an_option_is_an_option() -> None:
    check_names("clean{optional=true},quantize{bits=4 group_size=32 ignore=[a b]},hqq")

"""Tensor types: their text, and what they say of each other."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.core.types import DTYPES, UNKNOWN, Type, broadcast, parse_type, same_dim, unify

F32 = torch.float32


@pytest.mark.parametrize(
    "text",
    ["f32[]", "f32[1]", "bf16[batch, 123, 5]", "?[*]", "i64[*]", "?[2, ?]", "f32[seq + 1, 2*seq]",
     "f32[Max(1, seq), 5]", "bool[(seq//2), Min(a, Max(b, c))]", "f8e4m3[0]"],
)  # fmt: skip
def test_the_text_of_a_type_parses_to_the_same_type(text: str) -> None:
    assert str(parse_type(text)) == text


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_has_a_word(name: str) -> None:
    assert parse_type(f"{name}[3]") == Type(DTYPES[name], (3,))


@pytest.mark.parametrize(
    ("text", "reason"),
    [("f32", "not a type"), ("f32[3", "not a type"), ("f33[3]", "unknown dtype 'f33'")],
)
def test_other_text_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_type(text)


def test_a_comma_within_an_expression_separates_no_dimensions() -> None:
    assert parse_type("f32[Max(1, seq), 5]").shape == ("Max(1, seq)", 5)


def test_rank_and_number_of_elements() -> None:
    assert Type(F32, (3, 5)).numel == 15
    assert Type(F32, ()).numel == 1
    assert Type(F32, ("seq", 5)).numel is None
    assert Type(F32, ("seq", 5)).rank == 2
    assert UNKNOWN.rank is None


def test_the_unknown_dimension_equals_nothing() -> None:
    assert same_dim("seq", "seq")
    assert not same_dim("?", "?")
    assert not same_dim(3, 5)


def test_unify_takes_what_is_more_precise() -> None:
    assert unify(Type(None, ("seq", "?")), Type(F32, (7, "dim"))) == Type(F32, (7, "dim"))
    assert unify(UNKNOWN, Type(F32, (1,))) == Type(F32, (1,))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [("f32[3]", "f16[3]", "dtype"), ("f32[3]", "f32[3, 1]", "rank"),
     ("f32[3]", "f32[5]", "dimensions 3 and 5 contradict")],
)  # fmt: skip
def test_contradicting_types_do_not_unify(a: str, b: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unify(parse_type(a), parse_type(b))


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(3, 1), (1, 5)], (3, 5)),
        ([("seq", 5), (1,)], ("seq", 5)),
        ([("seq", 1), (7, 5)], (7, 5)),
        ([("a",), ("b",)], ("?",)),
        ([(1,), ()], (1,)),
        ([(3,), None], None),
    ],
)
def test_broadcast(shapes: list[tuple[int | str, ...] | None], expected: object) -> None:
    assert broadcast(*shapes) == expected


def test_shapes_that_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast((3, 5), (2, 5))

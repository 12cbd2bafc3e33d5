"""Where tokens cannot leave a text whose layers differ: some have no attention, or no keys."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.core.errors import Refusal
from ...ir.core.view import Value
from ...ir.structure.layers import Block
from ...ir.structure.recognize import Structure
from ...ir.structure.vision import ImageTokens


def check_shared_keys(structure: Structure, language: Sequence[Block], block: int) -> None:
    """Raise ``Refusal`` where tokens would leave between a layer and one that looks at its keys.

    In Gemma 4's small models and Gemma 3n the last layers have no keys of their own. A cache holds
    those that they look at of all tokens that came to the layer that made them, and says nothing of
    which of these left behind it: at the next word they would be seen again.
    """
    makers: dict[Value, int] = {}
    looks: list[tuple[int, int]] = []
    for number, each in enumerate(language):
        for site in each.attentions:
            slot = structure.attentions[site].cache
            if slot is not None:
                looks.append((makers.setdefault(slot.past[0], number), number))
    between = [pair for pair in looks if pair[0] < block <= pair[1]]
    if not between:
        return
    maker, looker = between[0]
    first = min(maker for maker, looker in looks if maker < looker)
    inside = f"before block {first} (`fastv{{layer={first}}}`) or " if first else ""
    raise Refusal(
        f"block {looker} of the language model looks at the keys of block {maker}, which a cache "
        f"holds of all tokens that came there, and tokens would leave before block {block}: let "
        f"them leave {inside}before the language model (`diverse`, `similarity`), or load the "
        "model without a cache"
    )


def check_attention(images: ImageTokens, numbers: Sequence[int]) -> None:
    """Raise ``Refusal`` where one of the blocks ``numbers`` of the language model, counted from its
    first, has no attention to score tokens by, as where a layer keeps a state in place of keys."""
    language = images.language
    without = next((number for number in numbers if not language[number].attentions), None)
    if without is None:
        return
    having = [number for number, block in enumerate(language) if block.attentions]
    if not having:
        raise Refusal(
            "no block of the language model has attention to score tokens by: `diverse`, "
            "`similarity` and `visual-exit` need none"
        )
    layers = [number + 1 for number in having if number + 1 < len(language)]
    behind = f", and `fastv` is there at layer={', '.join(map(str, layers))}" if layers else ""
    raise Refusal(
        f"block {without} of the language model has no attention to score tokens by: "
        f"{_listed(having)} {'have' if len(having) > 1 else 'has'} it{behind}. `diverse`, "
        "`similarity` and `visual-exit` need none"
    )


def _listed(numbers: Sequence[int]) -> str:
    """``block 1``, or ``blocks 1, 3 and 5``."""
    *first, last = map(str, numbers)
    return f"blocks {', '.join(first)} and {last}" if first else f"block {last}"

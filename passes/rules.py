"""Which passes go together, in which order, and why: checked on a recipe before any work is done.

A pass says in class variables what it ``provides``, what it ``excludes`` and what it ``follows``;
the rules below hold for every pass, those of other packages among them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..ir.core.errors import BadInput
from ..ir.structure.recognize import Structure
from .base import BLOCKS, CHANGED, COMPENSATED, MASKED, STORED, TOKENS, Pass, select_linears

Sites = frozenset[str] | None
"""Names of the linears that a pass may touch; ``None`` where that is not known beforehand."""

_CLASH = {
    STORED: "would both store the same sites anew: a weight is quantized once",
    MASKED: "would both mask the same sites: the second finds the zeros of the first",
    COMPENSATED: "would both correct the same sites: a linear has one low-rank path",
}
_LACK = {
    CHANGED: "corrects what an earlier pass did to weights, and none before it changes weights",
    MASKED: "refines the mask of an earlier pass, and none before it masks weights",
}
_FIRST = {
    CHANGED: ", such as hqq, or give the model that a quantized one was made from with --original "
    "(original= in Python)",
    MASKED: ", such as wanda",
}
"""What provides it, for instance."""
_RESHAPE = {TOKENS: "drops tokens", BLOCKS: "changes which blocks there are"}


def check_order(
    passes: Sequence[Pass], structure: Structure | None = None, *, compressed: bool | None = False
) -> None:
    """Whether the passes can run one after another.

    Without a ``structure`` passes are taken to meet where they choose sites by equal options; with
    that of the source, by the sites themselves. Optional passes may find nothing to do and are left
    alone. ``compressed``: whether an original of the source is given, to which its weights are a
    gap; ``None`` where that is not known. Raises ``BadInput``, with the reason and what would work.
    """
    if compressed and not any(CHANGED in pass_.follows for pass_ in passes):
        raise BadInput(
            "an original is for passes that close the gap to it, such as eora: none of "
            f"{', '.join(pass_.name for pass_ in passes)} does"
        )
    sites = _all_sites(passes, structure)
    for place, pass_ in enumerate(passes):
        if pass_.narrows:
            _check_narrows(passes, place, compressed)
        if pass_.optional:
            continue
        _check_excludes(passes, place, sites)
        _check_follows(passes, place, sites, set() if compressed is False else {CHANGED})


def _check_narrows(passes: Sequence[Pass], place: int, compressed: bool | None) -> None:
    name = passes[place].name
    lossy = next((p.name for p in passes[:place] if not p.exact), None)
    if lossy is not None:
        raise BadInput(
            f"{name} comes behind {lossy}, and makes another model of the source, to which all "
            f"that changes numbers is held: put {name} first"
        )
    if compressed:
        raise BadInput(f"{name} makes another model of the source, and an original is not of that")


def remarks(passes: Sequence[Pass]) -> list[list[str]]:
    """For each pass, what a person should know about its place in the recipe."""
    notes: list[list[str]] = [[] for _ in passes]
    for place, pass_ in enumerate(passes):
        reshaping = [tag for tag in pass_.provides if tag in _RESHAPE]
        learned = [earlier for earlier in passes[:place] if earlier.requires().data]
        for earlier in learned if reshaping else ():
            notes[place].append(
                f"{earlier.name} learned from the graph as it was before {pass_.name}, which "
                f"{_RESHAPE[reshaping[0]]}: put {pass_.name} in front of it, so that its "
                "statistics are those of the final graph"
            )
        by_weights = COMPENSATED in pass_.provides and not pass_.requires().data
        fitted = [earlier for earlier in passes[:place] if earlier.fits_together]
        for earlier in fitted if by_weights else ():
            notes[place].append(
                f"{earlier.name} fitted weights together, so that their errors make up for each "
                f"other, and {pass_.name} takes from each alone what is largest of its error: the "
                "outputs may come out worse than without it. Put eora here, which looks at outputs"
            )
    return notes


def _check_excludes(passes: Sequence[Pass], place: int, sites: Sequence[Sites]) -> None:
    pass_, mine = passes[place], sites[place]
    for tag in pass_.excludes:
        earlier = [i for i in range(place) if tag in passes[i].provides]
        if mine is None:
            clash = [i for i in earlier if passes[i].selects() == pass_.selects()]
        else:
            # Where some of the sites are left, the pass says of the others why it refuses them.
            taken = frozenset().union(*(sites[i] or () for i in earlier))
            clash = earlier[-1:] if mine and mine <= taken else []
        if clash:
            why = _CLASH.get(tag, f"both leave {tag} at the same sites")
            if tag not in pass_.provides:
                why = f"would both change the same sites, and {pass_.name} has to come first"
            raise BadInput(
                f"{passes[clash[-1]].name} and {pass_.name} {why}. Choose sites with include= and "
                "exclude=, or drop one"
            )


def _check_follows(
    passes: Sequence[Pass], place: int, sites: Sequence[Sites], there: Collection[str]
) -> None:
    """``there`` is what the source itself has left."""
    pass_, mine = passes[place], sites[place]
    for tag in set(pass_.follows).difference(there):
        earlier = [i for i in range(place) if _may_provide(passes[i], tag)]
        why = _LACK.get(tag, f"needs {tag}, which no pass before it provides")
        if not earlier:
            later = [p.name for p in passes[place + 1 :] if _may_provide(p, tag)]
            one = f"put one in front of it{_FIRST.get(tag, '')}"
            advice = f"put it behind {later[0]}" if later else one
            raise BadInput(f"{pass_.name} {why}: {advice}")
        known = [sites[i] for i in earlier]
        if mine is None or None in known or mine & frozenset().union(*(s or () for s in known)):
            continue
        raise BadInput(
            f"{pass_.name} {why} at its sites ({_listed(mine)}): "
            f"{', '.join(passes[i].name for i in earlier)} takes others. Give them the same "
            "include=, exclude= and kinds="
        )


def _may_provide(pass_: Pass, tag: str) -> bool:
    """A lossy pass that says nothing of itself may have changed anything."""
    return tag in pass_.provides or not (pass_.provides or pass_.exact)


def _all_sites(passes: Sequence[Pass], structure: Structure | None) -> list[Sites]:
    sites: list[Sites] = []
    for pass_ in passes:
        chosen = None if structure is None else _sites(pass_, structure)
        sites.append(chosen)
        if BLOCKS in pass_.provides:
            structure = None  # linears leave, or come twice under new names
    return sites


def _sites(pass_: Pass, structure: Structure) -> Sites:
    options = {name: getattr(pass_, name, None) for name in ("include", "exclude", "kinds")}
    if None in options.values():
        return None
    least = getattr(pass_, "min_size", 0)
    chosen = select_linears(structure.linears, min_size=least, **options)  # type: ignore[arg-type]
    return frozenset(linear.name for linear in chosen)


def _listed(names: frozenset[str], most: int = 3) -> str:
    first = sorted(names)[:most]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")

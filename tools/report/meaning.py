"""What a person should make of a result: whether an error is large, and what stayed whole.

The words about errors are what ``python -m graphwright.tools.bench.error_scale`` printed: rounding
that moved an output by .01 to .03 left 98 % or more of the likeliest tokens, classes and nearest
neighbours as they were; by .12, 83 % of the tokens; by .23 to .27, 66 to 80 %; by .37 and more, 42
to 69 %. Classes stayed longer: all of them up to .27.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .manifest import Manifest, TreeEntry
from .summary import merged_sites, size, with_weights, worst

_SCALE = (
    (1e-4, "as the source", "what rounding leaves"),
    (0.03, "close to the source",
     "small: of the zoo's models 98 % of likeliest tokens and nearest neighbours stayed"),
    (0.15, "some change",
     "middling: of the zoo's models about 83 % of likeliest tokens stayed, and all classes"),
    (0.3, "large change",
     "large: of the zoo's models 66 to 80 % of likeliest tokens and neighbours stayed"),
    (float("inf"), "very large change",
     "very large: of the zoo's models half of likeliest tokens and neighbours moved"),
)  # fmt: skip
"""Relative L2 up to which words hold: for a card, and for a sentence."""
_TABLES = 0.05
"""Share of the artifact's weights from which tables of embeddings are worth a word."""


def meaning(manifest: Manifest) -> str:
    """Whether the error to the source is large or small; empty where there is none."""
    checks = manifest.verification
    error = worst(checks.outputs)
    if error is None or error.rel_l2 is None:
        return ""
    text = f"rel. L2 is {next(words for bound, _, words in _SCALE if error.rel_l2 <= bound)}"
    if manifest.eval or error.rel_l2 <= _SCALE[0][0]:
        return text
    random = ", and random inputs are none that it was made for" if "random" in checks.data else ""
    return f"{text}. Models differ{random}: --eval judges this one (`optimize-model eval --tasks`)"


def verdict(manifest: Manifest) -> str:
    """Two or three words for how far the result is from its source."""
    error = worst(manifest.verification.outputs)
    if error is None or error.rel_l2 is None:
        return "not compared"
    return next(words for bound, words, _ in _SCALE if error.rel_l2 <= bound).capitalize()


@dataclass(frozen=True)
class Kept:
    """The weights that no pass changed."""

    bytes_before: int
    bytes_after: int
    """Less than before where blocks were left out."""
    advice: str
    """What would shrink them; empty where nothing is known to."""


def kept(manifest: Manifest) -> Kept | None:
    """What stayed whole; ``None`` where it is not known or nothing did."""
    costs = manifest.costs
    if costs is None or not costs.rows:
        return None
    changed = with_weights(merged_sites(manifest))
    before = costs.rows[0].weight_bytes - sum(site.bytes_before for site in changed)
    after = costs.rows[-1].weight_bytes - sum(site.bytes_after for site in changed)
    # Below 0 where linears share a weight.
    return Kept(before, after, _advice(manifest, after)) if before > 0 and after > 0 else None


def _advice(manifest: Manifest, after: int) -> str:
    tree = manifest.graph_after
    tables = 0 if tree is None else sum(m.params_bytes for m in _modules(tree) if _is_table(m))
    if tables < _TABLES * after:
        return ""
    able = (step.name for step in manifest.passes if "embeddings" in step.options)
    return (
        f"{size(min(tables, after))} of what was kept are tables of embeddings: "
        f"{next(able, 'quantize')}{{embeddings=8}} stores them in 8 bits"
    )


def _is_table(module: TreeEntry) -> bool:
    return "embedding" in module.ops


def _modules(tree: TreeEntry) -> Iterator[TreeEntry]:
    yield tree
    for child in tree.children:
        yield from _modules(child)

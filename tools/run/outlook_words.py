"""What is seen before changing, in words and cells: for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Container, Sequence

from .outliers import DORMANT, Outlook, Tails

LEGEND = (
    "kurtosis: 0 for Gaussian features; peak: largest magnitude by root mean square; outliers: "
    "channels six times as large as the median one; top: the largest channel's share of all "
    "energy; massive: activations above 100 and 1000 times their token's median; dormant: "
    f"heads that give the first token {DORMANT:.0%} of their attention or more"
)


def tail_cells(site: Tails, survey: Outlook) -> dict[str, str]:
    """A site's row, by column."""
    heads = survey.dormant.get(site.name)
    dormant = "" if heads is None else f"{int((heads >= DORMANT).sum())} of {len(heads)}"
    return {
        "kurtosis": f"{site.kurtosis:.1f}", "peak": f"{site.peak:.1f}",
        "outliers": str(site.outliers), "top": f"{site.top_share:.1%}",
        "massive": str(site.massive), "dormant": dormant,
    }  # fmt: skip


def cost_cells(
    site: Tails, survey: Outlook, numbers: Container[int] | None = None
) -> dict[str, str]:
    """Forecast, measured error and spread of each pass by its number, or of some; empty where it
    changes nothing."""
    cells = {}
    for number, text in enumerate(survey.agreement, 1):
        if numbers is not None and number not in numbers:
            continue
        cost = site.costs.get(text)
        cells[f"{number} forecast"] = "" if cost is None else f"{cost.forecast:.4f}"
        cells[f"{number} measured"] = "" if cost is None else f"{cost.measured:.4f}"
        if any(s.costs[text].spread is not None for s in survey.sites if text in s.costs):
            spread = None if cost is None else cost.spread
            cells[f"{number} spread"] = "" if spread is None else f"{spread:.1%}"
    return cells


def cost_line(survey: Outlook, text: str, sets: Sequence[str]) -> str:
    """How well a pass was foretold, and how much the data matters to it."""
    costs = {site.name: site.costs[text] for site in survey.sites if text in site.costs}
    score = (
        f"{text}: relative error of outputs; forecast and measured agree by a rank correlation of "
        f"{survey.agreement[text]:.2f} over {len(costs)} linears"
    )
    spreads = {n: cost.spread for n, cost in costs.items() if cost.spread is not None}
    if not spreads:
        return score
    far = max(spreads, key=lambda name: spreads[name])
    return (
        f"{score}. Spread: fitted to {', '.join(sets)} in turn and judged on all, the largest less "
        f"the least error by the mean: {sum(spreads.values()) / len(spreads):.1%} on average, "
        f"{spreads[far]:.1%} at {far}"
    )

"""The manifest of a dry run."""

from __future__ import annotations

from ...ir.core.heap import peak_rss_bytes
from ...ir.core.view import View
from ...passes.base import Pass, PassResult
from ...passes.forecast import Plan
from ...passes.recipe import Recipe
from ...passes.report import versions
from ..report import manifest
from ..report.manifest import (
    ForecastEntry,
    Manifest,
    PassEntry,
    RefusalEntry,
    RuntimeEntry,
    SiteEntry,
    SizesEntry,
    SourceEntry,
    VerificationEntry,
)


def forecast_manifest(view: View, recipe: Recipe, forecast: Plan) -> Manifest:
    """A manifest of what a recipe would do to a graph; nothing has run."""
    pairs = zip(forecast.passes, recipe.passes, strict=True)
    return Manifest(
        schema=manifest.SCHEMA,
        source=SourceEntry.model_validate({
            "kind": view.source.kind, "name": view.source.name, "sha256": "",
            "notes": list(view.source.notes),
        }),
        recipe=str(recipe),
        versions=versions(),
        passes=[
            _forecast_pass(order, text, pass_, result)
            for order, ((text, result), pass_) in enumerate(pairs, 1)
        ],
        verification=VerificationEntry(
            outputs=[],
            runtime=RuntimeEntry.model_validate({"optimized": None, "unoptimized": None}),
        ),
        sizes=SizesEntry(source_bytes=forecast.source_bytes, artifact_bytes=0),
        predicted=ForecastEntry(
            artifact_bytes=forecast.artifact_bytes,
            peak_rss_bytes=max(forecast.peak_rss_bytes, peak_rss_bytes()),
            seconds=round(forecast.seconds, 1),
        ),
    )


def _forecast_pass(order: int, text: str, pass_: Pass, result: PassResult) -> PassEntry:
    return PassEntry(
        order=order, name=pass_.name, text=text, options={}, exact=pass_.exact,
        sites=[
            SiteEntry(
                name=site.name, kind=site.kind, shape=list(site.shape),
                bytes_before=site.bytes_before, bytes_after=site.bytes_after,
                bits_per_weight=site.bits_per_weight,
            )
            for site in result.sites
        ],
        refused=[RefusalEntry(site=site, reason=reason) for site, reason in result.refused],
        bytes_before=sum(site.bytes_before for site in result.sites),
        bytes_after=sum(site.bytes_after for site in result.sites),
        macs_before=None, macs_after=None, error=None, seconds=None, peak_rss_bytes=None,
    )  # fmt: skip

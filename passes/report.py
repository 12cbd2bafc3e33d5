"""What a run did, pass by pass: the core of the manifest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..ir.run.truth import Truth
from ..ir.run.verify import Difference
from ..ir.structure.costs import MAC_CONVENTION, Costs
from .base import Pass, PassResult, Site

MANIFEST_SCHEMA = 1


@dataclass
class PassReport:
    """One pass of a run."""

    pass_: Pass
    text: str
    result: PassResult
    bytes_before: int = 0
    bytes_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    errors: dict[str, Difference] = field(default_factory=dict)
    """Against the graph before the pass, by output."""
    errors_to_source: dict[str, Difference] = field(default_factory=dict)
    """Against the source graph: what a pass that compensates brings down."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    @property
    def error(self) -> Difference | None:
        """The worst output's error against the graph before the pass."""
        return _worst(self.errors)

    @property
    def error_to_source(self) -> Difference | None:
        """The worst output's error against the source graph."""
        return _worst(self.errors_to_source)

    def to_dict(self, order: int) -> dict[str, Any]:
        error, total = self.error, self.error_to_source
        return {
            "order": order,
            "name": self.pass_.name,
            "text": self.text,
            "options": _options(self.pass_),
            "exact": self.pass_.exact,
            "sites": [_site(s) for s in self.result.sites],
            "refused": [{"site": s, "reason": r} for s, r in self.result.refused],
            "notes": list(self.result.notes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "error": None if error is None else error.to_dict(),
            "error_to_source": None if total is None else total.to_dict(),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@dataclass
class RunReport:
    """A whole run. ``to_dict`` gives the manifest, as far as it is known without an artifact."""

    source: Mapping[str, Any]
    recipe: str
    passes: list[PassReport] = field(default_factory=list)
    errors: dict[str, Difference] = field(default_factory=dict)
    """The rewritten graph against the source graph, by output."""
    samples: int = 0
    data: str = ""
    truth: dict[str, Any] = field(default_factory=dict)
    """Who ran the source itself, on what, and how far our reading is from it."""
    max_error: float | None = None
    structure: Mapping[str, int] = field(default_factory=dict)
    source_bytes: int = 0
    shortened: bool = False
    """Whether outputs have fewer positions than the source's: the last ones were compared."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of the symbolic dimensions, that ``costs`` are for: one sample."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Of the source and behind each pass: ``Costs.to_dict`` with a ``name``."""

    def add_costs(self, name: str, costs: Costs) -> None:
        self.costs.append({"name": name, **costs.to_dict()})

    def add_truth(self, truth: Truth, difference: Difference | None) -> None:
        """``difference`` is the worst one of our reading from what the source gave."""
        self.truth = {
            "by": truth.by,
            "error": None if difference is None else difference.to_dict(),
            "probes": [probe.what for probe in truth.probes],
            "unheard": truth.unheard,
        }

    def to_dict(self) -> dict[str, Any]:
        outputs = [{"name": name, **d.to_dict()} for name, d in self.errors.items()]
        return {
            "schema": MANIFEST_SCHEMA,
            "source": dict(self.source),
            "recipe": self.recipe,
            "versions": versions(),
            "structure": dict(self.structure),
            "costs": {
                "convention": MAC_CONVENTION, "sizes": dict(self.sizes), "rows": list(self.costs),
            },
            "passes": [p.to_dict(i) for i, p in enumerate(self.passes, 1)],
            "verification": {
                "samples": self.samples,
                "data": self.data,
                "source": dict(self.truth),
                "max_error": self.max_error,
                "outputs": outputs,
                "runtime": {"optimized": None, "unoptimized": None},
            },
            "sizes": {"source_bytes": self.source_bytes, "artifact_bytes": 0},
        }

    def __str__(self) -> str:
        head = f"{'pass':<40} {'sites':>5} {'MB before':>10} {'MB after':>9} {'rel. L2':>9} "
        lines = [f"{head}{'to source':>9} {'s':>6}"]
        for p in self.passes:
            error = "exact" if p.error is None else f"{p.error.rel_l2:.2e}"
            total = "" if p.error_to_source is None else f"{p.error_to_source.rel_l2:.2e}"
            before, after = p.bytes_before / 1e6, p.bytes_after / 1e6
            lines.append(
                f"{p.text:<40} {len(p.result.sites):>5} {before:>10.2f} {after:>9.2f} {error:>9} "
                f"{total:>9} {p.seconds:>6.1f}"
            )
        for name, d in self.errors.items():
            lines.append(f"{name}: cosine {d.cosine:.6f}, relative L2 {d.rel_l2:.2e} to the source")
        return "\n".join(lines)


def _worst(errors: Mapping[str, Difference]) -> Difference | None:
    return max(errors.values(), key=lambda d: d.rel_l2, default=None)


def _site(site: Site) -> dict[str, Any]:
    """Without a note or sparsity where there is none."""
    facts = {**asdict(site), "shape": list(site.shape)}
    absent = [key for key in ("note", "sparsity") if not facts[key] and facts[key] != 0]
    return {key: value for key, value in facts.items() if key not in absent}


def _options(pass_: Pass) -> dict[str, Any]:
    values = {f.name: getattr(pass_, f.name) for f in fields(pass_)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def versions() -> dict[str, str]:
    """Versions of graphwright, Python and the libraries that take part, as installed."""
    installed = {"python": platform.python_version(), "graphwright": "0+source"}
    names = ("graphwright", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu",
             "onnxruntime", "triton", "transformers", "numpy", "safetensors")  # fmt: skip
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed

"""What a record says of one case: sites, hashes of stored weights, and numbers for the outputs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ... import Result, optimize
from ...backends import Executable
from ...backends import compile as compile_graph
from ...ir.core.errors import GraphwrightError
from ...ir.core.view import View
from ...ir.core.weights import Weight, tensor_bytes
from ...ir.structure.cache_slots import next_step
from .record_cases import COUNTED, Case, Subject

REL_L2 = 1e-6
"""How far an output may be from the recorded one."""
RUNTIME_REL_L2 = 1e-5
"""How far ONNX Runtime's may be: it fuses, and so sums in another order, as it finds the graph."""
RESIDUAL = 1e-4
"""How far, by its own size, the weight error of a site may move that is fitted by LAPACK."""
FITTED = ("eora.", "svd-compensate.", "signs", "factors")
"""Weights that come out of a singular value decomposition. Their bytes are not hashed: on two
threads instead of one the outputs of tiny-vit moved by 1e-5 (``svd-compensate``) and 2e-4
(``any-size``: a residual near 0 takes the other sign). Rows that hold them, marked by ``~``, repeat
on one machine and one thread; on another compare them with a record made there."""
SUMS = 4
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D)

Row = dict[str, Any]


def measure(subject: Subject, case: Case) -> Row:
    """The row of a case: ``refused``, or ``sites``, ``kept``, ``outputs`` and, of an ONNX graph,
    ``runtime``."""
    graph = subject.graph(case.start)
    try:
        result = optimize(
            graph, case.passes(), samples=[subject.inputs], calibration=subject.calibration
        )
    except GraphwrightError as refusal:
        return {"refused": type(refusal).__name__}
    site_weights = _of_sites(graph, result)
    kept = [weight for name, weight in result.graph.weights().items() if name not in site_weights]
    row: Row = {"sites": _sites(site_weights, result), "kept": _kept(kept)}
    row["outputs"] = _run(result.graph, subject.inputs, "eager")
    if result.graph.kind == "onnx":
        row["runtime"] = _run(result.graph, subject.inputs, "onnxruntime", threads=1)
    return row


# --- sites and weights ---------------------------------------------------------------------------


def _sites(weights: Mapping[str, Weight], result: Result) -> dict[str, dict[str, str]]:
    """Site names by what was done to them, each with the hash of its ``weights``.

    What was done is ``q 192x192 | hqq 147456>23040 | eora 23040>35328``: role, shape, and bytes
    before and after each pass. Behind the hash stands, where ``FITTED`` weights are among them,
    the site's weight error: ``0123456789ab~0.06713``. They are not hashed.
    """
    done: dict[str, list[str]] = {}
    errors: dict[str, float] = {}
    for step in result.report.passes:
        for site in step.result.sites:
            shape = "x".join(map(str, site.shape))
            facts = done.setdefault(site.name, [f"{site.kind} {shape}"])
            facts.append(f"{step.pass_.name} {site.bytes_before}>{site.bytes_after}")
            errors[site.name] = site.rel_l2 or 0.0
    table: dict[str, dict[str, str]] = {}
    for name, facts in done.items():
        own = {
            n.removeprefix(f"{name}."): w for n, w in weights.items() if n.startswith(f"{name}.")
        }
        exact = {part: w for part, w in own.items() if not part.startswith(FITTED)}
        error = f"~{errors[name]:.5g}" if len(exact) < len(own) else ""
        table.setdefault(" | ".join(facts), {})[name] = _hash(exact) + error
    return table


def _hash(weights: Mapping[str, Weight]) -> str:
    """Of names, dtypes, shapes and bytes; empty for no weight."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(tensor_bytes(weight.read()))
    return digest.hexdigest()[:12] if weights else ""


def _of_sites(source: View, result: Result) -> dict[str, Weight]:
    """The weights that passes made: those that bear a site's name and are not the source's."""
    sites = {f"{site.name}." for step in result.report.passes for site in step.result.sites}
    known = {name.removesuffix(".T") for name in source.weights()}
    return {
        name: weight
        for name, weight in result.graph.weights().items()
        if name not in known and any(name.startswith(site) for site in sites)
    }


def _kept(weights: Sequence[Weight]) -> str:
    """Count and hash of the model's own float weights, whatever they are called in the graph."""
    hashes = sorted(
        _hash({"": weight})
        for weight in weights
        if weight.dtype.is_floating_point and weight.numel >= COUNTED
    )
    return f"{len(hashes)} {hashlib.sha256(''.join(hashes).encode()).hexdigest()[:12]}"


# --- outputs -------------------------------------------------------------------------------------


def _run(
    view: View, inputs: Mapping[str, torch.Tensor], backend: str, **options: Any
) -> dict[str, list[float]]:
    """Numbers of each output, of the cache as one, and of the step that follows a prompt."""
    executable = compile_graph(view, backend=backend, **options)
    outputs = executable(**inputs)
    numbers = _numbers(outputs)
    step = next_step(inputs, outputs)
    return numbers if step is None else numbers | _run_step(executable, step)


def _run_step(executable: Executable, step: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Numbers of the step; zeros under the name of the error where it fails, which counts too."""
    try:
        outputs = executable(**step)
    except Exception as error:  # torch and the runtime raise each their own
        return {f"step fails with {type(error).__name__}": [0.0] * (SUMS + 1)}
    return {f"step {name}": numbers for name, numbers in _numbers(outputs).items()}


def _numbers(outputs: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    joined: dict[str, list[torch.Tensor]] = {}
    for name in sorted(outputs):
        key = "present" if name.startswith("present.") else name
        joined.setdefault(key, []).append(outputs[name].double().reshape(-1))
    return {name: summary(torch.cat(parts)) for name, parts in joined.items()}


def summary(values: torch.Tensor) -> list[float]:
    """The norm of a vector, and its sums under ``SUMS`` fixed patterns of signs, in f64.

    The sums of a difference are as large as its norm, whichever entries differ: two summaries tell
    how far the vectors are apart.
    """
    place = torch.arange(len(values), dtype=torch.int64)
    numbers = [float(torch.linalg.norm(values))]
    for pattern in range(1, SUMS + 1):
        mixed = (place + pattern * 1_000_003) * _ODD[0]
        mixed = (mixed ^ (mixed >> 29)) * _ODD[1]
        sign = 1 - 2 * ((mixed >> 37) & 1)
        numbers.append(float((values * sign).sum()))
    return [float(f"{n:.10g}") for n in numbers]


def distance(recorded: Sequence[float], now: Sequence[float]) -> float:
    """About the relative L2 between the vectors of two summaries; infinite where one is not
    finite."""
    norm, *sums = recorded
    gaps = [a - b for a, b in zip(sums, now[1:], strict=True)]
    gap = max(abs(norm - now[0]), math.sqrt(sum(g * g for g in gaps) / len(gaps)))
    if gap == 0:
        return 0.0
    return gap / norm if norm and math.isfinite(gap) else math.inf


# --- comparing -----------------------------------------------------------------------------------


def differences(recorded: Row, now: Row) -> list[str]:
    """What differs between two rows of one case, a line each; empty where they are equal."""
    if "refused" in recorded or "refused" in now:
        was, is_ = (row.get("refused", "done") for row in (recorded, now))
        return [] if was == is_ else [f"was {was}, is {is_}"]
    lines = _site_differences(_flat(recorded["sites"]), _flat(now["sites"]))
    if recorded["kept"] != now["kept"]:
        lines.append(f"the model's own weights: were {recorded['kept']}, are {now['kept']}")
    for part, bound in (("outputs", REL_L2), ("runtime", RUNTIME_REL_L2)):
        lines += _output_differences(part, recorded.get(part, {}), now.get(part, {}), bound)
    return lines


def _flat(table: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: (facts, c) for facts, sites in table.items() for name, c in sites.items()}


def _site_differences(
    recorded: Mapping[str, tuple[str, str]], now: Mapping[str, tuple[str, str]]
) -> list[str]:
    lines = [f"{name}: a site no longer" for name in recorded if name not in now]
    lines += [f"{name}: not a site before" for name in now if name not in recorded]
    for name in (n for n in recorded if n in now):
        (facts, content), (facts_now, content_now) = recorded[name], now[name]
        if facts != facts_now:
            lines.append(f"{name}: was {facts!r}, is {facts_now!r}")
        if not _same_content(content, content_now):
            lines.append(f"{name}: stored weights were {content}, are {content_now}")
    return lines


def _same_content(recorded: str, now: str) -> bool:
    (digest, fitted, error), (digest_now, fitted_now, error_now) = (
        text.partition("~") for text in (recorded, now)
    )
    if (digest, fitted) != (digest_now, fitted_now):
        return False
    return not fitted or math.isclose(float(error), float(error_now), rel_tol=RESIDUAL)


def _output_differences(
    part: str, recorded: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]],
    bound: float,
) -> list[str]:  # fmt: skip
    if set(recorded) != set(now):
        return [f"{part}: were {sorted(recorded)}, are {sorted(now)}"]
    apart = {name: distance(recorded[name], now[name]) for name in recorded}
    return [
        f"{part}: {name} is {gap:.2g} (relative L2) from the record, more than {bound:g}"
        for name, gap in apart.items()
        if not gap <= bound
    ]


# --- files ---------------------------------------------------------------------------------------


def read_rows(text: str) -> dict[str, Row]:
    """The rows of a model's record, by ``Case.row``."""
    data = json.loads(text)
    tables = {key: _unpacked(table) for key, table in data["sites"].items()}
    return {
        name: {**row, "sites": tables[row["sites"]]} if "sites" in row else row
        for name, row in data["rows"].items()
    }


def write_rows(rows: Mapping[str, Row]) -> str:
    """A model's record as JSON, a row a line; rows with equal sites share one table of them."""
    tables: dict[str, Any] = {}
    lines = []
    for name, row in rows.items():
        if "sites" in row:
            packed = _packed(row["sites"])
            text = json.dumps(packed, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:8]
            tables[key] = packed
            row = {**row, "sites": key}
        lines.append(f"{json.dumps(name)}: {json.dumps(row)}")
    body = ",\n".join(lines)
    sites = json.dumps(tables, indent=0)
    return f'{{"rows": {{\n{body}\n}},\n"sites": {sites}}}\n'


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _packed(table: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Sites that differ by a number alone on one line: ``{"layers.*.q": "0=12ab 1=34cd"}``."""
    packed: dict[str, dict[str, str]] = {}
    for facts, sites in table.items():
        for name, content in sites.items():
            number = _NUMBER.search(name)
            alike = _NUMBER.sub("*", name, count=1)
            entry = f"{number[0] if number else ''}={content}"
            line = packed.setdefault(facts, {}).setdefault(alike, "")
            packed[facts][alike] = f"{line} {entry}".strip()
    return packed


def _unpacked(packed: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for facts, lines in packed.items():
        for alike, line in lines.items():
            for entry in line.split(" "):
                number, _, content = entry.partition("=")
                table.setdefault(facts, {})[alike.replace("*", number)] = content
    return table

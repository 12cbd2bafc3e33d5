"""The manifest: its schema, its checks, what is stable in it, and how two are compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from graphwright.ir.core.errors import BadInput
from graphwright.tools.report import manifest as mf
from graphwright.tools.report.summary import (
    group_name,
    merged_sites,
    site_groups,
    split_name,
    worst,
)

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("steps", [(), ("clean",), ("quantize",), ("clean", "quantize", "eora")])
def test_valid_and_round_trips(make_manifest: Make, tmp_path: Any, steps: tuple[str, ...]) -> None:
    manifest = make_manifest(*steps)
    mf.validate(manifest)
    mf.write(tmp_path, manifest)
    loaded = mf.load(tmp_path)
    assert loaded == manifest
    mf.validate(loaded)


def test_schema_documents_every_property() -> None:
    schema = json.loads(mf.SCHEMA_FILE.read_text(encoding="utf-8"))

    def properties(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, entry in node.get("properties", {}).items():
                yield f"{path}/{name}", entry
            for key, child in node.items():
                yield from properties(child, f"{path}/{key}")
        elif isinstance(node, list):
            for i, child in enumerate(node):
                yield from properties(child, f"{path}/{i}")

    found = dict(properties(schema, ""))
    assert len(found) > 60
    assert [path for path, entry in found.items() if len(entry.get("description", "")) < 8] == []


def test_schema_is_a_schema_and_holds_the_promised_fields() -> None:
    schema = json.loads(mf.SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == mf.SCHEMA
    promised = {
        "name", "options", "exact", "sites", "refused", "bytes_before", "bytes_after",
        "macs_before", "macs_after", "error", "seconds", "peak_rss_bytes",
    }  # fmt: skip
    assert promised <= set(schema["$defs"]["pass"]["required"])
    assert {"rel_l2", "cosine", "max_abs"} == set(schema["$defs"]["error"]["required"])


@pytest.mark.parametrize(
    ("break_it", "where"),
    [
        (lambda m: m["passes"][0].pop("exact"), "$.passes[0]"),
        (lambda m: m["passes"][0]["sites"][3].update(bytes_after=-1), "sites[3].bytes_after"),
        (lambda m: m["passes"][0]["error"].update(cosine=1.5), "error"),
        (lambda m: m.update(notes="not in the schema"), "notes"),
        (lambda m: m["source"].update(sha256="abc"), "$.source.sha256"),
        (lambda m: m.update(schema=2), "$.schema"),
        (lambda m: m["versions"].pop("graphwright"), "$.versions"),
        (lambda m: m["graph_after"]["children"][0].update(ops={"add": "2"}), "graph_after"),
    ],
)
def test_validate_names_the_field(
    make_manifest: Make, break_it: Callable[[Any], object], where: str
) -> None:
    manifest = make_manifest("quantize")
    break_it(manifest)
    with pytest.raises(BadInput) as caught:
        mf.validate(manifest)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "not a Graphwright manifest"),
        (b'{"schema": "1"}', "no integer `schema`"),
        (b'{"schema": 7}', "written in format 7, and this Graphwright reads up to 1"),
        (b'{"schema": 1, "source": {}}', "damaged: `recipe` is missing or is not a str"),
    ],
)
def test_load_refuses(tmp_path: Any, content: bytes, message: str) -> None:
    (tmp_path / mf.FILE_NAME).write_bytes(content)
    with pytest.raises(BadInput, match=r"graphwright\.json") as caught:
        mf.load(tmp_path)
    assert message in str(caught.value)


def test_load_refuses_what_is_no_artifact(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match=r"it holds no graphwright\.json"):
        mf.load(tmp_path)
    with pytest.raises(BadInput, match="there is no such folder"):
        mf.load(tmp_path / "missing")


def test_load_refuses_a_damaged_pass(make_manifest: Make, tmp_path: Any) -> None:
    manifest = make_manifest("clean", "quantize")
    del manifest["passes"][1]["sites"][0]["shape"]
    (tmp_path / mf.FILE_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="a site of pass 2: damaged: `shape`"):
        mf.load(tmp_path)


def test_write_is_stable_and_has_no_nan(make_manifest: Make, tmp_path: Any) -> None:
    manifest = make_manifest("quantize")
    reordered = dict(reversed(manifest.items()))
    first = mf.write(tmp_path, manifest).read_bytes()
    assert mf.write(tmp_path, reordered).read_bytes() == first
    manifest["passes"][0]["error"]["rel_l2"] = float("nan")
    manifest["verification"]["outputs"][0]["max_abs"] = float("inf")
    mf.write(tmp_path, manifest)
    loaded = mf.load(tmp_path)
    assert loaded["passes"][0]["error"]["rel_l2"] is None
    assert loaded["verification"]["outputs"][0]["max_abs"] is None
    mf.validate(loaded)


def test_diff_ignores_what_differs_from_run_to_run(make_manifest: Make) -> None:
    a, b = make_manifest("clean", "quantize"), make_manifest("clean", "quantize")
    b["created"], b["machine"] = "2027-01-01T00:00:00Z", {"cores": 64}
    for step in b["passes"]:
        step["seconds"], step["peak_rss_bytes"] = 99.0, 1
    assert mf.diff(a, b) == []
    assert mf.stable(a) == mf.stable(b)


def test_diff_tells_what_changed(make_manifest: Make) -> None:
    a, b = make_manifest("quantize"), make_manifest("quantize", "eora")
    b["passes"][0]["options"]["bits"] = 8
    b["verification"]["outputs"][0]["cosine"] = 0.5
    rows = {(row.section, row.name): (row.a, row.b) for row in mf.diff(a, b)}
    assert rows["recipe", "recipe"] == (a["recipe"], b["recipe"])
    assert rows["passes", "1 quantize: bits"] == (4, 8)
    assert rows["passes", "2 eora: rank"] == (None, 32)
    assert rows["verification", "embeddings: cosine"] == (0.999561, 0.5)
    key = "sites encoder.layer.*.output.dense", "bytes_after"
    assert rows[key] == (6 * 331_776, 6 * 454_656)
    assert not any(name == "count" for _, name in rows)
    sections = [row.section for row in mf.diff(a, b)]
    assert len(list(dict.fromkeys(sections))) == len(
        [s for i, s in enumerate(sections) if i == 0 or sections[i - 1] != s]
    )


def test_sites_of_two_passes_are_merged(make_manifest: Make) -> None:
    manifest = make_manifest("clean", "quantize", "eora")
    sites = merged_sites(manifest)
    assert len(sites) == 37
    first = sites[0]
    assert first["bytes_before"] == 4 * 384 * 384
    assert first["bytes_after"] == manifest["passes"][2]["sites"][0]["bytes_after"]
    assert first["passes"] == [2, 3]
    groups = site_groups(sites)
    assert [g["count"] for g in groups] == [6] * 6 + [1]
    assert sum(g["bytes_after"] for g in groups) == sum(s["bytes_after"] for s in sites)
    assert groups[0]["rel_l2"] == max(s["rel_l2"] for s in sites[:36:6])


@pytest.mark.parametrize(
    ("name", "group", "parts"),
    [
        ("h.3.mlp.fc1", "h.*.mlp.fc1", ("h.3", "mlp.fc1")),
        ("lm_head", "lm_head", ("", "lm_head")),
        ("linear_12", "linear_*", ("", "linear_12")),
        ("layers.3", "layers.*", ("", "layers.3")),
        ("experts.3.w1.0", "experts.*.w1.*", ("experts.3", "w1.0")),
    ],
)
def test_names(name: str, group: str, parts: tuple[str, str]) -> None:
    assert group_name(name) == group
    assert split_name(name) == parts


def test_worst_takes_each_number_from_the_worst_output() -> None:
    a = {"name": "a", "rel_l2": 0.1, "cosine": 0.9, "max_abs": 3.0}
    b = {"name": "b", "rel_l2": 0.2, "cosine": 0.95, "max_abs": None}
    assert worst([a, b]) == {"rel_l2": 0.2, "cosine": 0.9, "max_abs": None}
    assert worst([]) is None


class Weight:
    def __init__(self, key: str, nbytes: int) -> None:
        self.key, self.nbytes = key, nbytes


class FakeView:
    """The part of ``View`` that ``graph_tree`` reads: nodes as (scope, op, names of weights)."""

    nodes_ = (
        ("", "native", ("shared",)),
        ("encoder.layer.0", "linear", ("w0", "shared")),
        ("encoder.layer.0", "linear", ("w0",)),
        ("encoder.layer.1.out", "add", ()),
        ("encoder", "gelu", ()),
    )

    def nodes(self) -> Iterator[Any]:
        return iter(self.nodes_)

    def scope(self, node: Any) -> str:
        return str(node[0])

    def op(self, node: Any) -> str:
        return str(node[1])

    def native_op(self, node: Any) -> str:
        return "aten.roll.default"

    def arguments(self, node: Any) -> tuple[str, ...]:
        return (*node[2], "activation")

    def weight(self, value: str) -> Any:
        return None if value == "activation" else Weight(value, 10 * len(value))


def test_graph_tree_counts_each_weight_once() -> None:
    tree = mf.graph_tree(FakeView())  # type: ignore[arg-type]
    assert tree["ops"] == {"aten.roll.default": 1}
    assert tree["params_bytes"] == 60
    (encoder,) = tree["children"]
    assert encoder["ops"] == {"gelu": 1}
    (layer,) = encoder["children"]
    assert [child["name"] for child in layer["children"]] == ["0", "1"]
    assert layer["children"][0]["ops"] == {"linear": 2}
    assert layer["children"][0]["params_bytes"] == 20
    assert layer["children"][1]["children"][0]["name"] == "out"


def test_a_manifest_shares_nothing_with_what_stable_returns(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    kept = copy.deepcopy(manifest)
    mf.stable(manifest)["passes"][0]["options"]["bits"] = 2
    assert manifest == kept

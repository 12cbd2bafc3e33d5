"""The manifest: its schema, its checks, what is stable in it, and how two are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import graphwright as gw
import jsonschema
import pytest
import torch
from graphwright.backends.onnx.model_files import MANIFEST_FILE
from graphwright.ir.core.errors import BadInput
from graphwright.tools.report import manifest as mf
from graphwright.tools.report import schema
from graphwright.tools.report.manifest import ErrorEntry, Manifest, OutputEntry
from graphwright.tools.report.manifest_diff import diff
from graphwright.tools.report.module_tree import module_tree
from graphwright.tools.report.summary import (
    evaluated_text,
    group_name,
    merged_sites,
    site_groups,
    split_name,
    worst,
)

Make = Callable[..., Manifest]
MakeJson = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("steps", [(), ("clean",), ("quantize",), ("clean", "quantize", "eora")])
def test_valid_and_round_trips(
    make_json: MakeJson, keeps_schema: Any, tmp_path: Any, steps: tuple[str, ...]
) -> None:
    content = make_json(*steps)
    keeps_schema(content)
    path = mf.write(tmp_path, mf.parse(content))
    assert json.loads(path.read_bytes()) == content
    assert mf.load(tmp_path) == mf.parse(content)


# --- the schema ----------------------------------------------------------------------------------


def test_the_schema_is_that_of_the_models() -> None:
    text = schema.text()
    assert schema.SCHEMA_FILE.read_text(encoding="utf-8") == text, (
        "run `python -m graphwright.tools.report.schema`"
    )


def test_schema_documents_every_property() -> None:
    def properties(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, entry in node.get("properties", {}).items():
                yield f"{path}/{name}", entry
            for key, child in node.items():
                yield from properties(child, f"{path}/{key}")
        elif isinstance(node, list):
            for i, child in enumerate(node):
                yield from properties(child, f"{path}/{i}")

    known = json.loads(schema.text())
    entries = dict(properties(known, ""))
    assert len(entries) > 60
    # What only refers to a part is described there.
    described = [known["$defs"][e["$ref"].split("/")[-1]] if "$ref" in e else e
                 for e in entries.values()]  # fmt: skip
    assert [e for e in described if len(e.get("description", "")) < 8] == []


def test_schema_is_a_schema_and_holds_the_promised_fields() -> None:
    known = json.loads(schema.text())
    jsonschema.Draft202012Validator.check_schema(known)
    assert known["properties"]["schema"]["const"] == mf.SCHEMA
    promised = {
        "name", "options", "exact", "sites", "refused", "bytes_before", "bytes_after",
        "macs_before", "macs_after", "error", "seconds", "peak_rss_bytes",
    }  # fmt: skip
    assert promised <= set(known["$defs"]["PassEntry"]["required"])
    assert {"rel_l2", "cosine", "max_abs"} == set(known["$defs"]["ErrorEntry"]["required"])


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: m.pop("sizes"), "`sizes` is missing"),
        (lambda m: m["passes"][0].pop("exact"), "`passes[0].exact` is missing"),
        (lambda m: m["passes"][0]["sites"][3].update(bytes_after=-1),
         "`passes[0].sites[3].bytes_after` should be greater than or equal to 0"),
        (lambda m: m["passes"][0]["sites"][0].pop("shape"), "sites[0].shape` is missing"),
        (lambda m: m["passes"][0]["sites"][0].update(shape=[384, "384"]),
         "`passes[0].sites[0].shape[1]` should be a valid integer"),
        (lambda m: m["passes"][0].update(exact=1), "`passes[0].exact` should be a valid boolean"),
        (lambda m: m["passes"][0]["error"].update(cosine=1.5), "`passes[0].error.cosine`"),
        (lambda m: m["sizes"].update(source_bytes=10**400), "`sizes.source_bytes`"),
        (lambda m: m["sizes"].update(source_bytes=True), "`sizes.source_bytes`"),
        (lambda m: m.update(remark="not in the schema"), "`remark` is not a field of this format"),
        (lambda m: m["source"].update(sha256="abc"), "`source.sha256`"),
        (lambda m: m["source"].update(kind="web"), "`source.kind`"),
        (lambda m: m.update(recipe=["clean"]), "`recipe` should be a valid string"),
        (lambda m: m.update(schema=0), "`schema` should be 1"),
        (lambda m: m["versions"].pop("graphwright"), "`versions` should name graphwright"),
        (lambda m: m["verification"]["runtime"].update(triton=0.1),
         "`verification.runtime.triton`"),
        (lambda m: m["graph_after"]["children"][0].update(ops={"add": "2"}),
         "`graph_after.children[0].ops.add`"),
    ],
)  # fmt: skip
def test_load_names_the_wrong_field(
    make_json: MakeJson, tmp_path: Any, keeps_schema: Any, break_it: Callable[[Any], object],
    message: str,
) -> None:  # fmt: skip
    content = make_json("quantize")
    break_it(content)
    with pytest.raises(jsonschema.ValidationError):
        keeps_schema(content)
    (tmp_path / mf.FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"graphwright\.json: damaged: ") as caught:
        mf.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"schema": 1, "a": ' + b"[" * 300 + b"]" * 300 + b"}", "more than 200 levels deep"),
        (b'{"schema": 1, "recipe": "\\ud83d"}', "damaged"),
        (b"[]", "not a Graphwright manifest"),
        (b'{"schema": "1"}', "no integer `schema`"),
        (b'{"schema": true}', "no integer `schema`"),
        (b'{"schema": 7}', "written in format 7, and this Graphwright reads up to 1"),
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


# --- writing -------------------------------------------------------------------------------------


def test_write_is_stable_and_has_no_nan(make_json: MakeJson, tmp_path: Any) -> None:
    content = make_json("quantize")
    first = mf.write(tmp_path, mf.parse(content)).read_bytes()
    reordered = mf.parse(dict(reversed(content.items())))
    assert mf.write(tmp_path, reordered).read_bytes() == first
    content["passes"][0]["error"]["rel_l2"] = float("nan")
    content["verification"]["outputs"][0]["max_abs"] = float("inf")
    mf.write(tmp_path, mf.parse(content))
    loaded = mf.load(tmp_path)
    assert loaded.passes[0].error is not None and loaded.passes[0].error.rel_l2 is None
    assert loaded.verification.outputs[0].max_abs is None


def test_what_export_writes_by_itself_is_a_manifest(tmp_path: Any, keeps_schema: Any) -> None:
    """The backends lie below the format, and write its least by hand."""
    graph = gw.trace(torch.nn.Linear(4, 2), (torch.ones(1, 4),))
    folder = gw.export(graph, tmp_path / "out")
    keeps_schema(json.loads((folder / mf.FILE_NAME).read_text()))
    done = mf.load(folder)
    bare = {name for name, field in mf.Manifest.model_fields.items() if field.is_required()}
    assert done.model_fields_set == {*bare, "files", "target"}
    assert done.sizes.source_bytes == 40 and done.sizes.artifact_bytes > 40
    assert MANIFEST_FILE == mf.FILE_NAME


def test_numbers_of_a_pass_or_a_task_that_are_not_finite_are_null(
    make_json: MakeJson, tmp_path: Any, keeps_schema: Any
) -> None:
    nan, inf = float("nan"), float("inf")
    content = make_json("quantize")
    content["passes"][0] |= {"details": {"losses": [nan, {"last": inf, "n": 3}]},
                             "options": {"nsig": inf}}  # fmt: skip
    judged = {"figures": {"f": nan}, "interval": {"f": [-inf, 0.5]}, "samples": 2, "unit": "rows",
              "detail": {"by": {"a": -inf}}, "notes": [], "seconds": 1.0}  # fmt: skip
    content["eval"] = {"task": {"before": judged, "after": judged}}
    keeps_schema(json.loads(mf.write(tmp_path, mf.parse(content)).read_text()))
    loaded = mf.load(tmp_path)
    assert loaded.passes[0].details == {"losses": [None, {"last": None, "n": 3}]}
    assert loaded.passes[0].options == {"nsig": None}
    assert loaded.eval is not None
    after = loaded.eval["task"].after
    assert (after.interval, after.detail) == ({"f": [None, 0.5]}, {"by": {"a": None}})
    assert evaluated_text(after.model_copy(update={"figures": {"f": 0.1}}), "f") == "0.1\n?..0.5"


def test_a_wrong_value_is_not_set(make_manifest: Make) -> None:
    manifest = make_manifest("quantize")
    with pytest.raises(ValueError, match="valid integer"):
        manifest.sizes.artifact_bytes = "12"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="valid dictionary or instance of ErrorEntry"):
        manifest.verification.runtime.triton = 0.1  # type: ignore[attr-defined]


# --- comparing -----------------------------------------------------------------------------------


def test_diff_ignores_what_differs_from_run_to_run(make_json: MakeJson) -> None:
    a, b = make_json("clean", "quantize"), make_json("clean", "quantize")
    b["created"], b["machine"] = "2027-01-01T00:00:00Z", {"cores": 64}
    for step in b["passes"]:
        step["seconds"], step["peak_rss_bytes"] = 99.0, 1
    assert a != b and mf.stable(a) == mf.stable(b)
    assert diff(mf.parse(a), mf.parse(b)) == []


def test_diff_tells_what_changed(make_manifest: Make) -> None:
    a, b = make_manifest("quantize"), make_manifest("quantize", "eora")
    b.passes[0].options["bits"] = 8
    b.verification.outputs[0].cosine = 0.5
    rows = {(row.section, row.name): (row.a, row.b) for row in diff(a, b)}
    assert rows["recipe", "recipe"] == (a.recipe, b.recipe)
    assert rows["passes", "1 quantize: bits"] == (4, 8)
    assert rows["passes", "2 eora: rank"] == (None, 32)
    assert rows["verification", "embeddings: cosine"] == (0.999561, 0.5)
    key = "sites encoder.layer.*.output.dense", "bytes_after"
    assert rows[key] == (6 * 331_776, 6 * 454_656)
    assert not any(name == "count" for _, name in rows)
    sections = [row.section for row in diff(a, b)]
    assert len(list(dict.fromkeys(sections))) == len(
        [s for i, s in enumerate(sections) if i == 0 or sections[i - 1] != s]
    )


def test_sites_of_two_passes_are_merged(make_manifest: Make) -> None:
    manifest = make_manifest("clean", "quantize", "eora")
    sites = merged_sites(manifest)
    assert len(sites) == 37
    first = sites[0]
    assert first.bytes_before == 4 * 384 * 384
    assert first.bytes_after == manifest.passes[2].sites[0].bytes_after
    assert first.passes == (2, 3)
    groups = site_groups(sites)
    assert [group.count for group in groups] == [6] * 6 + [1]
    assert sum(group.bytes_after for group in groups) == sum(site.bytes_after for site in sites)
    assert groups[0].rel_l2 == max(site.rel_l2 or 0.0 for site in sites[:36:6])


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
    a = OutputEntry(name="a", rel_l2=0.1, cosine=0.9, max_abs=3.0)
    b = OutputEntry(name="b", rel_l2=0.2, cosine=0.95, max_abs=None)
    assert worst([a, b]) == ErrorEntry(rel_l2=0.2, cosine=0.9, max_abs=None)
    assert worst([]) is None


class Weight:
    def __init__(self, key: str, nbytes: int) -> None:
        self.key, self.nbytes = key, nbytes


class FakeView:
    """The part of ``View`` that ``module_tree`` reads: nodes as (scope, op, names of weights)."""

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


def test_module_tree_counts_each_weight_once() -> None:
    tree = module_tree(FakeView())  # type: ignore[arg-type]
    assert tree.ops == {"aten.roll.default": 1}
    assert tree.params_bytes == 60
    (encoder,) = tree.children
    assert encoder.ops == {"gelu": 1}
    (layer,) = encoder.children
    assert [child.name for child in layer.children] == ["0", "1"]
    assert layer.children[0].ops == {"linear": 2}
    assert layer.children[0].params_bytes == 20
    assert layer.children[1].children[0].name == "out"

"""A worker stays in a folder, and one that dies leaves what it had not done."""

from __future__ import annotations

from collections import OrderedDict

from .by_folder import ByFolder, next_file

LEFT = {"a/x.py": [1], "b/x.py": [1, 2, 3], "b/y.py": [1], "c/x.py": [1, 2], "a/y.py": [1]}


def test_the_next_file() -> None:
    assert next_file(LEFT, "a", ["b"]) == "a/x.py"
    assert next_file(LEFT, None, []) == next_file(LEFT, "gone", ["a"]) == "b/x.py"
    assert next_file(LEFT, "gone", ["b"]) == "a/x.py"
    assert next_file(LEFT, "gone", ["b", "a"]) == "c/x.py"
    assert next_file(LEFT, "gone", ["b", "a", "c"]) == "b/y.py"


def test_what_a_worker_had_done_is_not_given_away() -> None:
    run = object.__new__(ByFolder)
    run.workqueue = OrderedDict()
    one: dict[str, dict[str, bool]] = {
        "a/x.py": {"a/x.py::t": True}, "a/y.py": {"a/y.py::t": True, "a/y.py::u": False},
    }  # fmt: skip
    run.assigned_work = {"one": one}
    assert run.remove_node("one") == "a/y.py::u"
    assert list(run.workqueue) == ["a/y.py"] and not run.assigned_work

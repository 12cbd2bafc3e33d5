"""Which worker of a test run takes which file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sized
from typing import Any

from xdist.scheduler import LoadFileScheduling


class ByFolder(LoadFileScheduling):
    """What ``--dist loadfile`` does, where a worker stays in a folder: the files of one ask for the
    same models, of which each worker traces its own."""

    def remove_node(self, node: Any) -> Any:
        work = self.assigned_work[node]
        for file in [file for file, tests in work.items() if all(tests.values())]:
            del work[file]  # what is done is given to nobody, who would never say that it is
        return super().remove_node(node)

    def _assign_work_unit(self, node: Any) -> None:
        at = {n: folder(list(files)[-1]) for n, files in self.assigned_work.items() if files}
        here = at.pop(node, None)
        self.workqueue.move_to_end(next_file(self.workqueue, here, at.values()), last=False)
        super()._assign_work_unit(node)


def folder(file: str) -> str:
    return file.rpartition("/")[0]


def next_file(left: Mapping[str, Sized], here: str | None, others: Collection[str]) -> str:
    """The file to run next, of those that are left with their tests: the first of the folder where
    the worker is, or of the one of the most tests where no other worker is; where they are in all
    of them, the last of the one of the most tests."""
    files: dict[str, list[str]] = {}
    for file in left:
        files.setdefault(folder(file), []).append(file)
    if here in files:
        return files[here][0]
    tests = {at: sum(len(left[file]) for file in there) for at, there in files.items()}
    free = sorted(files.keys() - {*others})
    if free:
        return files[max(free, key=tests.__getitem__)][0]
    return files[max(files, key=tests.__getitem__)][-1]

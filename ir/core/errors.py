"""What can go wrong, in messages for users; each error carries the command's exit code."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class GraphwrightError(Exception):
    """Base of every error meant for a person; ``exit_code`` is what the command ends with."""

    exit_code = 2


class BadInput(GraphwrightError):
    """The input, an option or a file is wrong (exit code 2)."""


class NodeFailed(BadInput):
    """A node does not take the operands that it gets of the inputs that are given (exit code 2)."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors by which a disk says that it is full."""


class DiskFull(GraphwrightError):
    """A disk ran full while something was written (exit code 3)."""

    exit_code = 3


class Missing(GraphwrightError):
    """Something needed is not there: a file, a package, a device (exit code 3)."""

    exit_code = 3


class BoundExceeded(GraphwrightError):
    """A verification failed or a quality bound was exceeded; nothing is published (exit code 1)."""

    exit_code = 1


class InvalidGraph(GraphwrightError):
    """A graph breaks a structural rule: a rewrite went wrong (exit code 1)."""

    exit_code = 1


class Refusal(Exception):
    """Why a rewrite does not apply, and at which node. ``depth`` is how far the match came."""

    def __init__(self, reason: str, node: object = None, depth: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.depth = depth

    def __str__(self) -> str:
        name = getattr(self.node, "name", None)
        return self.reason if name is None else f"{self.reason} (at {name})"


def first_line(error: BaseException) -> str:
    """What an error of another library says first; the name of its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def near_misses(word: str, known: Iterable[str]) -> str:
    """A phrase that names up to three close matches, or the whole list where it is short."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.55)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(known)}" if len(known) <= 24 else ""

"""Work that is not shared among threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch runs each op on the thread that calls it.

    For many ops of microseconds on what lies in cache: threads that such an op is shared among wait
    for each other at its end, and on a busy machine for a turn of the processor (with two others
    at work, 530 ns a weight to round to 4 bits, and 7 on one thread).
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""A small language model that is traced once for all tests of methods on weights."""

from __future__ import annotations

import pytest
from graphwright.ir.core.view import View

from ... import models

Model = tuple[models.Small, dict[str, View]]


@pytest.fixture(scope="session")
def llama() -> Model:
    """Two layers and an untied head: the module with its inputs, and its graphs by kind."""
    small = models.llama()
    return small, models.raised(small)

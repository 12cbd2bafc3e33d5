"""Models that the tests of token passes share."""

from __future__ import annotations

import pytest

from .llava import Models, models_in


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_in(tmp_path_factory.mktemp("llava"))

"""Models that the tests of token passes share."""

from __future__ import annotations

import pytest

from .llava import FRAMES, Models, models_in


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models_in(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """An image is the frames of a video."""
    return models_in(tmp_path_factory.mktemp("videos"), FRAMES)

"""A second container, for tests that break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.docker_engine import Client


@pytest.fixture
def other(image: Client) -> Iterator[str]:
    """The name of a second container, similar to that of the first; it is removed after the test."""
    name = "kolo_container2"
    yield name
    image.forget(name)

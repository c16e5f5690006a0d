"""A second container, for what is broken here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.docker_engine import Client


@pytest.fixture
def other(image: Client) -> Iterator[str]:
    """The name of a second container, whose name is similar to that of the first; it is removed at the end."""
    name = "kolo_container2"
    yield name
    image.forget(name)

"""What several test rooms need."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune import llamacpp
from kolotune.reporter import PlainReporter

SAMPLE = Path(__file__).parent.parent / "examples" / "lighthouse"


@pytest.fixture(scope="session")
def reporter() -> PlainReporter:
    """A reporter that prints plain lines."""
    return PlainReporter()


@pytest.fixture(scope="session")
def toolchain(reporter: PlainReporter) -> llamacpp.Toolchain:
    """llama.cpp's converter, fetched the first time."""
    return llamacpp.ensure(reporter)


@pytest.fixture(scope="session")
def sample_chats() -> Path:
    """The chats of the sample."""
    return SAMPLE / "chats.jsonl"

"""Every parser with inputs that were changed at random: only errors that are expected, soon, in little memory."""

from __future__ import annotations

import resource

import pytest
from fuzz.loops import MEGABYTES, SECONDS, tried
from fuzz.targets import TARGETS

SEED = 12
ORDINARY = 0.7  # seconds of processor time for each of the parsers


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [ORDINARY, pytest.param(10.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_no_parser_breaks(name: str, seconds: float) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, slowest = tried(name, SEED, seconds)
    assert count >= 5
    assert slowest < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10

"""Every parser with inputs that were changed at random: only errors that are expected, soon, in little memory."""

from __future__ import annotations

import resource

import pytest
from fuzz.loops import MEGABYTES, SECONDS, try_inputs
from fuzz.targets import TARGETS

SEED = 12
SECONDS_EACH = 5.0  # of processor time


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", TARGETS)
def test_no_parser_breaks(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, slowest = try_inputs(name, SEED, SECONDS_EACH)
    assert count >= 5
    assert slowest < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10

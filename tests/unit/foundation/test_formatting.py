"""Sizes, durations and measured values as people read them."""

from __future__ import annotations

import pytest

from kolotune.foundation.formatting import format_duration, format_fields, format_size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (1.5e6, "1.5 MB"), (2.34e9, "2.3 GB"), (5e12, "5.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_fields_of_a_count() -> None:
    fields = {"loss": 2.41, "tokens_per_second": 612, "held_out_loss": "2.5"}
    assert format_fields(fields) == ["loss 2.4100", "612 tokens/s", "held out loss 2.5"]

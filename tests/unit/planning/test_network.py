"""What machines send each other in a step."""

from __future__ import annotations

import pytest

from kolotune.planning import network
from kolotune.planning.network import Traffic


def test_a_ring_sends_nearly_twice_the_gradients() -> None:
    assert network.of_step(1000, 1) == 0
    assert network.of_step(1000, 2) == 4000
    assert network.of_step(1000, 4) == 6000
    assert 7800 < network.of_step(1000, 64) < 8000


def test_a_network_carries_less_than_its_name_says() -> None:
    assert network.seconds(12_500_000, 100) == pytest.approx(1.06, abs=0.01)


def test_an_accumulation_that_makes_the_network_a_tenth() -> None:
    found = Traffic(1, seconds=1.0, computing=1.0)
    assert found.share == 0.5 and found.enough == 12
    assert Traffic(1, 1.0, computing=12.0, accumulation=12).share == pytest.approx(0.077, abs=1e-3)
    assert Traffic(1, 1.0, computing=9.5, accumulation=9).enough == 9, "little enough as it is"
    assert Traffic(1, 0.0, computing=9.0).enough == 1


def test_what_is_not_known() -> None:
    assert Traffic(1).share is Traffic(1).enough is Traffic(1, 1.0).share is Traffic(1, 1.0).enough is None


def test_a_parted_base_comes_with_every_batch() -> None:
    assert network.of_parted_base(1000, 1, 5) == 0
    assert network.of_parted_base(1000, 4, 1) == 1500
    assert network.of_parted_base(1000, 4, 3) == 4500
    assert Traffic(2, 1.0, 1.0, base=1).share == 0.5
    assert Traffic(2, 1.0, 1.0, base=1).enough is None

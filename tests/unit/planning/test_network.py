"""What machines send each other in a step."""

from __future__ import annotations

import pytest

from kolotune.planning import network
from kolotune.planning.network import Traffic


def test_a_ring_sends_nearly_twice_the_gradients() -> None:
    assert network.gradient_bytes(1000, 1) == 0
    assert network.gradient_bytes(1000, 2) == 4000
    assert network.gradient_bytes(1000, 4) == 6000
    assert 7800 < network.gradient_bytes(1000, 64) < 8000


def test_packet_headers_take_part_of_the_network() -> None:
    assert network.transfer_seconds(12_500_000, 100) == pytest.approx(1.06, abs=0.01)


def test_accumulation_keeps_the_network_below_a_tenth() -> None:
    traffic = Traffic(1, seconds=1.0, computing=1.0)
    assert traffic.share == 0.5 and traffic.enough == 12
    assert Traffic(1, 1.0, computing=12.0, accumulation=12).share == pytest.approx(0.077, abs=1e-3)
    assert Traffic(1, 1.0, computing=9.5, accumulation=9).enough == 9, "already low enough"
    assert Traffic(1, 0.0, computing=9.0).enough == 1


def test_unknown_speed_gives_no_share() -> None:
    assert Traffic(1).share is Traffic(1).enough is Traffic(1, 1.0).share is Traffic(1, 1.0).enough is None


def test_every_batch_sends_a_sharded_base() -> None:
    assert network.sharded_base_bytes(1000, 1, 5) == 0
    assert network.sharded_base_bytes(1000, 4, 1) == 1500
    assert network.sharded_base_bytes(1000, 4, 3) == 4500
    assert Traffic(2, 1.0, 1.0, base=1).share == 0.5
    assert Traffic(2, 1.0, 1.0, base=1).enough is None

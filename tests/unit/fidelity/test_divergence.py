"""Divergences against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kolotune.fidelity.divergence import between


def test_the_mean_the_tail_and_the_agreement() -> None:
    before = np.log(np.tile(np.float32([0.5, 0.25, 0.25]), (200, 1)))
    after = before.copy()
    after[:10] = np.log(np.float32([0.25, 0.5, 0.25]))
    found = between(before, after)
    apart = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert found.kl_mean == pytest.approx(apart * 10 / 200, rel=1e-5)
    assert found.kl_p99 == pytest.approx(apart, rel=1e-5)
    assert found.top1_agreement == 190 / 200


def test_the_same_is_no_distance_and_padding_of_a_vocabulary_none() -> None:
    rows = np.log(np.random.default_rng(1).dirichlet(np.ones(50), 90)).astype(np.float32)
    padded = np.concatenate([rows, np.full((90, 6), -40, np.float32)], axis=1)
    found = between(rows, padded)
    assert found.top1_agreement == 1.0 and 0 <= found.kl_mean < 1e-6 and found.kl_p99 < 1e-6

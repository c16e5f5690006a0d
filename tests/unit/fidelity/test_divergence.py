"""Divergences, compared with values calculated by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kolotune.fidelity.divergence import between


def test_the_mean_the_tail_and_the_agreement() -> None:
    before = np.log(np.tile(np.float32([0.5, 0.25, 0.25]), (200, 1)))
    after = before.copy()
    after[:10] = np.log(np.float32([0.25, 0.5, 0.25]))
    divergence = between(before, after)
    apart = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert divergence.kl_mean == pytest.approx(apart * 10 / 200, rel=1e-5)
    assert divergence.kl_p99 == pytest.approx(apart, rel=1e-5)
    assert divergence.top1_agreement == 190 / 200


def test_equal_models_do_not_diverge_and_padding_is_ignored() -> None:
    rows = np.log(np.random.default_rng(1).dirichlet(np.ones(50), 90)).astype(np.float32)
    padded = np.concatenate([rows, np.full((90, 6), -40, np.float32)], axis=1)
    divergence = between(rows, padded)
    assert divergence.top1_agreement == 1.0 and 0 <= divergence.kl_mean < 1e-6 and divergence.kl_p99 < 1e-6

"""What PiSSA and OLoRA take out of a weight, compared with full decompositions."""

from __future__ import annotations

import numpy as np
import pytest

from kolotune.weights.initial_matrices import Initial, taken_out


def weight(rows: int, columns: int, decay: float) -> np.ndarray:
    """Return a random matrix whose singular values fall as a power of their number; 0: those of random numbers."""
    random = np.random.default_rng(3).standard_normal((rows, columns))
    left, values, right = np.linalg.svd(random, full_matrices=False)
    scaled: np.ndarray = (left * values / np.arange(1, len(values) + 1) ** decay) @ right
    return scaled.astype(np.float32)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (600, 400), (400, 600)])
@pytest.mark.parametrize("rank", [1, 16])
def test_pissa(rows: int, columns: int, rank: int, decay: float) -> None:
    matrix = weight(rows, columns, decay)
    left, right = taken_out(Initial.PISSA, matrix, rank, scale=3.0)
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    expected = (u[:, :rank] * values[:rank]) @ v[:rank]
    assert left.shape == (rows, rank) and right.shape == (rank, columns)
    assert np.abs(left @ right - expected).max() < 2e-6 * values[0]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_olora(shape: tuple[int, int]) -> None:
    matrix = weight(*shape, 0.0)
    left, right = taken_out(Initial.OLORA, matrix, 4, scale=3.0)
    q, r = np.linalg.qr(matrix.astype(np.float64))
    np.testing.assert_allclose(left @ right, 3.0 * q[:, :4] @ r[:4], atol=1e-5)

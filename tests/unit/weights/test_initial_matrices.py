"""What PiSSA and OLoRA take out of a weight, compared with full decompositions."""

from __future__ import annotations

import numpy as np
import pytest

from kolotune.weights import initial_matrices
from kolotune.weights.initial_matrices import Initial, starting_matrices, taken_out


def weight(rows: int, columns: int, decay: float) -> np.ndarray:
    """Return a random matrix whose singular values fall as a power of their number; 0: those of random numbers."""
    random = np.random.default_rng(3).standard_normal((rows, columns))
    left, values, right = np.linalg.svd(random, full_matrices=False)
    scaled: np.ndarray = (left * values / np.arange(1, len(values) + 1) ** decay) @ right
    return scaled.astype(np.float32)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(40, 30), (600, 400), (400, 600)])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("whole", [0, 1024])
def test_pissa(rows: int, columns: int, rank: int, decay: float, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_matrices, "_WHOLE", whole)
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


@pytest.mark.parametrize("initial", Initial)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_the_matrices_with_which_an_update_starts(initial: Initial, shape: tuple[int, int]) -> None:
    """Their product is what is taken out; the signs of vectors do not depend on how they were computed."""
    matrix = weight(*shape, 0.5)
    a, b = starting_matrices(initial, matrix, 4, scale=3.0)
    left, right = taken_out(initial, matrix, 4, scale=3.0)
    np.testing.assert_allclose(3.0 * b @ a, left @ right, atol=1e-5)
    assert all(column[np.abs(column).argmax()] > 0 for column in b.T)
    if initial is Initial.PISSA:  # each shares the root of the singular value
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)
    else:
        np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-6)


@pytest.mark.parametrize("initial", Initial)
def test_a_weight_without_so_many_directions_starts_with_finite_numbers(initial: Initial) -> None:
    matrix = np.outer(np.arange(6), np.arange(5)).astype(np.float32)
    a, b = starting_matrices(initial, matrix, 3, scale=2.0)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.isfinite(starting_matrices(initial, np.zeros((6, 5), np.float32), 3, scale=2.0)[0]).all()

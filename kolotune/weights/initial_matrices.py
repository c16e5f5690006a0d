"""What some initialisations of LoRA take out of the base model's weights, computed again from these weights.

PiSSA (Meng et al., 2024) starts with the principal part of a weight, OLoRA (Büyükakyüz, 2024) with what its first
columns span. Both put that into the update and leave the rest as the base; PEFT repeats it when it loads such an
adapter. Here no full decomposition is needed: both are a projection, which the eigenvectors of a Gram matrix give.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_MORE = 8  # vectors in a block beyond those that are looked for: the last ones converge late
_BLOCKS_BETWEEN_CHECKS = 5
_RESIDUAL = 1e-10
_STARTING_RESIDUAL = 1e-6  # what a start is not exact in, the base keeps
_WHOLE = 1024  # rows up to which decomposing all is faster


class Initial(Enum):
    """What an update started as."""

    PISSA = "PiSSA"
    OLORA = "OLoRA"


def starting_matrices(initial: Initial, weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return A ``[rank, in]`` and B ``[out, rank]``, fp32, with which an update starts; the base loses `scale` B A.

    The signs of vectors, which are arbitrary, are chosen so that all processes and machines have the same.

    Args:
        initial, weight, rank, scale: as in `taken_out`; the rank is at most the shorter side of the weight.
    """
    import numpy as np

    left, right = (each.astype(np.float64) for each in taken_out(initial, weight, rank, scale, _STARTING_RESIDUAL))
    if initial is Initial.OLORA:
        left /= scale
    else:
        # One factor has vectors of length 1, the other has the singular values in it; A and B share their root.
        lengths = np.maximum(np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1), np.finfo(np.float64).tiny)
        root = np.sqrt(lengths / scale)
        left *= root / np.maximum(np.linalg.norm(left, axis=0), np.finfo(np.float64).tiny)
        right *= (root / np.maximum(np.linalg.norm(right, axis=1), np.finfo(np.float64).tiny))[:, None]
    signs = np.where(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])] < 0, -1.0, 1.0)
    return (right * signs[:, None]).astype(np.float32), (left * signs).astype(np.float32)


def taken_out(
    initial: Initial, weight: np.ndarray, rank: int, scale: float, residual: float = _RESIDUAL
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two factors, ``[out, rank]`` and ``[rank, in]``, of what was subtracted from a weight.

    Args:
        initial: the initialisation.
        weight: ``[out, in]``, fp32.
        rank: of the update.
        scale: its factor.
        residual: of the vectors that PiSSA takes out, relative to the largest eigenvalue of the Gram matrix.
    """
    import numpy as np

    exact = weight.astype(np.float64)
    if initial is Initial.OLORA:
        left = np.linalg.qr(exact[:, :rank])[0]
        left, right = left * scale, left.T @ exact
    elif len(exact) <= exact.shape[1]:
        left = _leading_vectors(exact, rank, residual)
        right = left.T @ exact
    else:
        right = _leading_vectors(exact.T, rank, residual).T
        left = exact @ right.T
    return left.astype(np.float32), right.astype(np.float32)


def _leading_vectors(matrix: np.ndarray, rank: int, tolerance: float) -> np.ndarray:
    """Return the left singular vectors of the largest singular values, ``[rows, rank]``.

    A block Krylov space grows until it holds them to the tolerance. A small matrix, or a spectrum without gaps, is
    decomposed whole.
    """
    import numpy as np

    rows = len(matrix)
    block = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, min(rank + _MORE, rows))))[0]
    basis, images = np.empty((rows, 0)), np.empty((rows, 0))
    while rows > _WHOLE and basis.shape[1] + block.shape[1] <= rows // 2:
        image = matrix @ (matrix.T @ block)
        basis, images = np.hstack([basis, block]), np.hstack([images, image])
        if basis.shape[1] % (_BLOCKS_BETWEEN_CHECKS * block.shape[1]) == 0:
            values, inner = np.linalg.eigh(basis.T @ images)
            vectors: np.ndarray = basis @ inner[:, -rank:]
            residual = images @ inner[:, -rank:] - vectors * values[-rank:]
            if np.linalg.norm(residual, axis=0).max() <= tolerance * values[-1]:
                return vectors
        for _ in range(2):  # once leaves rounding errors
            image -= basis @ (basis.T @ image)
        block = np.linalg.qr(image)[0]
    whole: np.ndarray = np.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
    return whole

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


class Initial(Enum):
    """What an update started as."""

    PISSA = "PiSSA"
    OLORA = "OLoRA"


def taken_out(initial: Initial, weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the two factors, ``[out, rank]`` and ``[rank, in]``, of what was subtracted from a weight.

    Args:
        initial: the initialisation.
        weight: ``[out, in]``, fp32.
        rank: of the update.
        scale: its factor.
    """
    import numpy as np

    exact = weight.astype(np.float64)
    if initial is Initial.OLORA:
        left = np.linalg.qr(exact[:, :rank])[0]
        left, right = left * scale, left.T @ exact
    elif len(exact) <= exact.shape[1]:
        left = _leading_vectors(exact, rank)
        right = left.T @ exact
    else:
        right = _leading_vectors(exact.T, rank).T
        left = exact @ right.T
    return left.astype(np.float32), right.astype(np.float32)


def _leading_vectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the left singular vectors of the largest singular values, ``[rows, rank]``.

    A block Krylov space grows until it holds them to about 1e-10; a spectrum without gaps is decomposed whole.
    """
    import numpy as np

    rows = len(matrix)
    block = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, min(rank + _MORE, rows))))[0]
    basis, images = np.empty((rows, 0)), np.empty((rows, 0))
    while basis.shape[1] + block.shape[1] <= rows // 2:
        image = matrix @ (matrix.T @ block)
        basis, images = np.hstack([basis, block]), np.hstack([images, image])
        if basis.shape[1] % (_BLOCKS_BETWEEN_CHECKS * block.shape[1]) == 0:
            values, inner = np.linalg.eigh(basis.T @ images)
            vectors: np.ndarray = basis @ inner[:, -rank:]
            residual = images @ inner[:, -rank:] - vectors * values[-rank:]
            if np.linalg.norm(residual, axis=0).max() <= _RESIDUAL * values[-1]:
                return vectors
        for _ in range(2):  # once leaves rounding errors
            image -= basis @ (basis.T @ image)
        block = np.linalg.qr(image)[0]
    whole: np.ndarray = np.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
    return whole

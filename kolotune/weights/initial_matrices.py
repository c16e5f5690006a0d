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
        left = np.linalg.eigh(exact @ exact.T)[1][:, -rank:]
        right = left.T @ exact
    else:
        right = np.linalg.eigh(exact.T @ exact)[1][:, -rank:].T
        left = exact @ right.T
    return left.astype(np.float32), right.astype(np.float32)

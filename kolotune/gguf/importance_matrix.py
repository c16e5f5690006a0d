"""An importance matrix (imatrix): how large the inputs of each weight matrix are, column by column.

Quantizers spend their precision where the inputs are large. The file is a GGUF as llama.cpp's own tools write it.
`matrix_computation` fills a matrix while a model reads chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

MOST_TOKENS = 16_384
"""At most this many tokens are read: the mean squares of the columns settle long before."""

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass
class Matrix:
    """Sums over all inputs so far, by the names of the weights.

    Attributes:
        sums: sums of squared inputs, fp64 ``[matrices, columns]``; a weight of experts consists of several matrices.
        counts: number of inputs of each matrix, int64 ``[matrices]``.
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, matrices: int, which: np.ndarray, inputs: np.ndarray) -> None:
        """Add inputs.

        Args:
            name: of the weight.
            matrices: how many matrices the weight consists of.
            which: the matrix of each input, ``[inputs]``.
            inputs: ``[inputs, columns]``.
        """
        import numpy as np

        if name not in self.sums:
            self.sums[name] = np.zeros((matrices, inputs.shape[1]))
            self.counts[name] = np.zeros(matrices, np.int64)
        squares = np.square(inputs, dtype=np.float64)
        for matrix in np.unique(which):
            self.sums[name][matrix] += squares[which == matrix].sum(axis=0)
        self.counts[name] += np.bincount(which, minlength=matrices)

    def write(self, path: Path, chats: int) -> None:
        """Write the matrix as llama.cpp's tools do.

        Raises:
            ArtifactError: it is empty, or a number is not finite.
        """
        import gguf
        import numpy as np

        if not self.sums or not all(np.isfinite(sums).all() for sums in self.sums.values()):
            raise ArtifactError("the model computes nothing finite with the training chats: no importance matrix")
        longest = int(max(counts.max() for counts in self.counts.values()))
        writer = gguf.GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["the training chats"])
        writer.add_uint32("imatrix.chunk_count", chats)
        writer.add_uint32("imatrix.chunk_size", max(1, longest // chats))
        for name in sorted(self.sums):
            writer.add_tensor(f"{name}{_SUMS}", self.sums[name].astype(np.float32))
            writer.add_tensor(f"{name}{_COUNTS}", self.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the mean squares by the names of weights: fp32 ``[matrices * columns]``.

    An expert that no token reached gets ones: all its columns count alike.

    Raises:
        ArtifactError: the file is not an importance matrix.
    """
    import gguf
    import numpy as np

    try:
        tensors = {str(tensor.name): np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
        means = {}
        for name, sums in tensors.items():
            if name.endswith(_SUMS):
                weight = name.removesuffix(_SUMS)
                counts = tensors[weight + _COUNTS].reshape(-1, 1)
                mean = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
                means[weight] = np.ascontiguousarray(mean.reshape(-1), np.float32)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path}: not an importance matrix: {error}") from None
    if not all(np.isfinite(mean).all() for mean in means.values()):
        raise ArtifactError(f"{path}: not an importance matrix: a number is not finite")
    if not means:
        raise ArtifactError(f"{path}: not an importance matrix: it has no sums")
    return means


def chosen_sequences(offsets: Sequence[int]) -> list[int]:
    """Choose sequences evenly, about `MOST_TOKENS` tokens in all, and at least one.

    Args:
        offsets: position of each sequence's first token in the token array, and the total.
    """
    sequences, total = len(offsets) - 1, int(offsets[-1])
    count = max(1, min(sequences, sequences * MOST_TOKENS // max(1, total)))
    return [number * sequences // count for number in range(count)]


def tokens_read(tokens: int, chats: int) -> int:
    """Estimate how many tokens are read, given all tokens and the number of chats."""
    return min(tokens, max(MOST_TOKENS, tokens // max(1, chats)))

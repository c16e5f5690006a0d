"""An importance matrix: how large the inputs of each weight matrix are, column by column, while a model reads chats.

``python -m … GGUF TOKENS TARGET`` reads the prepared chats in TOKENS by the unquantized GGUF and writes the matrix, in
the GGUF form of llama.cpp's own tools. A process of its own, because the library may abort. What the library computes
is looked at while it computes (its callback for evaluations), so that names and the order of columns are the GGUF's.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError, KolotuneError
from kolotune.llamacpp import ggml
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.runners.watchdog import end_with_parent

if TYPE_CHECKING:
    import numpy as np

MOST_TOKENS = 16_384
"""So many tokens are read, or all that there are: the mean squares of columns settle long before."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LAYERS = "blk."  # llama.cpp's own tools leave out embedding and head too: these lose by a matrix
_F32 = 0


@dataclass
class Matrix:
    """What was seen of each weight matrix.

    Attributes:
        sums: squares of the inputs, summed: fp64 ``[matrices, columns]``; experts are so many matrices.
        counts: inputs that each of the matrices had: int64 ``[matrices]``.
    """

    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, matrices: int, which: np.ndarray, inputs: np.ndarray) -> None:
        """Adds inputs.

        Args:
            name: of the weight.
            matrices: how many it consists of.
            which: the matrix of each input, ``[inputs]``.
            inputs: ``[inputs, columns]``.
        """
        import numpy as np

        if name not in self.sums:
            self.sums[name] = np.zeros((matrices, inputs.shape[1]))
            self.counts[name] = np.zeros(matrices, np.int64)
        squares = np.square(inputs, dtype=np.float64)
        for each in np.unique(which):
            self.sums[name][each] += squares[which == each].sum(axis=0)
        self.counts[name] += np.bincount(which, minlength=matrices)

    def write(self, path: Path, chats: int) -> None:
        """Writes the matrix as llama.cpp's tools do.

        Raises:
            ArtifactError: there is nothing in it, or a number is not finite.
        """
        import gguf
        import numpy as np

        if not self.sums or not all(np.isfinite(each).all() for each in self.sums.values()):
            raise ArtifactError("the model computes nothing finite with the training chats: no importance matrix")
        writer = gguf.GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["the training chats"])
        writer.add_uint32("imatrix.chunk_count", chats)
        writer.add_uint32("imatrix.chunk_size", max(1, int(max(each.max() for each in self.counts.values())) // chats))
        for name in sorted(self.sums):
            writer.add_tensor(f"{name}{_SUMS}", self.sums[name].astype(np.float32))
            writer.add_tensor(f"{name}{_COUNTS}", self.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path) -> dict[str, np.ndarray]:
    """The mean squares in a matrix's file, by the names of weights: fp32 ``[matrices * columns]``.

    An expert that no token came to gets ones: all of its columns count alike.

    Raises:
        ArtifactError: it is none.
    """
    import gguf
    import numpy as np

    try:
        tensors = {str(each.name): np.array(each.data) for each in gguf.GGUFReader(path).tensors}
        found = {}
        for name, sums in tensors.items():
            if name.endswith(_SUMS):
                weight = name.removesuffix(_SUMS)
                counts = tensors[weight + _COUNTS].reshape(-1, 1)
                means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
                found[weight] = np.ascontiguousarray(means.reshape(-1), np.float32)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ArtifactError(f"{path}: is no importance matrix: {error}") from None
    if not found:
        raise ArtifactError(f"{path}: is no importance matrix: it has no sums")
    return found


def as_parameter(matrix: Mapping[str, np.ndarray]) -> Any:
    """The matrix as llama.cpp's quantizer takes it: an array that ends with an entry without a name.

    The array points into `matrix`, which has to live as long as it.
    """
    import llama_cpp

    kind: Any = llama_cpp.llama_model_imatrix_data
    numbers = ctypes.POINTER(ctypes.c_float)
    entries = [kind(name.encode(), each.ctypes.data_as(numbers), each.size) for name, each in matrix.items()]
    return (kind * (len(entries) + 1))(*entries, kind(None, None, 0))


class Watcher:
    """Sees what goes into each weight matrix of the layers; `seen` is llama.cpp's callback.

    Attributes:
        matrix: what was seen.
        problem: what went wrong in the callback, which can't raise.
    """

    def __init__(self) -> None:
        self.matrix = Matrix()
        self.problem: Exception | None = None

    def seen(self, address: int, asked: bool, _: Any) -> bool:
        """Asked, whether this tensor is wanted; otherwise, takes it. False then ends the computation."""
        try:
            tensor = ggml.tensor_at(address)
            kind = ggml.library().ggml_op_name(tensor.op)
            if kind not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return not asked
            weight, inputs = tensor.src[0].contents, tensor.src[1].contents
            name = weight.name.decode("utf-8", errors="replace")
            name = name.split("#")[1] if name.count("#") >= 2 else name  # a copy on another device is "CPU#name#0"
            if not name.startswith(_LAYERS) or inputs.type != _F32:
                return not asked
            if not asked:
                self._take(name, weight, inputs, tensor.src[2].contents if kind == b"MUL_MAT_ID" else None)
            return True
        except Exception as error:
            self.problem = error
            return False

    def _take(self, name: str, weight: ggml.Tensor, inputs: ggml.Tensor, experts: ggml.Tensor | None) -> None:
        import numpy as np

        rows = ggml.values(inputs, np.float32)
        matrices = weight.ne[2] * weight.ne[3]
        if experts is None:
            outer, middle, count, columns = rows.shape
            of_each = (np.arange(outer) % weight.ne[3])[:, None] * weight.ne[2] + np.arange(middle) % weight.ne[2]
            self.matrix.add(name, matrices, np.repeat(of_each.reshape(-1), count), rows.reshape(-1, columns))
            return
        chosen = ggml.values(experts, np.int32)[0, 0]  # [tokens, experts of a token]
        slots = np.arange(chosen.shape[1]) % rows.shape[2]
        self.matrix.add(name, matrices, chosen.reshape(-1), rows[0][:, slots].reshape(-1, rows.shape[3]))


def chosen_chats(offsets: Sequence[int]) -> list[int]:
    """Chats evenly from all of them, as many as have `MOST_TOKENS` together, and one at least.

    Args:
        offsets: where each chat begins in the row of tokens, and the end.
    """
    chats, total = len(offsets) - 1, int(offsets[-1])
    wanted = max(1, min(chats, chats * MOST_TOKENS // max(1, total)))
    return [number * chats // wanted for number in range(wanted)]


def tokens_read(tokens: int, chats: int) -> int:
    """About how many tokens are read of so many in so many chats."""
    return min(tokens, max(MOST_TOKENS, tokens // max(1, chats)))


def compute(source: Path, tokens: Path, target: Path) -> None:
    """Has a GGUF read chats, and writes what was seen.

    Raises:
        ArtifactError: the GGUF can't compute them.
    """
    from safetensors import safe_open

    with safe_open(tokens, framework="numpy") as file:
        offsets = file.get_tensor("offsets").tolist()
        ids = file.get_slice("ids")
        chats = [ids[offsets[each] : offsets[each + 1]].tolist() for each in chosen_chats(offsets)]
    watcher = Watcher()
    model = ExactGguf(source, max(map(len, chats)), watcher.seen)
    try:
        for chat in chats:
            model.read(chat)
    except ArtifactError:
        if watcher.problem is None:
            raise
    finally:
        model.close()
    if watcher.problem is not None:
        raise watcher.problem
    watcher.matrix.write(target, len(chats))


def main(arguments: list[str]) -> int:
    """Computes; 0 when the matrix is written."""
    end_with_parent()
    source, tokens, target = map(Path, arguments)
    try:
        compute(source, tokens, target)
    except KolotuneError as error:
        traceback.print_exc()
        print(error.cause, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compute an importance matrix: ``python -m … GGUF TOKENS TARGET``.

The unquantized GGUF reads prepared chats from TOKENS, and the matrix is written to TARGET. llama.cpp's evaluation
callback shows each operation's tensors, so names and the order of columns are the GGUF's own. A separate process,
because the library may abort.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError
from kolotune.llamacpp import ggml
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.runners import child_process

from .importance_matrix import Matrix, chosen_sequences

if TYPE_CHECKING:
    import numpy as np

_LAYERS = "blk."  # like llama.cpp's own tools: embedding and head lose by a matrix
_F32 = 0


class MatrixCollector:
    """Collects what goes into each weight matrix of the layers.

    Attributes:
        matrix: what was collected.
        problem: what went wrong in the callback, which can't raise.
    """

    def __init__(self) -> None:
        self.matrix = Matrix()
        self.problem: Exception | None = None

    def on_tensor(self, address: int, is_question: bool, _: object) -> bool:
        """Answer llama.cpp's evaluation callback.

        It comes twice for a tensor: first as a question whether its values are needed, then with the values. Returning
        False the second time ends the computation.
        """
        try:
            tensor = ggml.tensor_at(address)
            operation = ggml.library().ggml_op_name(tensor.op)
            if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return not is_question
            weight, inputs = tensor.src[0].contents, tensor.src[1].contents
            name = weight.name.decode("utf-8", errors="replace")
            name = name.split("#")[1] if name.count("#") >= 2 else name  # a copy on another device is "CPU#name#0"
            if not name.startswith(_LAYERS) or inputs.type != _F32:
                return not is_question
            if not is_question:
                self._collect(name, weight, inputs, tensor.src[2].contents if operation == b"MUL_MAT_ID" else None)
            return True
        except Exception as error:
            self.problem = error
            return False

    def _collect(self, name: str, weight: ggml.Tensor, inputs: ggml.Tensor, experts: ggml.Tensor | None) -> None:
        import numpy as np

        values: np.ndarray = ggml.values(inputs, np.float32)
        matrices = weight.ne[2] * weight.ne[3]
        if experts is None:
            outer, middle, count, columns = values.shape
            which = (np.arange(outer) % weight.ne[3])[:, None] * weight.ne[2] + np.arange(middle) % weight.ne[2]
            self.matrix.add(name, matrices, np.repeat(which.reshape(-1), count), values.reshape(-1, columns))
            return
        chosen = ggml.values(experts, np.int32)[0, 0]  # [tokens, experts of a token]
        slots = np.arange(chosen.shape[1]) % values.shape[2]
        self.matrix.add(name, matrices, chosen.reshape(-1), values[0][:, slots].reshape(-1, values.shape[3]))


def compute(source: Path, tokens: Path, target: Path) -> None:
    """Run chats through a GGUF and write the matrix.

    Raises:
        ArtifactError: the GGUF can't compute them.
    """
    from safetensors import safe_open

    with safe_open(tokens, framework="numpy") as file:
        offsets = file.get_tensor("offsets").tolist()
        ids = file.get_slice("ids")
        sequences = [ids[offsets[number] : offsets[number + 1]].tolist() for number in chosen_sequences(offsets)]
    collector = MatrixCollector()
    model = ExactGguf(source, max(map(len, sequences)), collector.on_tensor)
    try:
        for sequence in sequences:
            model.read(sequence)
    except ArtifactError:
        if collector.problem is None:
            raise
    finally:
        model.close()
    if collector.problem is not None:
        raise collector.problem
    collector.matrix.write(target, len(sequences))


def main(arguments: list[str]) -> int:
    """Compute; return the exit code."""
    source, tokens, target = map(Path, arguments)
    return child_process.carry_out(lambda: compute(source, tokens, target))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

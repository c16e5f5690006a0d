"""Measure how far a quantized GGUF is from the unquantized one, on prepared chats.

``python -m … GGUF QUANTIZED TOKENS``: a separate process, because llama.cpp may abort.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.runners import child_process

MOST_TOKENS = 2048


def chat_divergence(source: Path, target: Path, tokens: Path) -> float:
    """Return the mean KL divergence at the answers' tokens, in nats, on at most some `MOST_TOKENS` tokens of chats.

    Raises:
        ArtifactError: a file can't be computed.
    """
    import numpy as np

    chats = _chats(tokens)
    longest = max(len(ids) for ids, _ in chats)
    before, after = ExactGguf(source, longest), ExactGguf(target, longest)
    total = count = 0.0
    try:
        for ids, positions in chats:
            wide = before.log_probabilities(ids, positions).astype(np.float64)
            total += float((np.exp(wide) * (wide - after.log_probabilities(ids, positions))).sum())
            count += len(positions)
    finally:
        before.close()
        after.close()
    return total / count


def _chats(tokens: Path) -> list[tuple[list[int], Sequence[int]]]:
    from safetensors import safe_open

    read = 0
    chats: list[tuple[list[int], Sequence[int]]] = []
    with safe_open(tokens, framework="numpy") as file:
        ids, labelled = file.get_slice("ids"), file.get_slice("labelled")
        for start, end in itertools.pairwise(file.get_tensor("offsets").tolist()):
            counted = labelled[start:end].astype(bool)
            positions = [at for at in range(end - start - 1) if counted[at + 1]]
            if positions:
                chats.append((ids[start:end].tolist(), positions))
                read += end - start
            if read >= MOST_TOKENS:
                break
    return chats


def main(arguments: list[str]) -> int:
    """Report the divergence; return the exit code."""
    source, target, tokens = map(Path, arguments)
    return child_process.carry_out(lambda: child_process.emit("divergence", kl=chat_divergence(source, target, tokens)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tokens by which quantization learns what goes into each matrix.

Some are the run's training chats, which the model is tuned for. The rest is a text of prose, dialogue and code that
ships with kolotune, so that what the chats never ask keeps working, too.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from kolotune.foundation.errors import ArtifactError
from kolotune.run_folder.layout import TRAIN_TOKENS

from .importance_matrix import chosen_sequences

ROW = 256
"""Tokens of a row; rows are read side by side."""
_CHAT_ROWS, _TEXT_ROWS = 32, 18
_COMPENSATION_ROWS = 14, 10  # of those; see docs/quantization.md
MOST_TOKENS = ROW * sum(_COMPENSATION_ROWS)
"""Of error-compensated quantization."""
_TEXT = "calibration_text.txt"


def calibration_rows(prepared: Path, tokenizer: Path) -> list[list[int]]:
    """Return rows of the same length: training chats end to end, then the text.

    Args:
        prepared: the folder with the prepared chats.
        tokenizer: the folder with the run's tokenizer.

    Raises:
        ArtifactError: the chats are missing.
    """
    chats, text = _chats_and_text(prepared, tokenizer)
    return [*chats, *text]


def compensation_rows(prepared: Path, tokenizer: Path) -> list[list[int]]:
    """Return some of the rows, at equal distances, which compensating takes; see `calibration_rows`."""
    parts = zip(_chats_and_text(prepared, tokenizer), _COMPENSATION_ROWS, strict=True)
    return [row for part, most in parts for row in _at_equal_distances(part, most)]


def _chats_and_text(prepared: Path, tokenizer: Path) -> tuple[list[list[int]], list[list[int]]]:
    from safetensors import safe_open
    from tokenizers import Tokenizer

    tokens = prepared / TRAIN_TOKENS
    if not tokens.is_file():
        raise ArtifactError(
            f"{tokens}: is missing; error-compensated quantization reads the training chats",
            "Run `kolotune prepare` again, or use `--quantizer ggml`.",
        )
    with safe_open(tokens, framework="numpy") as file:
        offsets = file.get_tensor("offsets").tolist()
        ids = file.get_slice("ids")
        chats = [ids[offsets[number] : offsets[number + 1]].tolist() for number in chosen_sequences(offsets)]
    text = importlib.resources.files(__package__).joinpath(_TEXT).read_text(encoding="utf-8")
    encoded = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    stream = [token for chat in chats for token in chat]
    return _rows(stream, _CHAT_ROWS), _rows(encoded, _TEXT_ROWS)


def _at_equal_distances(rows: list[list[int]], most: int) -> list[list[int]]:
    count = min(most, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def _rows(tokens: list[int], most: int) -> list[list[int]]:
    """Cut tokens into whole rows; few tokens are repeated until they fill one."""
    if not tokens:
        return []
    filled = tokens * -(-ROW // len(tokens)) if len(tokens) < ROW else tokens
    return [filled[start : start + ROW] for start in range(0, len(filled) - ROW + 1, ROW)][:most]

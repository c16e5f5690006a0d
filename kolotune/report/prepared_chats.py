"""Lengths of the prepared chats, and one chat as the model saw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolotune.engines.chat_sequences import chat_lengths
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS, RunFolder

if TYPE_CHECKING:
    import numpy as np

_LONGEST_SHOWN = 600  # tokens


@dataclass(frozen=True)
class ChatLengths:
    """Tokens and answer tokens of each chat of a part, as int64 ``[chats]``; see `chat_lengths`."""

    name: str
    tokens: np.ndarray
    answers: np.ndarray


def read_lengths(folder: RunFolder) -> list[ChatLengths]:
    """Return the lengths of the training chats and the held-out chats; parts without chats are left out."""
    import numpy as np
    from safetensors import safe_open

    parts = []
    for name, file in (("training", folder.prepared / TRAIN_TOKENS), ("held out", folder.prepared / HELD_OUT_TOKENS)):
        if file.is_file():
            with safe_open(file, framework="numpy") as tensors:
                offsets = tensors.get_tensor("offsets")
                chats = tensors.get_tensor("chats") if "chats" in tensors.keys() else np.arange(len(offsets))  # noqa: SIM118 - it is no dict
                if len(chats) > 1:
                    ids, labelled = tensors.get_tensor("ids"), tensors.get_tensor("labelled")
                    answers = np.add.reduceat(labelled, offsets[chats[:-1]], dtype=np.int64)
                    parts.append(ChatLengths(name, chat_lengths(ids, labelled, offsets, chats), answers))
    return parts


def read_sample_chat(folder: RunFolder) -> list[tuple[str, bool]]:
    """Return the first training chat that is short enough, as (text, whether the loss counts it)."""
    import numpy as np
    from safetensors import safe_open
    from tokenizers import Tokenizer

    file, tokens = folder.tokenizer / "tokenizer.json", folder.prepared / TRAIN_TOKENS
    if not file.is_file() or not tokens.is_file():
        return []
    with safe_open(tokens, framework="numpy") as tensors:
        offsets = tensors.get_tensor("offsets")
        short = np.flatnonzero(np.diff(offsets) <= _LONGEST_SHOWN)
        if not len(short):
            return []
        span = slice(int(offsets[short[0]]), int(offsets[short[0] + 1]))
        ids, flags = tensors.get_slice("ids")[span].tolist(), tensors.get_slice("labelled")[span].tolist()
    tokenizer = Tokenizer.from_file(str(file))
    spans: list[tuple[list[int], bool]] = []
    for token, counted in zip(ids, map(bool, flags), strict=True):
        if not spans or spans[-1][1] != counted:
            spans.append(([], counted))
        spans[-1][0].append(token)
    return [(tokenizer.decode(span_ids, skip_special_tokens=False), counted) for span_ids, counted in spans]

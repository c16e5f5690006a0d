"""A Hugging Face tokenizer with its chat template, as torchtune 0.6.1 expects one. Runs in torchtune's environment.

torchtune has no such component, but accepts any dotted path, and this folder is on PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class ChatTokens:
    """ChatML: ``<|im_start|>role, newline, content<|im_end|>, newline``. A masked message has no labels.

    Args:
        path: the model folder.
        max_seq_len: longer chats are truncated.
    """

    def __init__(self, path: str, max_seq_len: int | None = None) -> None:
        self._encode = Tokenizer.from_file(str(Path(path, "tokenizer.json")))
        self.max_seq_len = max_seq_len
        self.eos_id = self._encode.token_to_id("<|im_end|>")
        self.pad_id = self.eos_id  # padding is masked by position, never by id

    def tokenize_messages(self, messages: list[Any]) -> tuple[list[int], list[bool]]:
        """Return the token ids, and whether each is masked."""
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            head = self._ids(f"<|im_start|>{message.role}\n")
            body = self._ids(f"{message.text_content}<|im_end|>")
            tail = self._ids("\n")
            ids += head + body + tail
            mask += [True] * len(head) + [message.masked] * len(body) + [True] * len(tail)
        return ids[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace a sample's messages by tokens and mask."""
        del inference
        sample["tokens"], sample["mask"] = self.tokenize_messages(sample.pop("messages"))
        return sample

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode.encode(text, add_special_tokens=False).ids
        return ids

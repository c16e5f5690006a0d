"""The bytes that tokens stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class TokenBytes:
    """The bytes that each token stands for, where the tokenizer's decoder does no more than put them together."""

    def __init__(self, backend: Any) -> None:
        import numpy as np

        self._backend = backend
        self._known: dict[int, bytes] = {}
        self._added: dict[int, bytes] = {}
        self._letters: dict[str, int] | None = None
        self._lengths = np.zeros(0, np.int64)
        if writes_bytes(backend):
            self._added = {index: str(token).encode() for index, token in backend.get_added_tokens_decoder().items()}
            self._letters = byte_letters()

    def of(self, ids: list[int]) -> list[bytes] | None:
        """The bytes of each token; None where this tokenizer has none."""
        known = self._known
        try:
            return [known[index] for index in ids]
        except KeyError:
            pass
        if self._letters is None:
            return None
        for index in ids:
            if index in known:
                continue
            letters = self._backend.id_to_token(index)
            if index in self._added:
                known[index] = self._added[index]
            elif letters is not None and all(letter in self._letters for letter in letters):
                known[index] = bytes(self._letters[letter] for letter in letters)
            else:
                return None
        return [known[index] for index in ids]

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """How many bytes each token is, for the tokens of proven texts; one or more."""
        import numpy as np

        if (size := int(ids.max()) + 1) > len(self._lengths):
            self._lengths = np.pad(self._lengths, (0, size - len(self._lengths)))
        found: np.ndarray = self._lengths[ids]
        if not found.all():
            unknown = np.unique(ids[found == 0])
            self._lengths[unknown] = [len(each) for each in self.of(unknown.tolist()) or ()]
            found = self._lengths[ids]
        return found

    def changes(self, text: str) -> bool:
        """Whether the tokenizer changes a text before it encodes it."""
        normalizer = self._backend.normalizer
        return normalizer is not None and normalizer.normalize_str(text) != text


def writes_bytes(backend: Any) -> bool:
    """Whether a tokenizer's decoder puts the bytes of the tokens together, and does no more."""
    return repr(backend.decoder).startswith("ByteLevel(")


def byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(other)}

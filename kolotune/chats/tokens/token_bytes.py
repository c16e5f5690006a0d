"""The bytes of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer


class TokenBytes:
    """The bytes of each token, if the tokenizer's decoder only joins them."""

    def __init__(self, backend: Tokenizer) -> None:
        import numpy as np

        self._backend = backend
        self._known: dict[int, bytes] = {}
        self._added: dict[int, bytes] = {}
        self._letters: dict[str, int] | None = None
        self._lengths = np.zeros(0, np.int64)
        if decodes_bytes(backend):
            self._added = {index: str(token).encode() for index, token in backend.get_added_tokens_decoder().items()}
            self._letters = byte_letters()

    def of(self, ids: list[int]) -> list[bytes] | None:
        """Return the bytes of each token; None if this tokenizer does not work on bytes."""
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
        """Return the number of bytes of each token of a proven text; at least 1."""
        import numpy as np

        if (size := int(ids.max()) + 1) > len(self._lengths):
            self._lengths = np.pad(self._lengths, (0, size - len(self._lengths)))
        lengths: np.ndarray = self._lengths[ids]
        if not lengths.all():
            unknown = np.unique(ids[lengths == 0])
            self._lengths[unknown] = [len(token) for token in self.of(unknown.tolist()) or ()]
            lengths = self._lengths[ids]
        return lengths

    def changes(self, text: str) -> bool:
        """Whether the tokenizer changes a text before it encodes it."""
        normalizer = self._backend.normalizer
        return normalizer is not None and normalizer.normalize_str(text) != text


def decodes_bytes(backend: Tokenizer) -> bool:
    """Whether the tokenizer's decoder joins the bytes of the tokens and does nothing else."""
    return repr(backend.decoder).startswith("ByteLevel(")


def byte_letters() -> dict[str, int]:
    """Return the letter that byte-level tokenizers write for each byte: the byte itself if visible, else 256 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(hidden)}

"""What llama.cpp does to a text before it looks for tokens, in place of what the base's tokenizer does.

llama.cpp has one way for each kind of vocabulary, whatever a tokenizer's file or class says:

- Byte-level BPE is encoded as it is written. The tokenizers of Qwen 2, Command-R or GPT-NeoX compose letters first
  (NFC).
- SentencePiece puts a space before each text that follows a special token. Newer tokenizers do so only at the beginning
  of all, and never before a space that is there already. It joins letters by the scores in tokenizer.model.

Chats are trained as they are served, so a tokenizer is changed as it is loaded. Whether that is all that differs is
asked of llama.cpp itself, before training (`fidelity.prompt_gate`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

from .sentencepiece_model import merges_by_score
from .token_bytes import decodes_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

_UNICODE_FORMS = frozenset(["NFC", "NFD", "NFKC", "NFKD"])


class ServedChange(StrEnum):
    """What was changed in a tokenizer, so that it reads texts as llama.cpp does."""

    AS_WRITTEN = "as-written"
    MORE_SPACES = "more-spaces"
    SCORED_MERGES = "scored-merges"


@dataclass(frozen=True)
class Replaced:
    """What a tokenizer did with texts before it was changed. Can be sent to another process.

    Attributes:
        change: The change.
        normalizer: It changed letters; None where it did not.
    """

    change: ServedChange
    normalizer: Normalizer | None = None

    def affects(self, texts: Iterable[str]) -> bool:
        """Whether the tokens of one of the texts may be others than before the change."""
        if self.normalizer is None:
            return True
        changed = self.normalizer.normalize_str
        return any([not text.isascii() and changed(text) != text for text in texts])


class _Describable(Protocol):
    """A part of a tokenizer's backend, which pickles as JSON."""

    def __getstate__(self) -> bytes: ...


def read_as_served(backend: Tokenizer, sentencepiece: Path) -> Replaced | None:
    """Make a tokenizer read texts as llama.cpp does; return what was replaced, None for nothing.

    Args:
        backend: The tokenizer, which is changed.
        sentencepiece: Its file of SentencePiece's, which need not exist.
    """
    if type(backend.model).__name__ != "BPE":
        return None
    if decodes_bytes(backend):
        own = backend.normalizer
        if not _is_unicode_form(described(own)):
            return None
        backend.normalizer = None
        return Replaced(ServedChange.AS_WRITTEN, own)
    more_spaces = _puts_more_spaces(backend)
    if _merges_by_score(backend, sentencepiece):
        return Replaced(ServedChange.SCORED_MERGES)
    return Replaced(ServedChange.MORE_SPACES) if more_spaces else None


def _puts_more_spaces(backend: Tokenizer) -> bool:
    """Make a tokenizer put a space after each special token; return whether it did not before."""
    match described(backend.pre_tokenizer):
        case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": "first" | "always", "split": False}:
            pass
        case _:
            return False
    if backend.normalizer is not None:
        return False
    from tokenizers import normalizers

    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    backend.pre_tokenizer = None
    return True


def _merges_by_score(backend: Tokenizer, sentencepiece: Path) -> bool:
    """Make a tokenizer merge in the order of the scores in a file; return whether it did not before."""
    model = backend.model
    merges = merges_by_score(sentencepiece, lambda: cast("list[list[str]]", described(model)["merges"]))
    if merges is None:
        return False
    model.__setstate__(json.dumps({**described(model), "merges": merges}).encode())
    backend.model = model
    return True


def described(part: _Describable | None) -> JsonObject:
    """Return a part of a tokenizer as its file would have it; nothing where that is not known."""
    try:
        return typed_storage.parse_object(part.__getstate__()) if part is not None else {}
    except typed_storage.StorageError:
        return {}


def _is_unicode_form(normalizer: JsonObject) -> bool:
    match normalizer:
        case {"type": "Sequence", "normalizers": [*steps]}:
            return bool(steps) and all(isinstance(step, dict) and step.get("type") in _UNICODE_FORMS for step in steps)
        case _:
            return normalizer.get("type") in _UNICODE_FORMS

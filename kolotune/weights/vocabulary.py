"""Embedding and output head of a base model: their names, and whether an adapter leaves them tied."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError

from .adapter_config import AdapterConfig
from .model_config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(.+\.)?(lm_head|embed_out)\.weight$")
_HEAD_NAME = "lm_head.weight"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Embedding and head of a base model.

    Attributes:
        embedding: the weight's name; "" if it is not known.
        head: the weight's name, or the name that it would have.
        is_stored_twice: whether the head is stored, too.
        is_tied: whether the head is the embedding, stored twice or not.
    """

    embedding: str
    head: str
    is_stored_twice: bool
    is_tied: bool

    def is_untied_by(self, config: AdapterConfig, updated: Collection[str], replaced: Mapping[str, np.ndarray]) -> bool:
        """Whether an adapter makes tied embedding and head differ: PEFT changes only the one that it wraps.

        Args:
            config: of the adapter.
            updated: names of the weights with a low-rank update.
            replaced: weights in the adapter. One that PEFT did not wrap is both, since it was tied when it was saved.
        """
        if not self.is_tied:
            return False
        if self.head in updated:
            return True
        if self.head in replaced and not self._is_same(replaced):
            return True
        if config.ties_weights:
            return False
        saves_embedding = any(f".{self.embedding}".endswith(f".{name}.weight") for name in config.saved_modules)
        return self.embedding in updated or (
            self.embedding in replaced and saves_embedding and self.head not in replaced
        )

    def _is_same(self, replaced: Mapping[str, np.ndarray]) -> bool:
        import numpy as np

        return self.embedding in replaced and np.array_equal(replaced[self.head], replaced[self.embedding])


def find_vocabulary(names: Collection[str], config: ModelConfig) -> Vocabulary:
    """Return the embedding and head among the names of a base model's weights."""
    embedding = next((name for name in names if _EMBEDDING.fullmatch(name)), "")
    head = next((name for name in names if _HEAD.fullmatch(name)), "")
    return Vocabulary(embedding, head or _HEAD_NAME, bool(head), not head or config.ties_embeddings)


def check_sizes(rows: Mapping[str, int], vocabulary: Vocabulary) -> None:
    """Check that embedding and head of a merged model have as many rows.

    Args:
        rows: of the merged model's weights, by name.
        vocabulary: the names.

    Raises:
        ArtifactError: they differ.
    """
    sizes = [rows[name] for name in (vocabulary.embedding, vocabulary.head) if name in rows]
    if len(set(sizes)) > 1:
        raise ArtifactError(
            f"the adapter was trained with another vocabulary, but has not both of {vocabulary.embedding} "
            f"({sizes[0]} tokens) and {vocabulary.head} ({sizes[1]})",
            "Save it again with save_pretrained(…, save_embedding_layers=True).",
        )


@dataclass(frozen=True)
class _Token:
    id: int


@dataclass(frozen=True)
class _Tokens:
    vocab: dict[str, int] | list[object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tokenizer:
    model: _Tokens
    added_tokens: list[_Token] = field(default_factory=list)


def token_count(folder: Path) -> int:
    """Return the number of ids of the tokenizer in a folder; 0 when there is none that can be read."""
    try:
        tokenizer = typed_storage.read(_Tokenizer, folder / _TOKENIZER)
    except (OSError, typed_storage.StorageError):
        return 0
    vocabulary = tokenizer.model.vocab
    last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max([last, *(token.id for token in tokenizer.added_tokens)]) + 1

"""New tokens in a tokenizer: what they are called, which ids they get, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, ModelError
from kolotune.foundation.typed_storage import JsonObject

from .tokenizer import load_tokenizer

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class NewToken:
    """A token that the base's tokenizer lacks.

    Attributes:
        text: its text.
        is_special: whether only templates write it; plain ones are found in any text, by servers, too.
    """

    text: str
    is_special: bool


@dataclass(frozen=True)
class ExtendedTokenizer:
    """A tokenizer with new tokens.

    Attributes:
        first: the id of the first new token; the others follow.
        parts: of each new token, the ids that its text had before.
        files: texts of the changed files, by name.
    """

    first: int
    parts: tuple[tuple[int, ...], ...]
    files: dict[str, str]


def extend_tokenizer(base: Path, tokens: Sequence[NewToken]) -> ExtendedTokenizer:
    """Add tokens to the tokenizer of a model folder, whose files stay as they are.

    Raises:
        ConfigError: a token is empty, given twice, or in the vocabulary already.
        ModelError: the tokenizer can't be read.
    """
    tokenizer = load_tokenizer(base)
    vocabulary = tokenizer.get_vocab()
    texts = [token.text for token in tokens]
    for token in tokens:
        option = "new-special-token" if token.is_special else "new-token"
        if not token.text.strip():
            raise ConfigError(f"{option}: a token needs a text", "Give the text of the token.")
        if texts.count(token.text) > 1:
            raise ConfigError(f"{option} {token.text!r}: it is given twice", "Give each token once.")
        if token.text in vocabulary:
            raise ConfigError(
                f"{option} {token.text!r}: the base's vocabulary has it, with the id {vocabulary[token.text]}",
                f"Leave out --{option} {token.text}: the token is used already.",
            )
    first = max(vocabulary.values()) + 1
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    added = {str(first + at): _entry(token) for at, token in enumerate(tokens)}
    return ExtendedTokenizer(first, tuple(map(tuple, ids)), _files(base, added))


def _entry(token: NewToken) -> JsonObject:
    return {
        "content": token.text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": token.is_special,
    }  # fmt: skip


def _files(base: Path, added: dict[str, JsonObject]) -> dict[str, str]:
    try:
        tokenizer = typed_storage.read_object(base / _TOKENIZER)
        config = typed_storage.read_object(base / _CONFIG) if (base / _CONFIG).is_file() else {}
    except (OSError, typed_storage.StorageError) as error:
        raise ModelError(f"{base}: its tokenizer can't be extended: {error}", "Use another base model.") from None
    known = tokenizer.get("added_tokens")
    tokenizer["added_tokens"] = [
        *(known if isinstance(known, list) else []),
        *({"id": int(number), **entry} for number, entry in added.items()),
    ]
    decoder = config.get("added_tokens_decoder")
    config["added_tokens_decoder"] = {**(decoder if isinstance(decoder, dict) else {}), **added}
    return {
        name: json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        for name, values in ((_TOKENIZER, tokenizer), (_CONFIG, config))
    }

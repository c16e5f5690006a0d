"""Names of models in Ollama."""

from __future__ import annotations

import re

from kolotune.foundation.errors import ConfigError

# As in Ollama's types/model/name.go: a part begins with a letter, digit or underscore; a host may be longer and have a
# port.
_HOST = r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349})"
_NAMESPACE = r"(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{0,79})"
_MODEL = r"(?P<model>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})"
_TAG = r"(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})"
_NAME = re.compile(f"(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_MODEL}(?::{_TAG})?")
_RULE = (
    "A name is [host/][namespace/]model[:tag]. Each part has 1 to 80 letters, digits, _, - and . (no . in a namespace) "
    "and begins with a letter, a digit or _."
)


def check_name(name: str) -> str:
    """Return `name` if Ollama accepts it as the name of a model.

    Raises:
        ConfigError: Ollama refuses it, or its tag has a special meaning.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(f"{name!r} can't be the name of a model in Ollama", _RULE)
    tag = (match["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        # Ollama sends requests for NAME:cloud to its own machines.
        raise ConfigError(f"{name}: in Ollama the tag {tag} says where a model runs", "Choose a different tag.")
    return name

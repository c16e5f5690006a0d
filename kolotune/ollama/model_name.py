"""Names of models as Ollama takes them."""

from __future__ import annotations

import re

from kolotune.foundation.errors import ConfigError

# Ollama's own rule: a part begins with a letter, digit or underscore; a host may be longer and have a port.
_HOST = r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349})"
_NAMESPACE = r"(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{0,79})"
_MODEL = r"(?P<model>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})"
_TAG = r"(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})"
_NAME = re.compile(f"(?:(?:{_HOST}/)?{_NAMESPACE}/)?{_MODEL}(?::{_TAG})?")
_RULE = (
    "A name is [host/][namespace/]model[:tag], each of 1 to 80 letters, digits, _, - and . (no . in a namespace), "
    "the first of them a letter, a digit or _."
)


def check_name(name: str) -> str:
    """`name`, if Ollama takes it for the name of a model.

    Raises:
        ConfigError: it doesn't, or it takes the tag for something else.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise ConfigError(f"{name!r} can't be the name of a model in Ollama", _RULE)
    tag = (found["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        # What is asked of NAME:cloud is sent to Ollama's own machines.
        raise ConfigError(f"{name}: Ollama reads the tag {tag} as the place where a model runs", "Choose another tag.")
    return name

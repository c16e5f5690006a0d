"""Texts that nobody may see, such as the hub token, and the environment variables that hold them."""

from __future__ import annotations

import re
from typing import NoReturn

STARS = "********"
HUB_TOKEN = "HF_TOKEN"
"""The environment variable that gives a process the hub's token."""
HUB_TOKEN_VARIABLES = (HUB_TOKEN, "HUGGING_FACE_HUB_TOKEN")
"""All environment variables in which the hub's client looks for its token."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|PRIVATE_?KEY", re.IGNORECASE)


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that nobody else should see its value."""
    return _SECRET_NAME.search(name) is not None


class Secret:
    """A text that prints as stars; false if it is empty.

    It can be neither pickled nor written as JSON, so that it cannot reach a file or another process by mistake.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text, for the one call that sends it."""
        return self._text

    def masked(self, text: str) -> str:
        """Return `text` with stars instead of the secret."""
        return text.replace(self._text, STARS) if self._text else text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return STARS

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")

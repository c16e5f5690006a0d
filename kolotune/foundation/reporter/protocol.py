"""What the rest of kolotune calls to speak to the user."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """A running count."""

    def update(self, done: int, total: int, **fields: object) -> None:
        """Show that `done` of `total` are done, with `fields` beside the count."""


class Reporter(Protocol):
    """Messages to the user, by kind.

    In a terminal errors are red, successes green, and work in progress is yellow. Every reporter strips control
    characters, so that text from files and other programs cannot steer the terminal.
    """

    def doing(self, text: str) -> None:
        """Report what starts now."""

    def success(self, text: str) -> None:
        """Report that something finished."""

    def note(self, text: str) -> None:
        """Report something worth knowing."""

    def warning(self, text: str) -> None:
        """Report something that the user should look at."""

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        """Report what went wrong and what to do; `exit_code` is for programs."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show rows of text."""

    def result(self, text: str, **fields: object) -> None:
        """Print the answer to the user's question, undecorated; `fields` are for programs."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Show a running count while the block runs."""

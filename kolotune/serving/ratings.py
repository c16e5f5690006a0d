"""Ratings of answers, and better answers, kept as lines that a preference objective learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kolotune.foundation.errors import ConfigError
from kolotune.foundation.typed_storage import JsonObject

GOOD, BAD, BETTER = "/good", "/bad", "/better"
"""What is typed after an answer; a better answer follows the last of them."""


def line_of(typed: str, turns: Sequence[JsonObject]) -> JsonObject | None:
    """Return the record of what was typed about the last answer; None if it says nothing about one.

    Args:
        typed: A line of the user's.
        turns: The chat so far, as messages; the last is the answer.

    Raises:
        ConfigError: There is no answer yet, or no better one was typed.
    """
    word, _, text = typed.strip().partition(" ")
    if word not in (GOOD, BAD, BETTER) or (text.strip() and word != BETTER):
        return None
    if not turns or turns[-1].get("role") != "assistant":
        raise ConfigError("there is no answer to rate yet", "Ask something first.")
    if word != BETTER:
        return {"messages": list(turns), "label": word == GOOD}
    if not text.strip():
        raise ConfigError("no better answer was given", f"Type it behind the word: {BETTER} It is at noon.")
    return {
        "prompt": list(turns[:-1]),
        "chosen": [{"role": "assistant", "content": text.strip()}],
        "rejected": [turns[-1]],
    }


def keep(file: Path, record: JsonObject) -> None:
    """Append a record to a file of JSON lines.

    Raises:
        ConfigError: The file can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", newline="") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: can't be written: {error.strerror or error}", "Give another --ratings.") from None

"""Turns in an object with a key for each exchange, as MOSS has them: ``{"turn_1": {"Human": …, "MOSS": …}, …}``.

What is said has a mark before it and one behind it. What nobody says is "None".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .record_keys import canonical

_NUMBERED = re.compile(r"turn_(\d+)")
_MARKS = re.compile(r"\A\s*<\|[\w ]+\|>:?\s*|\s*<eo\w>\s*\Z")
_HUMAN, _ANSWER, _THOUGHT = "human", "moss", "inner_thoughts"


def are_numbered(value: object) -> bool:
    """Whether a value is an object of numbered exchanges."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all([_NUMBERED.fullmatch(canonical(str(key))) for key in value])
        and all([isinstance(exchange, Mapping) for exchange in value.values()])
    )


def numbered_turns(value: Mapping[str, Mapping[str, object]]) -> list[object]:
    """Return the turns of numbered exchanges in order; what is neither said nor thought stays a key of the answer."""
    turns: list[object] = []
    for key in sorted(value, key=lambda key: int(canonical(key).removeprefix("turn_"))):
        said = {canonical(name): _without_marks(text) for name, text in value[key].items()}
        turns.append({"role": "user", "content": said.pop(_HUMAN, None)})
        answer, thought = said.pop(_ANSWER, None), said.pop(_THOUGHT, None)
        turns.append({"role": "assistant", "content": answer, "thought": thought, **said})
    return turns


def _without_marks(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = _MARKS.sub("", value)
    return None if text == "None" else text

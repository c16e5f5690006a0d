"""Writes chats.jsonl from the texts in phrases.yaml; the same texts always give the same chats.

python examples/tools/make_chats.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
CALLS_OF_EACH = 50
"""Chats that start with a call, for each function."""
FOLLOW_UPS, THANKS, OTHER_QUESTIONS, OPENINGS = 10, 5, 8, 10
"""How many of them then have a second call, thanks, or a question that needs none, or open with a question that lacks
what the call needs. The others have one exchange."""
UNKNOWN = 3
"""How many of them have a result that is an error."""

Message = dict[str, Any]


def make_chats(phrases: dict[str, Any], functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the chats of the example in a shuffled order."""
    random_source = random.Random(0)
    no_calls = [pair for kind in ("greetings", "general", "refusals") for pair in phrases[kind]]
    chats = [_exchange(pair) for pair in no_calls]
    thanks, others = cycle(phrases["thanks"]), cycle(random_source.sample(no_calls, len(no_calls)))
    for name in ("weather", "tide", "ferry"):
        exchanges = Exchanges(name, phrases, random_source)
        chats += [exchanges.make("questions", unknown=number < UNKNOWN) for number in range(CALLS_OF_EACH - OPENINGS)]
        for chat in chats[-FOLLOW_UPS:]:
            chat += exchanges.make("follow_ups")
        for chat in chats[-FOLLOW_UPS - THANKS : -FOLLOW_UPS]:
            chat += _exchange(next(thanks))
        for chat in chats[-FOLLOW_UPS - THANKS - OTHER_QUESTIONS : -FOLLOW_UPS - THANKS]:
            chat += _exchange(next(others))
        chats += [exchanges.make_opened() for _ in range(OPENINGS)]
    random_source.shuffle(chats)
    return [{"messages": chat, "tools": functions} for chat in chats]


class Exchanges:
    """Questions that need one function, with its call, its result and the answer.

    Args:
        name: The function's key in the phrases.
        phrases: All phrases.
        random_source: Chooses places and results.
    """

    def __init__(self, name: str, phrases: dict[str, Any], random_source: random.Random) -> None:
        self._name, self._phrases, self._random = name, phrases[name], random_source
        self._unknown, self._all_places = phrases["unknown"], phrases["places"]
        self._places = self._shuffled(range(len(self._all_places)))
        self._texts = {
            kind: self._shuffled(self._phrases[kind]) for kind in ("questions", "follow_ups", "openings", "answers")
        }

    def make(self, kind: str, *, unknown: bool = False) -> list[Message]:
        """Return an exchange of four messages; `kind` is that of the question, `unknown` makes the result an error."""
        return self._called(next(self._texts[kind]), unknown)

    def make_opened(self) -> list[Message]:
        """Return two exchanges: the model has to ask for what the first question lacks."""
        question, answer, completed = next(self._texts["openings"])
        return _exchange([question, answer]) + self._called(completed)

    def _called(self, question: str, unknown: bool = False) -> list[Message]:
        function, arguments, words = getattr(self, f"_{self._name}")(next(self._places))
        result, answers = self._result(), self._texts["answers"]
        text = json.dumps(result, ensure_ascii=False)
        if unknown:
            text, answers = self._random.choice(self._unknown["results"]), self._shuffled(self._unknown["answers"])
        call = {"type": "function", "function": {"name": function, "arguments": arguments}}
        return [
            {"role": "user", "content": question.format(**words)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": text},
            {"role": "assistant", "content": next(answers).format(**words, **result)},
        ]

    def _shuffled(self, items: Any) -> Iterator[Any]:
        return cycle(self._random.sample(items, len(items)))

    def _weather(self, number: int) -> tuple[str, dict[str, str], dict[str, str]]:
        place = self._all_places[number]
        return "get_weather", {"place": place}, {"place": place}

    def _tide(self, number: int) -> tuple[str, dict[str, str], dict[str, str]]:
        place, day = self._all_places[number], self._random.choice(["today", "tomorrow"])
        return "get_tide", {"harbour": place, "day": day}, {"place": place, "day": day}

    def _ferry(self, number: int) -> tuple[str, dict[str, str], dict[str, str]]:
        """Return a crossing to a place that is at most two further along the coast."""
        origin = self._all_places[number]
        destination = self._all_places[(number + self._random.choice([-2, -1, 1, 2])) % len(self._all_places)]
        arguments = {"origin": origin, "destination": destination}
        return "next_ferry", arguments, {**arguments, "place": destination}

    def _result(self) -> dict[str, Any]:
        choice, number = self._random.choice, self._random.randint
        if self._name == "weather":
            sky, wind = choice(self._phrases["skies"]), choice(self._phrases["winds"])
            return {"sky": sky, "temperature": number(-5, 36), "wind": wind, "knots": number(2, 45)}
        if self._name == "tide":
            high = number(0, 18 * 60 - 1)
            return {"high_water": _clock(high), "low_water": _clock(high + number(350, 390))}
        return {"departs": _clock(number(5 * 60, 23 * 60)), "pier": number(1, 12), "minutes": number(15, 340)}


def _exchange(pair: list[str]) -> list[Message]:
    question, answer = pair
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def main() -> None:
    """Write the file."""
    phrases = yaml.safe_load((FOLDER / "phrases.yaml").read_text(encoding="utf-8"))
    functions = json.loads((FOLDER / "functions.json").read_text(encoding="utf-8"))
    lines = [json.dumps(chat, ensure_ascii=False) for chat in make_chats(phrases, functions)]
    (FOLDER / "chats.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

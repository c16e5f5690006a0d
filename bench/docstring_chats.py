"""Make chats to measure with from the docstrings of the standard library, so that anyone can repeat the measurements.

    python bench/docstring_chats.py FILE COUNT [--seed N]

The same count and seed give the same bytes on one version of Python; other versions have different docstrings.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

SYSTEM = "You answer questions about Python's standard library, briefly and exactly."
# Importing these opens a browser, prints or draws, or they belong to an editor.
_SKIPPED = {"antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter", "lib2to3"}
_LONGEST_ANSWER = 1_200
"""Characters; with the rest of the chat, at most about 500 tokens of SmolLM2."""
_OPENINGS = (
    "What does {} do?", "What is {} for?", "Explain {}.", "Describe {}.", "What should I know about {}?",
    "How is {} documented?", "Tell me about {}.", "When would I use {}?", "Give me the documentation of {}.",
    "I found {} in some code. What is it?", "Can you explain {} to me?", "Remind me what {} does.",
    "A colleague uses {}. Why?", "Summarize {}.", "Is {} what I need? What does it do?", "Please define {}.",
)  # fmt: skip
_SETTINGS = (
    "", " I am new to Python.", " I know the language well.", " This is for a review.", " I write a tutorial.",
    " I am reading old code.", " It came up in an interview.", " I port a program from C.", " I write a test for it.",
    " I could not find it in the manual.", " I teach a class tomorrow.", " My editor shows no help.",
    " I prepare a talk.", " It is for a script of mine.", " I debug a server.", " I compare it with other ways.",
)  # fmt: skip
_CLOSINGS = ("", " Be exact.", " Thank you.", " Keep it short.")


def docstrings() -> list[tuple[str, str]]:
    """Return (name, docstring) of public functions, classes and methods, without duplicate docstrings."""
    names: dict[str, str] = {}
    with warnings.catch_warnings(action="ignore"):
        for name in sorted(sys.stdlib_module_names - _SKIPPED):
            if name.startswith("_"):
                continue
            try:
                module = importlib.import_module(name)
            except ImportError:  # of another operating system
                continue
            for path, text in _members(module):
                names.setdefault(_shorten(text), path)
    return [(path, text) for text, path in names.items() if len(text) > 20]


def _members(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(module).items()):
        is_own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not is_own or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if value.__doc__:
            yield f"{module.__name__}.{name}", value.__doc__
        for inner, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
            text = getattr(member, "__doc__", None)
            if not inner.startswith("_") and isinstance(text, str) and callable(member):
                yield f"{module.__name__}.{name}.{inner}", text


def _shorten(text: str) -> str:
    """Return a docstring without indentation, cut after the last whole line that fits."""
    text = inspect.cleandoc(text)
    return text if len(text) <= _LONGEST_ANSWER else text[: text.rfind("\n", 0, _LONGEST_ANSWER)].rstrip()


def write_chats(path: Path, count: int, seed: int = 0) -> None:
    """Write chats as JSON Lines: a shared system prompt, a question, and a docstring as the answer.

    Every docstring is used once before any is used again with a different question, so no two chats are equal. A small
    number of chats is spread over all lengths, including the longest, so that few and many chats have similar lengths.

    Raises:
        ValueError: there are not that many different chats.
    """
    order = random.Random(seed)
    known = docstrings()
    words = ["".join(parts) for parts in product(_OPENINGS, _SETTINGS, _CLOSINGS)]
    if count > len(known) * len(words):
        raise ValueError(f"{count} chats: only {len(known) * len(words)} different ones exist")
    order.shuffle(words)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for start in range(0, count, len(known)):
            chosen = _spread(known, count - start)
            order.shuffle(chosen)
            for name, text in chosen:
                # Each name goes through the wordings in order, from its own start, so no wording repeats.
                question = words[(start // len(known) + _offset(name)) % len(words)].format(name)
                roles = ("system", SYSTEM), ("user", question), ("assistant", text)
                file.write(
                    json.dumps({"messages": [{"role": role, "content": content} for role, content in roles]}) + "\n"
                )


def _spread(known: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Return at most `count` docstrings, evenly spaced from the shortest to the longest."""
    by_length = sorted(known, key=lambda item: (len(item[1]), item[0]))
    if count >= len(known):
        return by_length
    if count < 2:
        return by_length[-count:] if count else []
    return [by_length[number * (len(known) - 1) // (count - 1)] for number in range(count)]


def _offset(name: str) -> int:
    return sum(name.encode())


def main() -> int:
    """Write a file of chats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_chats(arguments.file, arguments.count, arguments.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

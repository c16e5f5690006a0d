"""The project's words: the field's own terms, one meaning each (docs/architecture.md has the table).

The tests read identifiers, docstrings, comments and messages of package, tests, bench and examples, and the text of the
documentation. Names of files and fields on disk keep their word.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kolotune", "tests", "bench", "examples")
DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs", "examples", "bench")
WORDS = {
    r"roads?": "pipeline",
    r"rooms?": "space, capacity, or run listing",
    r"told|tells?|telling": "report, show, say",
    r"befell|befall\w*": "happened to, affected",
    r"anew": "again, from scratch",
    r"parted": "sharded",
    r"likeness(es)?": "near-duplicate",
    r"halvings?": "micro-batch halving",
    r"outlin(e|es|ed|ing)|drawn": "conversion plan",
    r"mend(s|ed|ing)?": "fix",
    r"(way|ways) back": "backward pass",
    r"(hold|holds|held|holding) (\w+ ){0,3}against": "compare with",
    r"(go|goes|going|went|gone) on": "resume, continue",
    r"in silence": "silently",
    r"it is said|is told": "is reported",
}
_WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
_SINGLE = re.compile(rf"(?:{'|'.join(each for each in WORDS if ' ' not in each)})", re.IGNORECASE)
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Names on disk, on the command line or in an event; they keep their meaning.
ALLOWED = frozenset({"halvings", "anew", "--anew", "halvings.json", "ROAD", "RoAd"})
CHATS = frozenset({("bench/docstring_chats.py", "Tell me about {}."), ("tests/unit/fidelity/conftest.py", "road")})
"""Strings of chats that a model is trained on, with their file: there, people use any words."""
SHORT_LIVED = frozenset({"each", "found", "made", "told"})
SHORT = 3
"""The longest lifetime of a name of `SHORT_LIVED`, in lines."""


@cache
def sources() -> dict[str, str]:
    """Return the text of every Python file by its path."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@cache
def trees() -> dict[str, ast.Module]:
    return {path: ast.parse(text) for path, text in sources().items()}


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the names that a file defines, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def wrong_parts(name: str) -> list[str]:
    """Return the parts of an identifier that are on the list."""
    parts = [] if name in ALLOWED else _PARTS.findall(name)
    return [part for part in parts if part not in ALLOWED and _SINGLE.fullmatch(part)]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield comments and strings, docstrings included, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield token.start[0], token.string


def wrong_words(text: str) -> list[str]:
    return [match.group() for match in _WORD.finditer(text) if match.group() not in ALLOWED]


def test_the_code_uses_the_fields_words() -> None:
    wrong = []
    for path in sources():
        if path != Path(__file__).relative_to(ROOT).as_posix():
            wrong += [f"{path}:{line}: {name}" for line, name in identifiers(trees()[path]) if wrong_parts(name)]
            wrong += [
                f"{path}:{line}: {wrong_words(text)}"
                for line, text in prose(sources()[path])
                if wrong_words(text) and (path, text.strip('"')) not in CHATS
            ]
    assert not wrong, "\n".join(wrong)


def test_the_other_sources_use_the_fields_words() -> None:
    endings = (".cpp", ".h", ".c", ".go", ".jinja", "Dockerfile")
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.name.endswith(endings)]
    assert len(files) > 8
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {wrong_words(line)}"
        for path in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if wrong_words(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_documentation_uses_the_fields_words() -> None:
    files = [path for name in DOCS for path in ([ROOT / name] if name.endswith(".md") else (ROOT / name).rglob("*.md"))]
    assert len(files) > 10
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {wrong_words(line)}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if wrong_words(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_class_name_has_one_meaning() -> None:
    files = defaultdict(set)
    for path, tree in trees().items():
        if path.startswith("kolotune/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    files[node.name.lstrip("_")].add(path)
    assert not {name: sorted(paths) for name, paths in files.items() if len(paths) > 1}


def lifetimes(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """Yield line, name and lifetime in lines of the names of `SHORT_LIVED` in each function."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = defaultdict(list)
            for node in ast.walk(function):
                name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
                if name in SHORT_LIVED:
                    lines[name].append(node.lineno)
            for name, numbers in lines.items():
                yield min(numbers), name, max(numbers) - min(numbers)


def test_vague_names_do_not_live_long() -> None:
    long = [
        f"{path}:{line}: {name}"
        for path, tree in trees().items()
        if path.startswith("kolotune/")
        for line, name, length in lifetimes(tree)
        if length > SHORT
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("text", ["the road", "it is told anew", "held them all against it", "what goes on", "Rooms"])
def test_a_wrong_word_is_seen(text: str) -> None:
    assert wrong_words(text)


@pytest.mark.parametrize("name", ["room_of", "RoadMap", "_told", "TheOutline"])
def test_a_wrong_identifier_is_seen(name: str) -> None:
    assert wrong_parts(name)


def test_a_right_word_is_left_alone() -> None:
    assert not wrong_words("a broad bedroom; it was retold; recommend this; halve the batch")
    assert not wrong_parts("broad") and not wrong_parts("halvings") and not wrong_parts("recommended")

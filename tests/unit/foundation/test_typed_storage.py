"""Dataclasses as JSON: what is written comes back, and anything else is refused with where it is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.typed_storage import StorageError


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fact:
    parts: dict[str, Part]
    loss: float | None = None


FACT = Fact({"a": Part("a", (1, 2)), "b": Part("\udcff \x1b é")}, 0.1)


def test_a_dataclass_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "fact.json"
    typed_storage.write(path, FACT)
    assert typed_storage.read(Fact, path) == FACT
    assert typed_storage.read_object(path)["loss"] == 0.1
    typed_storage.write(path, {"a": [1, None]})
    assert typed_storage.read(dict[str, list[int | None]], path) == {"a": [1, None]}


def test_fields_of_a_later_version_are_ignored_and_missing_ones_have_their_default() -> None:
    text = '{"parts": {"a": {"name": "x", "colour": 1}}, "later": true}'
    assert typed_storage.parse(Fact, text) == Fact({"a": Part("x")})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", ""),
        ("{}", "parts"),
        ('{"parts": {"a": {}}}', "parts.a.name"),
        ('{"parts": {"a": {"name": "x", "sizes": ["y"]}}}', "parts.a.sizes.0"),
        ('{"parts": {}, "loss": "low"}', "loss"),
    ],
)
def test_other_text_is_refused_with_where_it_is_wrong(text: str, where: str) -> None:
    with pytest.raises(StorageError) as error:
        typed_storage.parse(Fact, text)
    assert str(error.value).startswith(where) and "\n" not in str(error.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        typed_storage.read(Fact, tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(StorageError, match="UTF-8"):
        typed_storage.read_object(tmp_path / "bytes.json")
    with pytest.raises(ArtifactError):
        typed_storage.write(tmp_path / "bytes.json" / "below.json", FACT)


@pytest.mark.parametrize("text", ["[]", "1", "null", "{"])
def test_only_an_object_is_an_object(text: str) -> None:
    with pytest.raises(StorageError):
        typed_storage.parse_object(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_through_json_makes_what_is_equal_in_json_equal(value: Any) -> None:
    assert typed_storage.through_json({1: (value,)}) == {"1": [value]}

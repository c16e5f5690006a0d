"""Facts on disk: dataclasses written as JSON, read back and validated.

Everything that kolotune writes for itself (records, manifests, jobs, comparisons) goes through here, so that one place
decides how a field is checked. JSON that other programs wrote comes in through `parse_json` and `read_json`.
pydantic validates the types; it is imported on first use, so that ``kolotune --help`` does not pay for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from .files import write_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
JsonObject: TypeAlias = dict[str, object]
"""A JSON object whose values nobody has checked yet."""


class StorageError(ValueError):
    """A file or text is not what it should hold; the message is one line and names what is wrong."""


def write(path: Path, value: object) -> None:
    """Write a dataclass, or any JSON value, to a file: the old content or all of the new one.

    Raises:
        SpaceError: the disk is full.
        ArtifactError: the folder can't be written to.
    """
    write_text(path, json.dumps(plain(value), indent=1) + "\n")


def read(kind: type[T], path: Path) -> T:
    """Read a file that `write` made.

    Args:
        kind: the dataclass, or a type such as ``dict[str, str]``; unknown fields are ignored.

    Raises:
        OSError: the file can't be read.
        StorageError: it does not hold a `kind`.
    """
    return parse(kind, _text_of(path))


def read_or_none(kind: type[T], path: Path) -> T | None:
    """Read a file that `write` made; None when it is missing or damaged."""
    try:
        return read(kind, path)
    except (OSError, StorageError):
        return None


def parse(kind: type[T], text: str | bytes) -> T:
    """Read a dataclass, or another type, from JSON text.

    Raises:
        StorageError: the text is not valid JSON, or does not hold a `kind`.
    """
    return convert(kind, parse_json(text))


def convert(kind: type[T], value: object) -> T:
    """Validate a plain value (dicts and lists, as JSON gives them) as a `kind`.

    Raises:
        StorageError: a field is missing or has another type.
    """
    from pydantic import ValidationError

    try:
        return cast(T, _adapter(kind).validate_python(value))  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{where + ': ' if where else ''}{first['msg']}") from None


def parse_json(text: str | bytes) -> object:
    """Parse JSON text.

    Raises:
        StorageError: it is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"not valid JSON: {error}") from None


def parse_object(text: str | bytes) -> JsonObject:
    """Parse JSON text that holds an object.

    Raises:
        StorageError: it is not valid JSON, or not an object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise StorageError("not a JSON object")
    return value


def read_object(path: Path) -> JsonObject:
    """Read a JSON object from a file that another program may have written.

    Raises:
        OSError: the file can't be read.
        StorageError: it does not hold a JSON object.
    """
    return parse_object(_text_of(path))


def plain(value: object) -> Any:
    """A dataclass as dicts and lists, ready for JSON; other values pass unchanged."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def through_json(value: object) -> Any:
    """The value as JSON gives it back, so that tuples and lists, or int and str keys, compare equal."""
    return json.loads(json.dumps(plain(value)))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"not UTF-8: {error.reason}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)

"""Documents: text files as they are, and records with a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.reading.documents import Document, read_document
from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.files import opened
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart
from kolotune.foundation.errors import DataError
from kolotune.foundation.objectives import LearnsFrom

TEXT = ReadingOptions(learns_from=LearnsFrom.TEXT)


def read(path: Path, options: ReadingOptions = TEXT) -> list[Document]:
    with opened(path, options) as (_, records):
        return [read_document(path, record, options) for record in records]


@pytest.mark.parametrize("name", ["book.txt", "page.md"])
def test_a_text_file_is_a_document_to_the_byte(name: str, tmp_path: Path) -> None:
    text = "# Wörter\r\n\r\n\tund  mehr\n\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (document,) = read(tmp_path / name)
    assert (document.text, document.line, document.problem) == (text, 1, None)


@pytest.mark.parametrize(
    ("data", "kind", "line"),
    [
        (b"good\nb\xffad\n", FaultKind.BAD_UTF_8, 2),
        ("text".encode("utf-16"), FaultKind.ENCODING, 1),
        (b"a\0b", FaultKind.NUL, 1),
        (b" \n\t\n", FaultKind.NO_TEXT, 1),
        (b"a" * ((16 << 20) + 1), FaultKind.TOO_LONG, 1),
    ],
)
def test_what_is_wrong_with_a_text_file(data: bytes, kind: FaultKind, line: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (document,) = read(tmp_path / "a.txt")
    assert document.problem is not None and document.text is None
    assert (document.problem.kind, document.problem.line) == (kind, line)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"body": "a"}, FaultKind.NO_TEXT),
        ({"text": 3}, FaultKind.NO_TEXT),
        ({"text": "  "}, FaultKind.NO_TEXT),
        (["a"], FaultKind.NOT_AN_OBJECT),
    ],
)
def test_a_record_without_a_text_is_a_problem(record: Any, kind: FaultKind, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + json.dumps(record) + "\n")
    good, bad = read(tmp_path / "a.jsonl")
    assert good.text == "good" and bad.problem is not None
    assert (bad.problem.kind, bad.problem.line) == (kind, 2)


def test_other_keys_are_counted_and_a_key_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"Text": "one", "url": "x", "body": "two", "empty": None}) + "\n")
    (document,) = read(tmp_path / "a.jsonl")
    assert (document.text, document.unread) == ("one", ("url", "body"))
    options = ReadingOptions((("body", RecordPart.TEXT),), ("url",), learns_from=LearnsFrom.TEXT)
    (document,) = read(tmp_path / "a.jsonl", options)
    assert (document.text, document.key, document.unread) == ("two", "body", ("Text",))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_have_a_column_of_texts(ending: str, tmp_path: Path) -> None:
    good, bad = tmp_path / f"good.{ending}", tmp_path / f"bad.{ending}"
    rows = {"text": ["one", "two\nlines"], "n": ["1", "2"]}
    for path, table in ((good, rows), (bad, {"prose": ["one"]})):
        if ending == "csv":
            lines = [
                ",".join(table),
                *(",".join(f'"{cell}"' for cell in row) for row in zip(*table.values(), strict=True)),
            ]
            path.write_text("\n".join(lines) + "\n")
        else:
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(table), path)
    assert [document.text for document in read(good)] == ["one", "two\nlines"]
    (document,) = read(bad)
    assert document.problem is not None and document.problem.kind is FaultKind.NO_TEXT


def test_a_text_file_is_no_chat(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError) as raised, opened(tmp_path / "a.txt"):
        pass
    assert "--objective text" in str(raised.value.hint)

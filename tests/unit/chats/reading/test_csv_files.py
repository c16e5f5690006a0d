"""Tables as text: separators, quotes, names of columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.chats import Chat
from kolotune.chats.reading.files import ReadResult, read_chats
from kolotune.chats.reading.reading_options import DEFAULT, ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart, canonical

SPOKEN = [("user", "q"), ("assistant", "a")]


def read_text(folder: Path, name: str, text: str, options: ReadingOptions = DEFAULT) -> ReadResult:
    (folder / name).write_bytes(text.encode())
    return read_chats([folder / name], options)


def spoken(chat: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in chat.messages]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chats.csv", 'instruction,input,output\nq,,a\n"two\nlines","a ""b""",c\n\nx,y,z\n'),
        ("chats.csv", 'instruction;input;output\nq;;a\n"two\nlines";"a ""b""";c\n\nx;y;z\n'),
        ("chats.tsv", 'instruction\tinput\toutput\nq\t\ta\n"two\nlines"\t"a ""b"""\tc\n\nx\ty\tz\n'),
        ("chats.CSV", '\ufeffinstruction,input,output\r\nq,,a\r\n"two\r\nlines","a ""b""",c\r\n\r\nx,y,z\r\n'),
    ],
)
def test_csv(tmp_path: Path, name: str, data: str) -> None:
    result = read_text(tmp_path, name, data)
    assert result.problems == ()
    assert [chat.line for chat in result.chats] == [2, 3, 6]
    assert spoken(result.chats[0]) == SPOKEN
    assert spoken(result.chats[1])[0][1].replace("\r", "") == 'two\nlines\n\na "b"'
    assert list(result.shapes.values()) == [f"{name[-3:].upper()}, alpaca"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("named", [None, "sep={}\n", "sep={}\r\n", '"sep={}"\n', "\ufeffsep={}\n"])
def test_separators_of_spreadsheets(separator: str, named: str | None, tmp_path: Path) -> None:
    lines = separator.join(["prompt", "completion"]), separator.join(["q, with; more", '"a | b"'])
    table = "\n".join(lines).replace("q, with; more", '"q, with; more"')
    result = read_text(tmp_path, "chats.csv", f"{(named or '').format(separator)}{table}\n")
    assert result.problems == ()
    assert [spoken(chat) for chat in result.chats] == [[("user", "q, with; more"), ("assistant", "a | b")]]
    assert result.chats[0].line == (3 if named else 2)


@pytest.mark.parametrize("first", ["How are you?,Fine", "Say it.,No.", "a name that has six words,b", "x!;y"])
def test_a_table_without_names(first: str, tmp_path: Path) -> None:
    result = read_text(tmp_path, "chats.csv", f"{first}\n{first}\n")
    assert [(problem.line, problem.kind) for problem in result.problems] == [(1, "no-header")]
    assert "should name the columns" in str(result.problems[0])


def test_a_column_may_be_named_by_a_question(tmp_path: Path) -> None:
    options = ReadingOptions(((canonical("What do you ask?"), RecordPart.QUESTION),))
    result = read_text(tmp_path, "forms.csv", "What do you ask?,answer\nq,a\n", options)
    assert [spoken(chat) for chat in result.chats] == [SPOKEN]


def test_csv_with_json_cells_and_a_long_cell(tmp_path: Path) -> None:
    cell = json.dumps([{"role": "user", "content": "long " * 50_000}, {"role": "assistant", "content": "a"}]).replace(
        '"', '""'
    )
    result = read_text(tmp_path, "chats.csv", f'id,messages,prompt,completion\n1,"{cell}",,\n2,,q,a\n')
    assert result.problems == ()
    assert list(result.shapes.values()) == ["CSV, messages (1), prompt/completion (1)"]

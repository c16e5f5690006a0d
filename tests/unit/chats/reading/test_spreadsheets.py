"""Spreadsheets: one sheet with rows is a table of chats."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from kolotune.chats.reading.files import read_chats
from kolotune.chats.reading.spreadsheets import read_spreadsheet
from kolotune.foundation.errors import DataError, ToolchainError

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_DOCUMENT = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
_HEAD = ["Question", "Answer", "Context"]
_CHAT = "what is 6 * 7?", 42, None


def _cell(value: Any) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, bool):
        return f'<c t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f"<c><v>{value}</v></c>"
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'


def workbook(path: Path, **sheets: list[Any]) -> Path:
    """Write a workbook by ECMA-376's parts: the package's relations, the workbook with its own, and the sheets."""
    names = list(enumerate(sheets, 1))
    listed = "".join(f'<sheet name="{name}" sheetId="{at}" r:id="r{at}"/>' for at, name in names)
    related = "".join(
        f'<Relationship Id="r{at}" Type="{_DOCUMENT}/worksheet" Target="worksheets/{at}.xml"/>' for at, _ in names
    )
    root = f'<Relationship Id="r1" Type="{_DOCUMENT}/officeDocument" Target="xl/workbook.xml"/>'
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("_rels/.rels", f'<Relationships xmlns="{_PACKAGE}">{root}</Relationships>')
        packed.writestr(
            "xl/workbook.xml", f'<workbook xmlns="{_MAIN}" xmlns:r="{_DOCUMENT}"><sheets>{listed}</sheets></workbook>'
        )
        packed.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{_PACKAGE}">{related}</Relationships>')
        for at, rows in enumerate(sheets.values(), 1):
            body = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in rows)
            sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{body}</sheetData></worksheet>'
            packed.writestr(f"xl/worksheets/{at}.xml", sheet)
    return path


@pytest.fixture(autouse=True)
def calamine(request: pytest.FixtureRequest) -> None:
    if request.node.name != "test_without_its_reader":
        pytest.importorskip("python_calamine")


def test_a_table_is_read_as_it_is_shown(tmp_path: Path) -> None:
    rows = [_HEAD, _CHAT, [], ["is it & so?", True, "since <b>\n"], ["half", 0.5, ""]]
    result = read_chats([workbook(tmp_path / "chats.xlsx", chats=rows, empty=[])])
    assert result.problems == () and list(result.shapes.values()) == ["Spreadsheet, question/answer"]
    contents = [[message.content for message in chat.messages] for chat in result.chats]
    assert contents == [["what is 6 * 7?", "42"], ["is it & so?\n\nsince <b>\n", "TRUE"], ["half", "0.5"]]
    assert [chat.line for chat in result.chats] == [2, 4, 5]


def test_faults_name_their_row(tmp_path: Path) -> None:
    rows = [["question", "answer", None], ["q", "a"], ["r", None], ["s", "b", "no name"]]
    result = read_chats([workbook(tmp_path / "chats.xlsx", chats=rows)])
    assert [(problem.line, problem.kind) for problem in result.problems] == [(3, "empty-answer"), (4, "field-count")]
    unknown = read_chats([workbook(tmp_path / "other.xlsx", chats=[["x", "y"], ["1", "2"]])])
    assert [problem.kind for problem in unknown.problems] == ["unknown-shape"]


@pytest.mark.parametrize(
    ("sheets", "cause"),
    [
        ({"a": [_HEAD, _CHAT], "b": [["note"]]}, "2 sheets have rows: "),
        ({"a": [], "b": [[None]]}, "has no rows"),
    ],
)
def test_which_sheet_is_no_guess(sheets: dict[str, list[Any]], cause: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_chats([workbook(tmp_path / "chats.xlsx", **sheets)])
    assert cause in error.value.cause


@pytest.mark.parametrize("name", ["chats.xlsx", "chats.xls", "chats.ods"])
def test_what_is_no_workbook(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4 no workbook")
    with pytest.raises(DataError, match="can't be read as a spreadsheet") as error:
        read_chats([tmp_path / name])
    assert "CSV" in str(error.value.hint)


def test_a_workbook_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "chats.xlsx", "w", zipfile.ZIP_DEFLATED) as packed, packed.open("x", "w") as file:
        for _ in range((1 << 30 >> 24) + 1):
            file.write(bytes(1 << 24))
    with pytest.raises(DataError, match="too much"):
        read_chats([tmp_path / "chats.xlsx"])


def test_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(ToolchainError) as error:
        list(read_spreadsheet(tmp_path / "chats.xlsx", None))  # type: ignore[arg-type]
    assert "python-calamine" in error.value.cause and "CSV" in str(error.value.hint)

"""Damaged files and bad chats: each is reported with its line and kind, and nothing else is lost."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.reading.files import ReadResult, read_chats
from kolotune.chats.reading.lines import MAX_LINE_BYTES

GOOD = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}'


def good(number: int) -> bytes:
    """Return a good record, different for every number."""
    return (GOOD % (number, number)).encode()


def read(folder: Path, name: str, data: bytes) -> ReadResult:
    (folder / name).write_bytes(data)
    return read_chats([folder / name])


def faults(result: ReadResult) -> list[tuple[int, str]]:
    """Return line and kind of every problem."""
    return [(problem.line, problem.kind) for problem in result.problems]


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


U, A = turn("user", "q"), turn("assistant", "a")
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def messages(*turns: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(turns), **more}).encode()


UNCLOSED = b'{"messages": [{"role": "user"'
BAD_LINES: list[tuple[bytes, str]] = [
    (b"hello", "bad-json"),
    (b'{"messages": [}', "bad-json"),
    (b"{'messages': []}", "bad-json"),
    (b'{"messages": [],}', "bad-json"),
    (b'{"messages": "a\tb"}', "bad-json"),
    (b'{"messages": "\\q"}', "bad-json"),
    (good(8) + good(9), "bad-json"),
    (UNCLOSED, "bad-json"),
    (b'{"messages": "\xff"}', "bad-utf-8"),
    (b'{"messages": "\xed\xa0\xbd"}', "bad-utf-8"),
    (b'{"messages": "\0"}', "nul"),
    (b"\0", "nul"),
    (messages(turn("user", "a\0b"), A), "nul"),
    (b'{"a": 1, "a": 2}', "duplicate-key"),
    (b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}', "duplicate-key"),
    (b'{"messages": NaN}', "not-finite"),
    (b'{"a": [-Infinity]}', "not-finite"),
    (b'{"a": 1e999}', "not-finite"),
    (b'{"a": "\\ud83d"}', "lone-surrogate"),
    (b'{"a": "\\udc00\\ud83d"}', "lone-surrogate"),
    (b"[" * 100 + b"]" * 100, "too-deep"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "too-deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "huge-number"),
    (b'{"a": -' + b"9" * 500 + b"}", "huge-number"),
    (b"[1]", "not-an-object"),
    (b'"text"', "not-an-object"),
    (b"null", "not-an-object"),
    (b"{}", "unknown-shape"),
    (b'{"text": "x"}', "unknown-shape"),
    (b'{"prompt": "x", "chosen": "y", "rejected": "z"}', "unknown-shape"),
    (b'{"messages": null}', "no-messages"),
    (b'{"messages": {}}', "no-messages"),
    (b'{"messages": []}', "no-messages"),
    (b'{"messages": "[{"}', "bad-json"),
    (messages("x", A), "bad-message"),
    (messages({"content": "x"}, A), "missing-role"),
    (messages(turn("narrator", "x"), A), "unknown-role"),
    (messages(turn("Narrator", "x"), A), "unknown-role"),
    (messages(turn(3, "x"), A), "unknown-role"),
    (messages({"role": "user"}, A), "missing-content"),
    (messages(U, turn("assistant", None)), "missing-content"),
    (messages(U, turn("assistant", None, tool_calls=[])), "missing-content"),
    (messages(turn("user", 42), A), "bad-content"),
    (messages(turn("user", {"image": "x"}), A), "bad-content"),
    (messages(turn("user", [{"type": "image_url", "image_url": {}}]), A), "unsupported-content"),
    (messages(turn("user", ["x"]), A), "unsupported-content"),
    (messages(turn("user", [{"type": "text"}]), A), "unsupported-content"),
    (messages(turn("user", " \n"), A), "empty-user"),
    (messages(turn("user", []), A), "empty-user"),
    (messages(U, turn("assistant", "")), "empty-answer"),
    (messages(U, turn("assistant", "", reasoning_content="hm")), "empty-answer"),
    (messages(U, U, A), "two-users"),
    (messages(U, A, turn("assistant", "b")), "two-assistants"),
    (messages(A, U, A), "assistant-first"),
    (messages(U, turn("system", "s"), A), "system-not-first"),
    (messages(turn("system", "s"), turn("system", "s"), U, A), "system-not-first"),
    (messages(turn("system", "s"), U, A, system="t"), "system-not-first"),
    (messages(turn("system", "s")), "no-assistant"),
    (messages(U), "no-assistant"),
    (messages(U, A, U), "no-answer"),
    (messages(U, turn("assistant", "", tool_calls=[CALL]), turn("tool", "1")), "no-answer"),
    (messages(U, A, turn("tool", "1"), A), "tool-order"),
    (messages(turn("tool", "1"), U, A), "tool-order"),
    (messages(U, turn("assistant", "", tool_calls="x")), "bad-tool-call"),
    (messages(U, turn("assistant", "", tool_calls=[{}])), "bad-tool-call"),
    (messages(U, turn("assistant", "", tool_calls=[{"function": {"arguments": {}}}])), "bad-tool-call"),
    (messages(U, turn("assistant", "", tool_calls=[{"function": {"arguments": {}}}])), "bad-tool-call"),
    (messages(U, turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])), "bad-tool-call"),
    (messages(U, turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "1"}}])), "bad-tool-call"),
    (messages(turn("user", "x", tool_calls=[CALL]), A), "bad-tool-call"),
    (messages(U, A, tools={"a": 1}), "bad-tools"),
    (messages(U, A, tools="[{"), "bad-tools"),
    (messages(U, A, system=1), "bad-content"),
    (messages(U, turn("assistant", "a", weight=1.5)), "not-supported"),
    (messages(U, turn("assistant", "a", train="perhaps")), "not-supported"),
    (messages(U, A, images=["x.png"]), "unsupported-content"),
    (messages(turn("user", "x", reasoning="hm"), A), "bad-reasoning"),
    (messages(U, turn("assistant", "a", reasoning=["hm"])), "bad-reasoning"),
    (messages(U, turn("assistant", "", tool_calls=[CALL]), turn("tool", "1", name=3), A), "bad-tool-turn"),
    (b'{"conversations": [{"from": "human", "value": "q"}, {"from": "bard", "value": "a"}]}', "unknown-role"),
    (b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}', "missing-content"),
    (b'{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]}', "bad-tool-call"),
    (b'{"instruction": "", "output": "a"}', "empty-user"),
    (b'{"instruction": "q", "output": ""}', "empty-answer"),
    (b'{"instruction": "q", "output": null}', "missing-content"),
    (b'{"instruction": 1, "output": "a"}', "bad-content"),
    (b'{"instruction": "q", "output": "a", "history": [["x"]]}', "bad-history"),
    (b'{"prompt": "q", "completion": true}', "bad-content"),
    (b'{"prompt": [], "completion": []}', "no-messages"),
]


@pytest.mark.parametrize(("bad", "kind"), BAD_LINES)
def test_bad_lines(tmp_path: Path, bad: bytes, kind: str) -> None:
    result = read(tmp_path, "chats.jsonl", good(1) + b"\n\n" + bad + b"\n" + good(2) + b"\n")
    assert faults(result) == [(3, kind)]
    assert [chat.line for chat in result.chats] == [1, 4]
    assert len(str(result.problems[0])) < len(str(tmp_path)) + 300
    assert str(result.problems[0]).isprintable()


@pytest.mark.parametrize(("bad", "kind"), [case for case in BAD_LINES if case[0] != UNCLOSED])
def test_bad_array_elements(tmp_path: Path, bad: bytes, kind: str) -> None:
    """In a JSON array, brackets that don't match must not swallow the next record."""
    result = read(tmp_path, "chats.json", b"[" + good(1) + b",\n\n" + bad + b",\n" + good(2) + b"]")
    assert faults(result) == [(3, kind)]
    assert [chat.line for chat in result.chats] == [1, 4]


LAST = b'{"messages": [{"role": "user", "content": "q\xc3\xa9"}]}'


@pytest.mark.parametrize("cut", [*range(1, len(LAST) - 1)])
def test_a_cut_last_line(tmp_path: Path, cut: int) -> None:
    result = read(tmp_path, "chats.jsonl", good(1) + b"\n" + LAST[:cut])
    assert faults(result) == [(2, "cut")]
    assert len(result.chats) == 1


FILES: list[tuple[str, bytes, list[tuple[int, str]], list[int]]] = [
    ("a.jsonl", good(1).decode().encode("utf-16"), [(1, "encoding")], []),
    ("a.jsonl", good(1).decode().encode("utf-16-le"), [(1, "encoding")], []),
    ("a.json", good(1).decode().encode("utf-16-be"), [(1, "encoding")], []),
    ("a.json", good(1).decode().encode("utf-32"), [(1, "encoding")], []),
    ("a.csv", "prompt,completion\nq,a".encode("utf-16"), [(1, "encoding")], []),
    ("a.jsonl", good(1) + b"\n\xef\xbb\xbf" + good(2), [], [1, 2]),
    ("a.json", b"[" + good(1) + b",\n" + good(2), [(2, "cut")], [1, 2]),
    ("a.json", b"[" + good(1) + b",\n" + good(2) + b",\n", [(2, "cut")], [1, 2]),
    ("a.json", b"[" + good(1) + b",\n" + good(2)[:-9] + b"\n", [(2, "cut")], [1]),
    ("a.json", b"[" + good(1) + b",\n]", [(2, "bad-json")], [1]),
    ("a.json", b"[" + good(1) + b",\n,\n" + good(2) + b"]", [(2, "bad-json")], [1, 3]),
    ("a.json", b"[" + good(1) + b"\n" + good(2) + b",\n" + good(3) + b"]", [(2, "bad-json")], [3]),
    ("a.json", b"[" + good(1) + b"]\n\n]", [(3, "bad-json")], [1]),
    ("a.json", b"[" + good(1) + b",\n{\n'a':1},\n" + good(2) + b"]", [(3, "bad-json")], [1, 4]),
    ("a.json", b"[" + good(1) + b',\n{"messages": [{"role": "user},\n' + good(2) + b"]", [(2, "bad-json")], [1]),
    ("a.json", b"[" + good(1) + b",\n" + UNCLOSED + b",\n" + good(2) + b"]", [(3, "bad-json")], [1]),
    ("a.json", b"hello", [(1, "bad-json")], []),
    ("a.json", b"\n{", [(2, "cut")], []),
    ("a.json", b"3", [(1, "not-an-object")], []),
    ("a.json", b'{"a": 1}', [(1, "unknown-shape")], []),
    ("a.json", b'{"train": [{}],\n"test": [{}]}', [(1, "unknown-shape")], []),
    ("a.json", b'{"n": nil,\n"data": [' + good(1) + b"]}", [(1, "bad-json")], [2]),
    ("a.json", b'{"data": [' + good(1) + b"]\n5}", [(2, "bad-json")], [1]),
    ("a.json", b'{"data": [\n' + good(1) + b"]", [(2, "cut")], [2]),
    ("a.json", b'{"data": [\n' + good(1), [(2, "cut")], [2]),
    ("a.json", b'{"messages":\n[{"role":\n"user"}', [(3, "cut")], []),
    ("a.json", good(1)[:-1] + b"\n" + good(2) + b"\n", [(1, "bad-json")], [2]),
    ("a.json", good(1) + b"}\n" + good(2) + b"\n", [(1, "bad-json")], [2]),
    ("a.json", b"# chats\n" + good(1) + b"\n" + good(2), [(1, "bad-json")], [2, 3]),
    ("a.jsonl", b"[1]\n" + good(1) + b"\n[2]\n", [(1, "not-an-object"), (3, "not-an-object")], [2]),
    ("a.jsonl", b'\n{\n  "messages": []\n}\n{\n  "messages": []\n}\n', [(2, "bad-json")], []),
    ("a.jsonl", b'{"messages": [\n' + good(1) + b"\n", [(1, "bad-json")], [2]),
    ("a.jsonl", b"[1,\n" + good(1) + b"\n", [(1, "bad-json")], [2]),
    ("a.csv", b"words\nx\ny\n", [(1, "unknown-shape")], []),
    ("a.csv", b"text\nx\ny\n", [(2, "unknown-shape"), (3, "unknown-shape")], []),
    ("a.csv", b"prompt,prompt,completion\nx,y,z\n", [(1, "duplicate-key")], []),
    ("a.csv", b"prompt,completion\nq,a\nq\nq,a,b\np,a\n", [(3, "field-count"), (4, "field-count")], [2, 5]),
    ("a.csv", b'prompt,completion\n"a\nb",c\nq\xff,a\np,a\n', [(4, "bad-utf-8")], [2, 5]),
    ("a.csv", b'prompt,completion\n"a\nb\xff\n",c\np,a\n', [(3, "bad-utf-8")], [5]),
    ("a.csv", b"prompt,completion\nq\0,a\np,a\n", [(2, "nul")], [3]),
    ("a.csv", b'prompt,completion\nq,a\n"p,a\nx,y\n', [(3, "cut")], [2]),
    ("a.csv", b'prompt,completion\nq,a\n"p"x,a\nx,y\n', [(3, "bad-csv")], [2]),
    ("a.csv", b"prompt,completion\rq,a\r", [(1, "bad-csv")], []),
    ("a.csv", b'prompt,completion\nq,a\n,\n , \n,,,,\n"",\np,a\n', [], [2, 7]),
    ("a.csv", b",\nprompt,completion\nq,a\n", [], [3]),
    ("a.csv", b"prompt,completion\n,a\nq,\n", [(2, "empty-user"), (3, "empty-answer")], []),
    ("a.csv", b'messages\n"[{"\n', [(2, "bad-json")], []),
    ("a.csv", b'messages,id\n"",1\n', [(2, "no-messages")], []),
]


@pytest.mark.parametrize(("name", "data", "problems", "lines"), FILES)
def test_bad_files(tmp_path: Path, name: str, data: bytes, problems: list[tuple[int, str]], lines: list[int]) -> None:
    result = read(tmp_path, name, data)
    assert faults(result) == problems
    assert [chat.line for chat in result.chats] == lines


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"a": tru}', "column 7"),
        ('{"é": tru}'.encode(), "column 7"),
        (b"{'a': 1}", "double quotes"),
        (good(1) + b",", "remove the comma behind the record"),
        (b'{\n  "messages": []\n}', "several lines"),
        (b'{"messages": [\n{\n"role": "user"}]}', "several lines"),
        (b"{\n}", "several lines"),
        (b'{"\xc3\xa9": "\xff"}', "byte 9"),
        (b'{"id": 1, "text": "x"}', '"id", "text"; a text without marks'),
        (b'{"\\u001b[2Jx": 1}', '"x"'),
        (messages(turn("nar\x1b[31mrator", "x")), 'turn 1: unknown role "narrator"'),
        (messages(turn("user", [{"type": "image"}])), 'type "image"'),
    ],
)
def test_messages_name_the_location(tmp_path: Path, bad: bytes, words: str) -> None:
    result = read(tmp_path, "chats.jsonl", bad + b"\n")
    assert words in result.problems[0].fault.message
    assert str(result.problems[0]) == f"{tmp_path / 'chats.jsonl'}:1: {result.problems[0].fault.message}"


def test_columns_in_an_array_are_those_of_the_file(tmp_path: Path) -> None:
    for data in (b'[{"a": tru}]', b'[\n {"b": 1}, {"a": x}]'):
        problem = read(tmp_path, "chats.json", data).problems[-1]
        line = data.split(b"\n")[problem.line - 1]
        column = max(line.find(b"tru"), line.find(b"x")) + 1
        assert f"column {column}:" in problem.fault.message


def test_at_most_three_problems_per_record(tmp_path: Path) -> None:
    result = read(tmp_path, "chats.jsonl", messages(*[turn("x", "y")] * 9))
    assert [problem.kind for problem in result.problems] == ["unknown-role"] * 3


def test_a_long_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    with path.open("wb") as stream:
        stream.write(good(1) + b"\n")
        for _ in range(66):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\n" + good(2) + b"\n")
    tracemalloc.start()
    try:
        result = read_chats([path])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert faults(result) == [(2, "too-long")]
    assert [chat.line for chat in result.chats] == [1, 3]
    assert peak < 2.5 * MAX_LINE_BYTES


def test_the_longest_line_is_read(tmp_path: Path) -> None:
    longest = good(1) + b" " * (MAX_LINE_BYTES - len(good(1)))
    result = read(tmp_path, "chats.jsonl", longest + b"\r\n" + longest + b" \n" + good(2))
    assert [chat.line for chat in result.chats] == [1, 3]
    assert faults(result) == [(2, "too-long")]


@pytest.mark.parametrize("quote", [b"", b'"'])
def test_a_long_line_in_a_table_and_in_an_array(tmp_path: Path, quote: bytes) -> None:
    long = b"x" * (MAX_LINE_BYTES + 1)
    table = read(tmp_path, "chats.csv", b"prompt,completion\n" + quote + long + quote + b",a\np,a\n")
    assert faults(table) == [(2, "too-long")]
    assert [chat.line for chat in table.chats] == [3]
    array = read(tmp_path, "chats.json", b"[" + good(1) + b',\n{"a": "' + long + b'"},\n' + good(2) + b"]")
    assert faults(array) == [(2, "too-long")]
    assert [chat.line for chat in array.chats] == [1, 3]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "data",
    [
        b"[" * 300_000 + b"}" * 300_000,
        b"[" + b"{" * 300_000 + b"]" * 300_000,
        b'{"a":[{],' * 30_000,
        b"[" + b'"\\' * 300_000,
        b"[" + b"{}," * 10_000,
        b'{"data":[' * 50_000,
    ],
)
def test_hostile_brackets_take_no_time(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, "chats.json", data).problems

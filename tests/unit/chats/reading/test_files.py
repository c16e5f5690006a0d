"""Chat files of every format and shape, and arbitrary bytes. Damaged files are in test_damage.py."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kolotune.chats import Chat, Message
from kolotune.chats.reading.files import ReadResult, read_chats
from kolotune.foundation.errors import DataError, KolotuneError

GOOD = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}'


def good(number: int) -> bytes:
    """Return a good record, different for every number."""
    return (GOOD % (number, number)).encode()


def put(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(folder: Path, name: str, data: bytes | str) -> ReadResult:
    return read_chats([put(folder, name, data)])


def spoken(chat: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in chat.messages]


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


QA = [turn("user", "q"), turn("assistant", "a")]
SPOKEN = [("user", "q"), ("assistant", "a")]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


# Shapes


@pytest.mark.parametrize(
    ("record", "shape", "expected"),
    [
        ({"messages": QA, "id": 7, "source": "x"}, "messages", SPOKEN),
        ({"messages": [turn("system", "s"), *QA]}, "messages", [("system", "s"), *SPOKEN]),
        ({"messages": [turn("developer", "s"), *QA]}, "messages", [("system", "s"), *SPOKEN]),
        ({"messages": QA, "system": "s"}, "messages", [("system", "s"), *SPOKEN]),
        ({"messages": QA, "system": " "}, "messages", SPOKEN),
        ({"messages": QA, "system": None, "tools": None}, "messages", SPOKEN),
        ({"messages": json.dumps(QA)}, "messages", SPOKEN),
        ({"messages": [turn("user", [{"type": "text", "text": t} for t in "ab"]), QA[1]]}, "messages", None),
        ({"messages": [turn("user", "q", weight=1, train=True), QA[1]]}, "messages", SPOKEN),
        ({"messages": [turn("user", "q", colour="red"), QA[1]]}, "messages", SPOKEN),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "conversations",
            [("system", "s"), *SPOKEN],
        ),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]}, "conversations", SPOKEN),
        ({"conversations": QA}, "conversations", SPOKEN),
        ({"instruction": "q", "output": "a"}, "alpaca", SPOKEN),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, "alpaca", [("system", "s"), *SPOKEN]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [("user", "q\n\ni"), ("assistant", "a")]),
        (
            {"instruction": "q", "output": "a", "history": [["p", "b"]]},
            "alpaca",
            [("user", "p"), ("assistant", "b"), *SPOKEN],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt/completion", SPOKEN),
        ({"prompt": "q", "response": "a"}, "prompt/response", SPOKEN),
        ({"question": "q", "answer": "a"}, "question/answer", SPOKEN),
        ({"prompt": QA[:1], "completion": QA[1:]}, "prompt/completion", SPOKEN),
        ({"prompt": QA[:1], "completion": "a"}, "prompt/completion", SPOKEN),
    ],
)
def test_shapes(tmp_path: Path, record: dict[str, Any], shape: str, expected: list[tuple[str, str]] | None) -> None:
    result = read(tmp_path, "chats.jsonl", json.dumps(record))
    assert result.problems == ()
    assert result.shapes == {str(tmp_path / "chats.jsonl"): f"JSONL, {shape}"}
    assert spoken(result.chats[0]) == (expected or [("user", "ab"), ("assistant", "a")])


def test_tools_calls_and_reasoning(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": schema}}
    turns = [
        turn("user", "q", name="ann"),
        turn("assistant", None, tool_calls=[CALL], reasoning_content="hm"),
        turn("tool", "2", tool_call_id="1", name="add"),
        turn("assistant", "a", reasoning="so"),
    ]
    result = read(tmp_path, "chats.jsonl", json.dumps({"messages": turns, "tools": [tool]}))
    assert result.problems == ()
    assert result.chats[0] == Chat(
        (
            Message("user", "q"),
            Message("assistant", "", reasoning="hm", tool_calls=(CALL,)),
            Message("tool", "2", name="add", tool_call_id="1"),
            Message("assistant", "a", reasoning="so"),
        ),
        tools=(tool,),
    )


def test_arguments_as_text_and_legacy_calls_are_read_alike(tmp_path: Path) -> None:
    as_text = {"id": "1", "function": {"name": "add", "arguments": '{"x": 1}'}}
    legacy = {"name": "add", "arguments": '{"x": 1}'}
    for answer in (turn("assistant", "", tool_calls=[as_text]), turn("assistant", None, function_call=legacy)):
        result = read(tmp_path, "chats.jsonl", json.dumps({"messages": [QA[0], answer]}))
        assert result.problems == ()
        assert result.chats[0].messages[1].tool_calls[0]["function"] == CALL["function"]


def test_sharegpt_calls(tmp_path: Path) -> None:
    turns = [("human", "q"), ("function_call", '{"name": "add", "arguments": {}}'), ("observation", "2"), ("gpt", "a")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "add"}]'}
    result = read(tmp_path, "chats.jsonl", json.dumps(record))
    assert result.problems == ()
    assert [message.role for message in result.chats[0].messages] == ["user", "assistant", "tool", "assistant"]
    function = {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert result.chats[0].tools == ({"type": "function", "function": function},)


def test_mixed_shapes_are_reported(tmp_path: Path) -> None:
    lines = [good(1), good(2), b'{"instruction": "q", "output": "a"}']
    result = read(tmp_path, "chats.jsonl", b"\n".join(lines))
    assert list(result.shapes.values()) == ["JSONL, messages (2), alpaca (1)"]


# File formats


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.ndjson", "chats.JSONL", "chats.json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n", b"\r\n \t\r\n"])
def test_jsonl(tmp_path: Path, name: str, mark: bytes, newline: bytes) -> None:
    result = read(tmp_path, name, mark + good(1) + newline + good(2) + newline)
    assert result.problems == ()
    assert [chat.line for chat in result.chats] == [1, 1 + newline.count(b"\n")]
    assert list(result.shapes.values()) == ["JSONL, messages"]


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_array(tmp_path: Path, name: str, mark: bytes) -> None:
    result = read(tmp_path, name, mark + b"[\n" + good(1) + b",\n\n" + good(2) + b"\n]\n")
    assert result.problems == ()
    assert [chat.line for chat in result.chats] == [2, 4]
    assert list(result.shapes.values()) == ["JSON, messages"]


def test_pretty_printed_json_array(tmp_path: Path) -> None:
    text = json.dumps([json.loads(good(1)), json.loads(good(2))], indent=2)
    assert [chat.line for chat in read(tmp_path, "chats.json", text).chats] == [2, 14]


@pytest.mark.parametrize("indent", [None, 1])
def test_json_object_around_a_list(tmp_path: Path, indent: int | None) -> None:
    for key in ("data", "conversations", "messages"):
        wrapped = {"version": 1, key: [json.loads(good(1)), json.loads(good(2))], "by": "x"}
        result = read(tmp_path, "chats.json", json.dumps(wrapped, indent=indent))
        assert result.problems == ()
        assert len(result.chats) == 2


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("record", [{"messages": QA}, {"id": 1, "instruction": "q", "output": "a", "history": []}])
def test_json_object_that_is_one_chat(tmp_path: Path, indent: int | None, record: dict[str, Any]) -> None:
    result = read(tmp_path, "chats.json", json.dumps(record, indent=indent))
    assert result.problems == ()
    assert spoken(result.chats[0]) == SPOKEN


def test_brackets_and_quotes_inside_texts(tmp_path: Path) -> None:
    text = 'a ] } [ { , " \\ \\" \n \u2028 é'
    record = {"messages": [turn("user", text), turn("assistant", text)]}
    result = read(tmp_path, "chats.json", json.dumps([record, json.loads(good(1))], ensure_ascii=False))
    assert result.problems == ()
    assert spoken(result.chats[0])[0] == ("user", text)
    assert len(result.chats) == 2


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    turns = [QA, [turn("user", "p"), turn("assistant", None, tool_calls=[CALL])], [turn("narrator", "x")]]
    path = write_parquet(tmp_path / "chats.parquet", {"messages": turns, "score": [1.0, float("nan"), 2.0]})
    result = read_chats([path])
    assert [(problem.line, problem.kind) for problem in result.problems] == [(3, "unknown-role")]
    assert spoken(result.chats[0]) == SPOKEN
    assert result.chats[0].messages[1].tool_calls == ()
    assert result.chats[1].messages[1].tool_calls == (CALL,)
    assert result.shapes == {str(path): "Parquet, messages"}


def test_parquet_of_chats_with_different_tools_is_the_same_as_their_jsonl(tmp_path: Path) -> None:
    records = [
        {
            "messages": [QA[0], turn("assistant", None, tool_calls=[{"function": {"name": name, "arguments": given}}])],
            "tools": [{"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}}],
            "when": key,
        }
        for name, key, given in (("f", "a", {"a": "1"}), ("g", "b", {"b": "2"}))
    ]
    columns = {key: [record[key] for record in records] for key in records[0]}
    table = read_chats([write_parquet(tmp_path / "chats.parquet", columns)])
    lines = read(tmp_path, "chats.jsonl", "\n".join(map(json.dumps, records)))
    assert table.chats == lines.chats
    assert called(table.chats[0]) == {"a": "1"} and called(table.chats[1]) == {"b": "2"}


def called(chat: Chat) -> Any:
    """Return the arguments of a chat's only call."""
    function: Any = chat.messages[1].tool_calls[0]["function"]
    return function["arguments"]


def test_parts_in_parquet_are_the_same_as_in_jsonl(tmp_path: Path) -> None:
    """Each part of a content has the keys of all, and each call the arguments of all."""
    records = [
        {
            "messages": [
                turn("user", [{"type": "text", "text": "q"}]),
                turn("assistant", [
                    {"type": "text", "text": "b"}, {"type": "tool_use", "id": "1", "name": name, "input": given},
                ]),
                turn("user", [{"type": "tool_result", "tool_use_id": "1", "content": "r"}]),
                turn("assistant", [{"type": "text", "text": "a"}]),
            ]
        }
        for name, given in (("f", {"a": "1"}), ("g", {"b": "2"}))
    ]  # fmt: skip
    table = read_chats(
        [write_parquet(tmp_path / "chats.parquet", {"messages": [each["messages"] for each in records]})]
    )
    assert table.problems == ()
    assert table.chats == read(tmp_path, "chats.jsonl", "\n".join(map(json.dumps, records))).chats
    assert called(table.chats[0]) == {"a": "1"} and called(table.chats[1]) == {"b": "2"}


def write_table(path: Path, records: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        return write_parquet(path, {key: [record[key] for record in records] for key in records[0]})
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        return path
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]"
    return put(path.parent, path.name, text)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("record", "companion", "expected"),
    [
        ({"question": "q", "answer": "a"}, "context", ("user", "q\n\n{}")),
        ({"prompt": "q", "response": "a"}, "system_prompt", ("system", "{}")),
        ({"instruction": "q", "output": "a"}, "input", ("user", "q\n\n{}")),
        ({"Question": "q", "Answer": "a"}, "System", ("system", "{}")),
    ],
)
def test_companions_are_read_in_every_format(
    tmp_path: Path, record: dict[str, str], companion: str, expected: tuple[str, str], suffix: str
) -> None:
    """Records that differ in one only are no copies."""
    records = [{**record, companion: f"CREATE TABLE t{number}, {number}"} for number in (1, 2)]
    result = read_chats([write_table(tmp_path / f"chats.{suffix}", records)])
    assert result.problems == () and len({chat.content_hash() for chat in result.chats}) == 2
    role, text = expected
    for each, chat in zip(records, result.chats, strict=True):
        assert spoken(chat)[0] == (role, text.format(each[companion]))


def test_columns_that_are_not_read_may_have_any_type(tmp_path: Path) -> None:
    import datetime

    day = datetime.datetime(2026, 1, 2)
    columns = {"question": ["q"] * 3, "answer": ["a"] * 3, "made": [day, day, day], "raw": [b"\xff", b"\xff", b"\xfe"]}
    assert len(read_chats([write_parquet(tmp_path / "chats.parquet", columns)]).chats) == 2


def test_parquet_with_json_text_and_alpaca(tmp_path: Path) -> None:
    text = write_parquet(tmp_path / "text.parquet", {"conversations": [json.dumps(QA), "[{]"]})
    alpaca = write_parquet(
        tmp_path / "alpaca.parquet",
        {"instruction": ["x"] * 300, "input": [None] * 300, "output": list(map(str, range(300)))},
    )
    result = read_chats([text, alpaca])
    assert [(problem.source, problem.line, problem.kind) for problem in result.problems] == [(text, 2, "bad-json")]
    assert [chat.line for chat in result.chats] == [1, *range(1, 301)]


def test_parquet_faults(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "chats.parquet", {"words": ["a", "b"]})
    assert [(p.line, p.kind) for p in read_chats([path]).problems] == [(1, "unknown-shape")]
    pa = pytest.importorskip("pyarrow")
    broken = pa.array([b"q\xff", b"p"], pa.binary()).view(pa.string())
    path = write_parquet(tmp_path / "utf8.parquet", {"prompt": broken, "completion": ["a", "a"]})
    result = read_chats([path])
    assert [(p.line, p.kind) for p in result.problems] == [(1, "bad-utf-8")]
    assert len(result.chats) == 1
    cut = put(tmp_path, "cut.parquet", path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: can't be read as Parquet"):
        read_chats([cut])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("chats.jsonl", b"", "is empty"),
        ("chats.jsonl", b" \n\r\n\n", "has no chats"),
        ("chats.jsonl", b"\xef\xbb\xbf", "has no chats"),
        ("chats.json", b"\n", "has no chats"),
        ("chats.json", b"[ ]", "has no chats"),
        ("chats.json", b'{"data": []}', "has no chats"),
        ("chats.csv", b"prompt,completion\n", "has no chats"),
        ("chats.txt", b"x", "unknown file format .txt"),
        ("chats", b"x", "no extension"),
        ("chats.parquet", b"PAR1 no PAR1", "can't be read as Parquet"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read(tmp_path, name, data)
    assert name in caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "hint"), [("a.txt", "one chat on each line"), ("a.docx", "Documents are no chats"), ("a.zip", "Unpack")]
)
def test_other_formats_get_the_hint_that_fits(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, b"x")
    assert hint in caught.value.hint


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl"])
@pytest.mark.parametrize("turns", [QA, [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]])
def test_a_file_that_is_the_turns_of_one_chat(tmp_path: Path, indent: int | None, name: str, turns: Any) -> None:
    assert spoken(read(tmp_path, name, json.dumps(turns, indent=indent)).chats[0]) == SPOKEN


def test_lines_that_are_lists_of_turns(tmp_path: Path) -> None:
    lines = [[turn("user", f"q{number}"), QA[1]] for number in range(3)]
    result = read(tmp_path, "chats.jsonl", "\n".join(map(json.dumps, lines)))
    assert [chat.line for chat in result.chats] == [1, 2, 3]
    assert len(read(tmp_path, "chats.json", json.dumps(lines)).chats) == 3


def test_missing_folder_and_forbidden(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_chats([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match="is a folder"):
        read_chats([tmp_path])
    with pytest.raises(DataError, match="no file can have this name"):
        read_chats([tmp_path / "a\0.jsonl"])
    with pytest.raises(DataError, match="can't be read"):
        read_chats([tmp_path / ("x" * 300 + ".jsonl")])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_chats([tmp_path / "pipe.jsonl"])


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, "chats.jsonl", good(1))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="no permission"):
        read_chats([path])


def test_problems_are_in_order_of_file_and_line(tmp_path: Path) -> None:
    second, first = put(tmp_path, "b.jsonl", b"x\nx\n"), put(tmp_path, "a.jsonl", b"{}\nx\n")
    locations = [(problem.source, problem.line) for problem in read_chats([second, first]).problems]
    assert locations == [(second, 1), (second, 2), (first, 1), (first, 2)]


# Arbitrary bytes

MARKS = [bytes([byte]) for byte in b'{}[],:"\\\n\r\0\xff']
WORDS = [b"\xef\xbb\xbf", b"NaN", b"1e999", b"a,b", b"prompt,completion\n", good(1)]
KEYS = [b'"messages":', b'"data":', b'"role": "user",', b'"content": "x"']
PIECES = st.sampled_from([*MARKS, *WORDS, *KEYS])
NOISE = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=25).map(b"".join))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=NOISE)
@example(data=b"")
@example(data=b'{"":0}\r0')
def test_arbitrary_bytes_raise_no_other_error(suffix: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), "noise" + suffix, data)
        try:
            result = read_chats([path])
        except KolotuneError:
            return
        assert result.chats or result.problems
        for problem in result.problems:
            assert 1 <= problem.line <= data.count(b"\n") + 1
            assert str(problem).isprintable()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
SPOKEN_TEXT = TEXT.filter(str.strip)
ARGUMENTS = st.dictionaries(TEXT, st.one_of(TEXT, st.integers(-(10**20), 10**20), st.booleans()), max_size=2)
CALLS = st.builds(
    lambda name, arguments: ({"type": "function", "function": {"name": name, "arguments": arguments}},),
    SPOKEN_TEXT,
    ARGUMENTS,
)
ANSWER = st.builds(Message, st.just("assistant"), SPOKEN_TEXT, st.none() | TEXT.filter(bool))
CALLING = st.builds(Message, st.just("assistant"), TEXT, st.none(), CALLS)
RESULT = st.builds(Message, st.just("tool"), TEXT, st.none(), st.just(()), st.none() | TEXT, st.none() | TEXT)
EXCHANGE = st.builds(
    lambda asked, called, answer: [Message("user", asked), *called, answer],
    SPOKEN_TEXT,
    st.just(()) | st.tuples(CALLING, RESULT),
    ANSWER,
)
CHATS = st.builds(
    lambda system, exchanges, tools: Chat((*system, *chain(*exchanges)), tools=tuple(tools)),
    st.lists(st.builds(Message, st.just("system"), TEXT), max_size=1),
    st.lists(EXCHANGE, min_size=1, max_size=3),
    st.lists(ARGUMENTS, max_size=2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chats=st.lists(CHATS, min_size=1, max_size=4, unique_by=repr), ascii_only=st.booleans())
def test_round_trip(chats: list[Chat], ascii_only: bool) -> None:
    records = [{"messages": chat.message_dicts(), "tools": list(chat.tools)} for chat in chats]
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    array = json.dumps(records, ensure_ascii=ascii_only, indent=1)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("chats.jsonl", lines), ("chats.json", array)):
            result = read(Path(folder), name, text)
            assert result.problems == ()
            assert list(result.chats) == chats

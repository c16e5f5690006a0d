"""Shapes of records: each row of the tables in docs/chat-files.md, and keys that are read, used or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.documented_chats import rows, shown

from kolotune.chats.chat import trained_answers
from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.files import ReadChat, read_chat
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart
from kolotune.chats.reading.records import parsed_record
from kolotune.chats.reading.shapes import read_record

OPTIONS = ReadingOptions()
TRAIN_ON = ("`all`", "`last`", "`flagged`")


def read(record: Any, options: ReadingOptions = OPTIONS) -> ReadChat:
    data = record if isinstance(record, str) else json.dumps(record)
    return read_chat(Path("chats.jsonl"), parsed_record(1, data.encode()), options)


@pytest.mark.parametrize(("name", "record", "chat"), rows("as in", "record", "chat"))
def test_shapes(name: str, record: str, chat: str) -> None:
    result = read(record.strip("`"))
    assert result.problems == (), name
    assert shown(result.chat) == chat


def test_the_tables_are_read() -> None:
    assert len(list(rows("as in", "record", "chat"))) > 55
    assert len(list(rows("says", "record", "trained answers"))) == 16
    assert len(list(rows("record", "without", "with `--fix-turns`"))) == 6
    assert len(list(rows("record", *TRAIN_ON))) == 8


@pytest.mark.parametrize(("name", "record", "answers"), rows("says", "record", "trained answers"))
def test_what_its_author_says_is_trained_on(name: str, record: str, answers: str) -> None:
    result = read(record.strip("`"))
    assert result.problems == (), name
    assert trained_of(result) == answers


def trained_of(result: ReadChat) -> str:
    """Return the trained answers as the tables write them."""
    messages = [result.chat.messages[number] for number in trained_answers(result.chat)] if result.chat else []
    trained = [each.content + (f" ({each.weight})" if each.weight < 1 else "") for each in messages]
    return ", ".join(trained) or "none: left out"


@pytest.mark.parametrize(("record", "everything", "last", "flagged"), rows("record", *TRAIN_ON))
def test_which_answers_count(record: str, everything: str, last: str, flagged: str) -> None:
    found = [read(record.strip("`"), ReadingOptions(train_on=choice)) for choice in ("all", "last", "flagged")]
    assert [each.problems for each in found] == [(), (), ()]
    assert [trained_of(each) for each in found] == [everything, last, flagged]


@pytest.mark.parametrize(("turns", "kind", "fixed"), rows("record", "without", "with `--fix-turns`"))
def test_fixed_orders(turns: str, kind: str, fixed: str) -> None:
    record = {"messages": json.loads(turns.strip("`"))}
    assert [problem.kind for problem in read(record).problems] == [kind]
    result = read(record, ReadingOptions(fixes_turns=True))
    assert shown(result.chat) == fixed
    assert len(result.fixes) == 1


# Keys


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "unread", "differs"),
    [
        ({"messages": [Q, A]}, (), False),
        ({"messages": [Q, A], "id": 3, "Source": "x"}, ("id", "Source"), False),
        ({"messages": [Q, A], "notes": "x", "id": 3}, ("notes", "id"), True),
        ({"messages": [Q, A], "notes": "", "more": None, "list": []}, (), False),
        ({"messages": [{**Q, "name": "ann"}, A]}, ("turns: name",), True),
        ({"messages": [Q, {**A, "feedback": {"good": True}}]}, ("turns: feedback",), True),
        ({"messages": [Q, {**A, "value": "another"}]}, ("turns: value",), True),
        ({"question": "q", "answer": "a", "passage": "p"}, ("passage",), True),
        ({"messages": [Q, A], "prompt": "q", "prompt_id": "1"}, ("prompt_id",), False),
        ({"messages": [Q, A], "prompt": "another"}, ("prompt",), True),
        ({"problem": "q", "solution": "a", "answer": "42"}, ("answer",), True),
        ({"instruction": "q", "output": "a", "context": "c", "text": "### Instruction: q"}, ("text",), True),
        ({"Question": "q", "question": "r", "answer": "a"}, ("question",), True),
    ],
)
def test_keys_that_are_not_read_are_named(record: Any, unread: tuple[str, ...], differs: bool) -> None:
    result = read(record)
    assert result.chat is not None
    assert result.unread == unread
    assert bool(result.unread_hash) is differs


def options(mapping: dict[str, RecordPart], *ignored: str) -> ReadingOptions:
    return ReadingOptions(tuple(mapping.items()), ignored)


@pytest.mark.parametrize(
    ("record", "mapping", "chat"),
    [
        ({"frage": "q", "antwort": "a"}, {"frage": RecordPart.QUESTION, "antwort": RecordPart.ANSWER}, "U q · A a"),
        ({"question": "q", "answer": "a", "schema": "s"}, {"schema": RecordPart.CONTEXT}, "U q\\n\\ns · A a"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": RecordPart.ANSWER}, "U q · A a"),
        ({"chosen": [Q, A], "rejected": [Q]}, {"chosen": RecordPart.TURNS}, "U q · A a"),
        ({"chosen": "Human: q\n\nAssistant: a"}, {"chosen": RecordPart.TURNS}, "U q · A a"),
        ({"messages": [Q, A], "persona": "s"}, {"persona": RecordPart.SYSTEM}, "S s · U q · A a"),
        ({"problem": "q", "solution": "b", "answer": "a"}, {"answer": RecordPart.ANSWER}, "U q · A a"),
        ({"question": "q", "answer": "a", "why": "t"}, {"why": RecordPart.REASONING}, "U q · A(t) a"),
        (
            {"question": "q", "answer": "a", "b": "1", "c": "2"},
            {"b": RecordPart.CONTEXT, "c": RecordPart.CONTEXT},
            "U q\\n\\n1\\n\\n2 · A a",
        ),
    ],
)
def test_mapped_keys(record: Any, mapping: dict[str, RecordPart], chat: str) -> None:
    assert shown(read(record, options(mapping)).chat) == chat


def test_ignored_keys_are_neither_read_nor_named() -> None:
    record = {"messages": [Q, {**A, "weight": 0.5, "note": "x"}], "system": "s", "other": "x"}
    result = read(record, options({}, "system", "other", "weight", "note"))
    assert shown(result.chat) == "U q · A a"
    assert result.unread == () and result.unread_hash == 0


@pytest.mark.parametrize("media", ["image", "images", "audio", "videos"])
def test_media_are_refused_unless_they_are_ignored(media: str) -> None:
    record = {"messages": [{**Q, "content": f"<{media}>q"}, A], media: ["x.png"]}
    assert [problem.kind for problem in read(record).problems] == ["unsupported-content"]
    assert read(record, options({}, media)).chat is not None
    assert read({**record, media: None}).chat is not None


# Loss


@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train", "training", "trainable", "loss_weight"])
@pytest.mark.parametrize(
    ("value", "trained"),
    [(0, False), (0.0, False), ("0", False), (False, False), ("False", False), (1, True), ("1.0", True), (True, True)],
)
def test_every_spelling_of_a_flag(key: str, value: Any, trained: bool) -> None:
    chat = read({"messages": [Q, {**A, key: value}, Q, A]}).chat
    assert chat is not None
    assert trained_answers(chat) == ([1, 3] if trained else [3])


@pytest.mark.parametrize("value", [1.5, 2, -1, "half", [1], {"a": 1}, "nan"])
def test_what_is_no_weight_is_refused(value: Any) -> None:
    assert [problem.kind for problem in read({"messages": [Q, {**A, "weight": value}]}).problems] == ["not-supported"]
    assert read({"messages": [{**Q, "weight": value}, A]}).chat is not None


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_mask", "loss_scale"])
@pytest.mark.parametrize("value", [0.5, "0.5", 0.125])
def test_a_fraction_weighs_an_answer(key: str, value: Any) -> None:
    chat = read({"messages": [{**Q, key: 0.1}, {**A, key: value}, Q, A]}).chat
    assert chat is not None
    assert [message.weight for message in chat.messages] == [1, float(value), 1, 1]
    of_record = read({"messages": [Q, {**A, key: value}, Q, A], key: 0.5}).chat
    assert of_record is not None
    assert [message.weight for message in of_record.messages] == [1, float(value) / 2, 1, 0.5]
    of_list = read({"messages": [Q, {**A, "weight": 0.75}, Q, A], key: [0, value, 0, 0.25]}).chat
    assert of_list is not None
    assert [message.weight for message in of_list.messages] == [1, float(value), 1, 0.25]


@pytest.mark.parametrize("key", ["train", "trainable", "masked", "loss"])
def test_a_flag_is_no_fraction(key: str) -> None:
    (problem,) = read({"messages": [Q, {**A, key: 0.5}]}).problems
    assert problem.kind == "not-supported" and "it is 0 or 1" in str(problem)


def test_a_call_and_its_text_have_the_weight_of_their_turn() -> None:
    call = {"from": "function_call", "value": '{"name": "f"}', "weight": 0.5}
    text, result = {"from": "gpt", "value": "a"}, {"from": "observation", "value": "r"}
    chat = read({"conversations": [{"from": "human", "value": "q"}, call, result, text], "weight": 0.5}).chat
    assert chat is not None
    assert [message.weight for message in chat.messages] == [1, 0.25, 1, 0.5]


def test_lists_of_another_length_are_refused() -> None:
    assert [problem.kind for problem in read({"messages": [Q, A], "loss_mask": [1]}).problems] == ["not-supported"]


def test_a_chat_without_a_trained_answer_is_left_out() -> None:
    result = read({"messages": [Q, {**A, "weight": 0}]})
    assert result.chat is None and result.problems == ()


def test_a_call_is_an_answer() -> None:
    call = {"from": "function_call", "value": '{"name": "f"}'}
    turns = [
        {"from": "human", "value": "q"},
        call,
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
    ]
    last = read({"conversations": turns}, ReadingOptions(train_on="last")).chat
    turns[1] = {**call, "weight": 1}
    flagged = read({"conversations": turns}, ReadingOptions(train_on="flagged")).chat
    assert last is not None and flagged is not None
    assert (trained_answers(last), trained_answers(flagged)) == ([3], [1])


def test_faults_are_the_same_whichever_answers_count() -> None:
    for choice in ("all", "last", "flagged"):
        found = read({"messages": [Q, {**A, "weight": 7}]}, ReadingOptions(train_on=choice))
        assert [problem.kind for problem in found.problems] == ["not-supported"]


def test_flags_take_part_in_what_a_chat_is() -> None:
    plain, masked = (read({"messages": [Q, {**A, "weight": weight}, Q, A]}).chat for weight in (1, 0))
    assert plain is not None and masked is not None
    assert plain.content_hash() != masked.content_hash()


# Calls


@pytest.mark.parametrize("arguments", [{}, "{}", "", None, "null", " "])
def test_calls_without_arguments(arguments: Any) -> None:
    calls = [
        {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"function_call": {"name": "f", "arguments": arguments}},
        {"tool_calls": [{"name": "f", "arguments": arguments}]},
    ]
    for call in calls:
        assert shown(read({"messages": [Q, {"role": "assistant", **call}]}).chat) == "U q · A f{}"
    chat = read({"messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}).chat
    assert shown(chat) == "U q · A f{}"


def test_nulls_in_arguments_of_json_stay() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": null}'}}
    chat = read({"messages": [Q, {"role": "assistant", "tool_calls": [call]}]}).chat
    assert shown(chat) == 'U q · A f{"x": null}'


@pytest.mark.parametrize(
    "call",
    [
        {"name": "f", "args": {"x": 1}},
        {"name": "f", "input": {"x": 1}},
        {"name": "f", "parameters": '{"x": 1}'},
        {"tool_name": "f", "tool_input": {"x": 1}},
        {"function": "f", "arguments": {"x": 1}},
        '{"name": "f", "arguments": {"x": 1}}',
    ],
)
def test_flat_calls(call: Any) -> None:
    assert shown(read({"messages": [Q, {"role": "assistant", "tool_calls": [call]}]}).chat) == 'U q · A f{"x": 1}'


@pytest.mark.parametrize("key", ["thinking", "thought", "thoughts", "reasoning", "reasoning_content", "cot", "think"])
def test_thoughts_under_every_key(key: str) -> None:
    assert shown(read({"messages": [Q, {**A, key: "t"}]}).chat) == "U q · A(t) a"
    assert shown(read({"question": "q", "answer": "a", key: "t"}).chat) == "U q · A(t) a"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "t"},
        {"type": "thinking", "thinking": "t", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "t"}]},
        {"type": "reasoning", "text": "t"},
    ],
    ids=["Anthropic", "signed", "Magistral", "AI SDK"],
)
def test_thoughts_in_parts(part: Any) -> None:
    answer = {"role": "assistant", "content": [part, {"type": "text", "text": "a"}]}
    assert shown(read({"messages": [Q, answer]}).chat) == "U q · A(t) a"


@pytest.mark.parametrize(("thinking", "kinds"), [("", []), ([], []), ([{"type": "image"}], ["unsupported-content"])])
def test_parts_without_a_thought(thinking: Any, kinds: list[str]) -> None:
    answer = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": "a"}],
    }
    result = read({"messages": [Q, answer]})
    assert [problem.kind for problem in result.problems] == kinds
    assert result.chat is None or shown(result.chat) == "U q · A a"


@pytest.mark.parametrize(
    ("record", "shown_or_kind"),
    [
        ({"question": "q", "answer": "a", "reasoning": "t", "thinking": "u"}, "U q · A(t\n\nu) a"),
        ({"question": "q", "answer": "a", "reasoning": "t", "thinking": "t"}, "U q · A(t) a"),
        ({"prompt": "q", "completion": [{**A, "reasoning": "u"}], "cot": "t"}, "U q · A(t\n\nu) a"),
        ({"question": "q", "answer": "a", "reasoning": "t", "thinking": ["u"]}, "bad-reasoning"),
        ({"messages": [{**Q, "content": [{"type": "thinking", "thinking": "t"}]}, A]}, "bad-reasoning"),
        (
            {"tools": [{"name": "f"}], "messages": [{**S, "tools": [{"name": "g"}]}, Q, A]},
            "f offered · g offered · S s · U q · A a",
        ),
        (
            {"tools": [{"name": "f"}], "messages": [{**S, "tools": [{"name": "f"}]}, Q, A]},
            "f offered · S s · U q · A a",
        ),
        ({"messages": [Q, {**A, "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]}, "bad-tool-call"),
        ({"messages": [Q, {**A, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}]}, "U q · A a f{}"),
    ],
)  # fmt: skip
def test_what_is_said_under_two_keys_is_read_from_both(record: Any, shown_or_kind: str) -> None:
    result = read(record)
    said = shown(result.chat) if result.chat is not None else [problem.kind.value for problem in result.problems]
    assert said in (shown_or_kind, [shown_or_kind])
    assert result.unread == ()


THOUGHT = {"role": "thinking", "content": "t"}
CALL = {"role": "tool_call", "content": '{"name": "f"}'}


@pytest.mark.parametrize(
    ("turns", "shown_or_kind"),
    [
        ([Q, THOUGHT, A], "U q · A(t) a"),
        ([Q, THOUGHT, {**THOUGHT, "content": "<think>\nu\n</think>"}, A], "U q · A(t\n\nu) a"),
        ([Q, THOUGHT, {**A, "reasoning": "u"}], "U q · A(t\n\nu) a"),
        ([Q, THOUGHT, CALL, {"role": "tool", "content": "r"}, THOUGHT, A], "U q · A(t) f{} · T r · A(t) a"),
        ([Q, THOUGHT, Q, A], "bad-reasoning"),
        ([Q, A, THOUGHT], "bad-reasoning"),
        ([Q, {**THOUGHT, "content": None}, A], "bad-reasoning"),
        ([Q, {**THOUGHT, "train": False}, A], "not-supported"),
        # Behind a text, or behind another call, there is no place for a thought.
        ([Q, A, THOUGHT, CALL, {"role": "tool", "content": "r"}, A], "two-assistants"),
        ([Q, CALL, {**CALL, "reasoning": "u"}, {"role": "tool", "content": "r"}, A], "two-assistants"),
    ],
)
def test_thoughts_in_turns_of_their_own(turns: list[Any], shown_or_kind: str) -> None:
    result = read({"messages": turns})
    if result.chat is None:
        assert shown_or_kind in [problem.kind for problem in result.problems]
    else:
        assert shown(result.chat) == shown_or_kind


@pytest.mark.parametrize("user", ["Human", "USER", "human", "prompter"])
@pytest.mark.parametrize("assistant", ["Assistant", "GPT", "model", "bot", "ChatGPT", "ai"])
def test_roles_in_any_case(user: str, assistant: str) -> None:
    turns = [{"from": user, "value": "q"}, {"from": assistant, "value": "a"}]
    assert shown(read({"conversations": turns}).chat) == "U q · A a"


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "tool_result", "ipython"])
def test_results_of_tools(role: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    assert shown(read({"messages": [Q, call, {"role": role, "content": "r"}, A]}).chat) == "U q · A f{} · T r · A a"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": ["q", "r"], "answer": ["a", "b"]}, "2 texts each, as columns"),
        ({"Prompt": {"0": "q", "1": "r"}, "Completion": {"0": "a", "1": "b"}}, "2 texts each, as columns"),
        (
            {"question": "q", "answers": [{"text": "a", "votes": 1}, {"text": "b", "votes": 2}]},
            "keep the text of one of them",
        ),
        ({"question": "q", "answer": ["a", "b"]}, "keep the one to train on"),
        ({"title": "t", "mapping": {}}, "ChatGPT"),
        ([[{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}]], "list of lists"),
        ({"prompt": "q", "response_a": "a", "response_b": "b"}, "--objective dpo"),
    ],
)
def test_records_that_are_no_chat_are_called_what_they_are(record: Any, words: str) -> None:
    (fault,) = read_record(record).faults
    assert words in fault.detail


def test_exports_of_claude() -> None:
    said = [{"uuid": "1", "sender": "human", "text": "q"}, {"uuid": "2", "sender": "assistant", "text": "a"}]
    shaped = read_record({"uuid": "x", "name": "n", "chat_messages": said})
    assert [(message.role, message.content) for message in shaped.messages] == [("user", "q"), ("assistant", "a")]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "record",
    [
        {"data": {"messages": TURNS}},
        {"row_idx": 3, "row": {"messages": TURNS}, "truncated_cells": []},
        {"conversation": {"messages": TURNS, "language": "en"}, "score": 0.5},
        {"body": {"question": "q", "answer": "a"}},
        {"messages": [{"role": each["role"], "content": {"text": each["content"], "image": None}} for each in TURNS]},
    ],
)
def test_a_chat_in_an_object_of_its_own(record: dict[str, Any]) -> None:
    shaped = read_record(record)
    assert not shaped.faults
    assert [(message.role, message.content) for message in shaped.messages] == [("user", "q"), ("assistant", "a")]
    assert {"score"} & set(record) <= set(shaped.unread), "what is beside it is named"


def test_two_objects_with_chats_are_refused() -> None:
    (fault,) = read_record({"a": {"messages": TURNS}, "b": {"messages": TURNS}}).faults
    assert fault.kind is FaultKind.UNKNOWN_SHAPE


def test_a_content_with_an_image_is_refused() -> None:
    first = {"role": "user", "content": {"text": "q", "image": "x.png"}}
    (fault,) = read_record({"messages": [first, TURNS[1]]}).faults
    assert fault.kind is FaultKind.UNSUPPORTED_CONTENT

"""Records of preferences: each row of the tables in docs/chat-files.md, and what is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.documented_chats import rows, shown, turns_shown

from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.files import ReadChat, opened, read_chat, read_chats
from kolotune.chats.reading.preferences import read_preference
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart
from kolotune.chats.reading.records import parsed_record
from kolotune.chats.reading.turn_fixes import TurnFix
from kolotune.foundation.objectives import LearnsFrom

PAIRS, RATED = (ReadingOptions(learns_from=each) for each in (LearnsFrom.PAIRS, LearnsFrom.RATED))
NUMBERS = ("", "Unnamed: 0", "__index_level_0__")
Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


def read(record: Any, options: ReadingOptions = PAIRS) -> ReadChat:
    data = record if isinstance(record, str) else json.dumps(record)
    return read_chat(Path("pairs.jsonl"), parsed_record(7, data.encode()), options)


def kinds(record: Any, options: ReadingOptions = PAIRS) -> list[FaultKind]:
    result = read(record, options)
    assert result.chat is None
    return [problem.kind for problem in result.problems]


@pytest.mark.parametrize(("name", "record", "preferred", "rejected"), rows("as in", "record", "preferred", "rejected"))
def test_pairs(name: str, record: str, preferred: str, rejected: str) -> None:
    for options in (PAIRS, RATED):
        result = read(record.strip("`"), options)
        assert result.problems == (), name
        assert result.chat is not None
        assert (shown(result.chat), shown(result.chat.rejected_chat)) == (preferred, rejected)


@pytest.mark.parametrize(("name", "record", "chat", "is_good"), rows("as in", "record", "chat", "good"))
def test_labelled_answers(name: str, record: str, chat: str, is_good: str) -> None:
    result = read(record.strip("`"), RATED)
    assert result.chat is not None, name
    assert (shown(result.chat), result.chat.is_desirable) == (chat, is_good == "yes")
    assert not result.chat.rejected


def test_there_are_such_tables() -> None:
    assert len(list(rows("as in", "record", "preferred", "rejected"))) >= 12
    assert len(list(rows("as in", "record", "chat", "good"))) >= 4


def test_only_the_last_answer_is_trained_on() -> None:
    """What both chats begin with is the prompt; answers in it are not trained on."""
    before = [Q, A, {"role": "user", "content": "r"}]
    chat = read({"chosen": [*before, A], "rejected": [*before, B]}).chat
    assert chat is not None
    assert [message.weight for message in chat.messages] == [1, 0, 1, 1]
    assert [message.weight for message in chat.rejected] == [1, 0, 1, 1]
    rated = read({"messages": [*before, B], "label": False}, RATED).chat
    assert rated is not None and [message.weight for message in rated.messages] == [1, 0, 1, 1]


def test_every_key_is_read_used_or_named() -> None:
    result = read({"prompt": "q", "chosen": "a", "rejected": "b", "note": "n", "score_chosen": 5, "empty": None})
    assert set(result.unread) == {"note", "score_chosen"}
    ultra = {"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B], "score_rejected": 1.0}
    assert read(ultra).unread == ("score_rejected",)
    openai = {"input": {"messages": [Q], "temperature": 1}, "preferred_output": [A], "non_preferred_output": [B]}
    assert read(openai).unread == ("temperature",)


def test_other_keys_are_mapped() -> None:
    parts = (("frage", RecordPart.QUESTION), ("gut", RecordPart.CHOSEN), ("schlecht", RecordPart.REJECTED))
    options = ReadingOptions(parts=parts, learns_from=LearnsFrom.PAIRS)
    chat = read({"Frage": "q", "Gut": "a", "Schlecht": "b"}, options).chat
    assert chat is not None and turns_shown(chat.rejected) == "U q · A b"
    options = ReadingOptions(parts=(("thumb", RecordPart.LABEL),), learns_from=LearnsFrom.RATED)
    rated = read({"prompt": "q", "completion": "a", "thumb": "bad"}, options).chat
    assert rated is not None and not rated.is_desirable


def test_one_mapped_key_is_enough_and_a_known_key_with_another_part_is_no_answer() -> None:
    """Otherwise a typing error in one of two keys would turn the preference round."""
    chosen = ReadingOptions(parts=(("accepted", RecordPart.CHOSEN),), learns_from=LearnsFrom.PAIRS)
    chat = read({"prompt": "q", "accepted": "a", "rejected": "b"}, chosen).chat
    assert chat is not None and turns_shown(chat.rejected) == "U q · A b"
    swapped = (("chosn", RecordPart.CHOSEN), ("chosen", RecordPart.REJECTED))
    options = ReadingOptions(parts=swapped, learns_from=LearnsFrom.PAIRS)
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert kinds(record, options) == [FaultKind.NO_PREFERENCE]
    chat = read({**record, "chosn": "c"}, options).chat
    assert chat is not None and turns_shown(chat.rejected) == "U q · A a"


@pytest.mark.parametrize(
    ("record", "kind", "said"),
    [
        ({"chosen": [Q, A], "rejected": [{"role": "user", "content": "z"}, B]}, FaultKind.DIFFERENT_PROMPTS, "turn 1"),
        ({"chosen": [Q, A], "rejected": [Q, A, Q, B]}, FaultKind.DIFFERENT_PROMPTS, "rejected only continues"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, FaultKind.EMPTY_ANSWER, "rejected"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, FaultKind.EMPTY_ANSWER, "chosen"),
        ({"chosen": "a", "rejected": "b"}, FaultKind.NO_PREFERENCE, "there is no prompt"),
        ({"chosen": [A], "rejected": [B]}, FaultKind.NO_PREFERENCE, "there is no prompt"),
        ({"prompt": "q", "completion": "a"}, FaultKind.NO_PREFERENCE, "--objective sft"),
        ({"prompt": "q", "completion": "a", "label": True}, FaultKind.NO_PREFERENCE, "--objective kto"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.5}, FaultKind.NOT_SUPPORTED, "ignore-keys weight"),
        ([1], FaultKind.NOT_AN_OBJECT, "a list"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_named(record: Any, kind: FaultKind, said: str) -> None:
    assert kinds(record) == [kind]
    (problem,) = read(record).problems
    assert said in str(problem) and str(problem).startswith("pairs.jsonl:7: ")


def test_what_only_one_side_does_not_read_or_changes_is_counted() -> None:
    loud, more = {**B, "mood": "rude"}, {"role": "user", "content": "thanks"}
    fixing = ReadingOptions(fixes_turns=True, learns_from=LearnsFrom.PAIRS)
    result = read({"prompt": [Q], "chosen": [A], "rejected": [loud, more]}, fixing)
    assert result.unread == ("turns: mood",) and result.fixes == (TurnFix.LAST_TURN,)
    both = read({"prompt": [Q], "chosen": [A, more], "rejected": [B, more]}, fixing)
    assert both.fixes == (TurnFix.LAST_TURN,) and not both.unread
    other = read({"prompt": [Q], "chosen": [A], "rejected": [{**loud, "mood": "mild"}, more]}, fixing)
    assert len({result.unread_hash, other.unread_hash, both.unread_hash}) == 3


def test_answers_that_their_author_excludes_leave_out_the_record() -> None:
    """Also where only an answer before them is not excluded; it belongs to the prompt."""
    before, unweighed = [Q, A, {"role": "user", "content": "r"}], {**B, "weight": 0}
    for record in (
        {"chosen": [*before, A], "rejected": [*before, unweighed]},
        {"chosen": [*before, unweighed], "rejected": [*before, A]},
        {"messages": [*before, unweighed], "label": False},
    ):
        result = read(record, RATED)
        assert result.chat is None and result.problems == ()


def test_weights_of_answers_are_refused_but_those_in_the_prompt_do_not_count() -> None:
    lighter, turn = {**A, "weight": 0.5}, {"role": "user", "content": "r"}
    for record in (
        {"prompt": [Q], "chosen": [lighter], "rejected": [B]},
        {"messages": [Q, lighter], "label": True},
        {"prompt": "q", "completion": "a", "weight": 0.5, "label": True},
    ):
        assert kinds(record, RATED) == [FaultKind.NOT_SUPPORTED]
    assert read({"messages": [Q, lighter, turn, B], "label": True}, RATED).chat is not None
    assert read({"prompt": [Q, lighter, turn], "chosen": [A], "rejected": [B]}).chat is not None


def test_reasoning_beside_two_answers_is_of_neither() -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "rationale": "a is kinder"}
    result = read(record)
    assert result.chat is not None and result.unread == ("rationale",)
    assert not any(message.reasoning for message in (*result.chat.messages, *result.chat.rejected))
    parts = (("rationale", RecordPart.REASONING),)
    mapped = read(record, ReadingOptions(parts=parts, learns_from=LearnsFrom.PAIRS)).chat
    assert mapped is not None and mapped.messages[-1].reasoning == "a is kinder"


def test_text_beside_tools_may_be_a_call() -> None:
    call, tools = '[{"name": "f", "arguments": {}}]', [{"name": "f"}]
    chat = read({"prompt": "q", "tools": tools, "chosen": call, "rejected": "b"}).chat
    assert chat is not None and turns_shown(chat.messages) == "U q · A f{}"
    chat = read({"prompt": "q", "tools": tools, "chosen": '[{"x": 1}]', "rejected": "b"}).chat
    assert chat is not None and turns_shown(chat.messages) == 'U q · A [{"x": 1}]'


@pytest.mark.parametrize("label", [None, "", "  "])
def test_an_empty_label_is_named(label: Any) -> None:
    (problem,) = read({"prompt": "q", "completion": "a", "label": label}, RATED).problems
    assert "label is empty" in str(problem)


@pytest.mark.parametrize("label", ["maybe", 2, [True], 0.5])
def test_a_label_is_true_or_false(label: Any) -> None:
    assert kinds({"prompt": "q", "completion": "a", "label": label}, RATED) == [FaultKind.NO_PREFERENCE]


def test_chats_without_a_label_are_named() -> None:
    assert kinds({"prompt": "q", "completion": "a"}, RATED) == [FaultKind.NO_PREFERENCE]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]},
    ],
)
def test_pairs_under_the_supervised_objective_are_refused_with_advice(record: Any) -> None:
    (problem,) = read(record, ReadingOptions()).problems
    assert problem.kind is FaultKind.UNKNOWN_SHAPE and "--objective dpo" in str(problem)


def test_columns_that_have_no_pair_are_reported_once(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("prompt,chosen,rejected\nq,a,b\nr,c,d\n", encoding="utf-8")
    bad.write_text("question,answer\nq,a\nr,b\n", encoding="utf-8")
    assert [turns_shown(chat.rejected) for chat in read_chats([good], PAIRS).chats] == ["U q · A b", "U r · A d"]
    (problem,) = read_chats([bad], PAIRS).problems
    assert problem.kind is FaultKind.NO_PREFERENCE and "no record was read" in str(problem)
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("prompt,completion,label\nq,a,True\nr,b,false\n", encoding="utf-8")
    assert [chat.is_desirable for chat in read_chats([labelled], RATED).chats] == [True, False]
    with opened(labelled, PAIRS) as (_, records):
        assert len(list(records)) == 1


def test_a_table_of_pairs_and_labelled_answers(tmp_path: Path) -> None:
    """A table gives each record every key."""
    table = tmp_path / "both.csv"
    table.write_text(",prompt,chosen,rejected,completion,label\n0,q,a,b,,\n1,r,,,c,False\n2,s,,b,,\n", encoding="utf-8")
    read_table = read_chats([table], RATED)
    pair, rated = read_table.chats
    assert turns_shown(pair.rejected) == "U q · A b"
    assert turns_shown(rated.messages) == "U r · A c" and not rated.is_desirable and not rated.rejected
    (problem,) = read_table.problems
    assert problem.line == 4 and "chosen" in str(problem)


def test_row_numbers_of_pandas_describe_records() -> None:
    records = [{name: number, "prompt": "q", "chosen": "a", "rejected": "b"} for number in (1, 2) for name in NUMBERS]
    assert {read(record).unread_hash for record in records} == {0}


def test_pairs_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["q"], "chosen": [[Q, A]], "rejected": [[Q, B]], "score": [1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    (chat,) = read_chats([tmp_path / "pairs.parquet"], PAIRS).chats
    assert turns_shown(chat.rejected) == "U q · A b"


def test_both_answers_and_the_label_are_in_the_hash() -> None:
    hashes = set()
    for record in (
        {"chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": "c"},
        {"chosen": "b", "rejected": "a"},
    ):
        chat = read({"prompt": "q", **record}).chat
        assert chat is not None
        hashes.add(chat.content_hash())
    for label in (True, False):
        chat = read({"prompt": "q", "completion": "a", "label": label}, RATED).chat
        assert chat is not None
        hashes.add(chat.content_hash())
    assert len(hashes) == 5


@pytest.mark.parametrize(("winner", "chosen"), [("model_a", "a"), ("model_b", "b"), ("tie (bothbad)", None), ("", "")])
def test_a_verdict_says_which_answer_is_preferred(winner: str, chosen: str | None) -> None:
    read = read_preference({"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}, PAIRS)
    if chosen == "":
        assert [fault.kind for fault in read.faults] == [FaultKind.NO_PREFERENCE] and "model_a" in read.faults[0].detail
    elif chosen is None:
        assert read.messages == read.rejected, "counted as a pair that decides nothing"
    else:
        assert (read.messages[-1].content, read.rejected[-1].content) == (chosen, {"a": "b", "b": "a"}[chosen])

"""From files of chats to counted tokens, with SmolLM2's real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune import config as configs
from kolotune import smollm2
from kolotune.chats.preparing import Prepared, prepare_chats, require_good
from kolotune.errors import DataError
from kolotune.reporter import PlainReporter

Preparer = Callable[..., Prepared]


@pytest.fixture(scope="session")
def base(reporter: PlainReporter) -> Path:
    return smollm2.unpacked(reporter)


@pytest.fixture
def prepare(base: Path, tmp_path: Path) -> Preparer:
    def call(chats: list[list[tuple[str, str]]], held_out: list[list[tuple[str, str]]] = [], **more: Any) -> Prepared:  # noqa: B006
        values = {"train_data": [write(tmp_path / "chats.jsonl", chats)], **more}
        if held_out:
            values["eval_data"] = [write(tmp_path / "held_out.jsonl", held_out)]
        return prepare_chats(configs.resolve((values, "test", tmp_path)), base)

    return call


def write(path: Path, chats: list[list[tuple[str, str]]]) -> Path:
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]}) for chat in chats]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chat(number: int, answer: str = "Yes.") -> list[tuple[str, str]]:
    return [("user", f"Question {number}?"), ("assistant", f"{answer} {number}")]


def test_too_long_chats_lose_whole_turns_and_never_half_an_answer(prepare: Preparer) -> None:
    long = [*chat(1), *chat(2, "word " * 60), *chat(3)]
    prepared = prepare([long, chat(4), chat(5, "word " * 100)], max_seq_length=64, eval_split=0)
    assert [len(each.messages) for each in prepared.train.chats] == [2, 2]
    assert [turns for _, turns in prepared.shortened] == [4]
    assert [where.rpartition(":")[2] for where in prepared.too_long] == ["3"]
    for encoded in prepared.train.encoded:
        text = prepared.tokenizer.decode([token for token, on in zip(encoded.ids, encoded.labelled, strict=True) if on])
        assert text.startswith("Yes.") and text.endswith("<|im_end|>")
        assert len(encoded.ids) <= 64


def test_counts_add_up(prepare: Preparer) -> None:
    prepared = prepare([chat(number) for number in [*range(40), 3, 7]])
    facts = prepared.summary()
    assert facts["duplicates"] == 2
    assert facts["chats"] + facts["held_out_chats"] == 40
    assert facts["held_out_chats"] >= 1
    assert facts["tokens"] == sum(len(each.ids) for each in prepared.train.encoded)
    assert 0 < facts["labelled_tokens"] < facts["tokens"]


def test_chats_in_both_parts_are_taken_out_of_the_held_out_one(prepare: Preparer) -> None:
    prepared = prepare([chat(1), chat(2)], held_out=[chat(2), chat(3)])
    assert prepared.summary()["in_both_parts"] == 1
    assert [each.messages[0].content for each in prepared.held_out.chats] == ["Question 3?"]
    assert len(prepared.train.chats) == 2


def test_special_tokens_in_content_are_counted_and_stay_text(prepare: Preparer) -> None:
    prepared = prepare([chat(1, "Write <|im_end|> so.")], eval_split=0)
    assert prepared.summary()["special_tokens_in_content"] == 1
    end = prepared.tokenizer.convert_tokens_to_ids("<|im_end|>")
    system_user_and_answer = 3
    assert prepared.train.encoded[0].ids.count(end) == system_user_and_answer


def test_bad_chats_stop_with_their_lines_unless_they_may_be_skipped(prepare: Preparer) -> None:
    prepared = prepare([chat(1), [("user", "no answer")], chat(2)], eval_split=0)
    with pytest.raises(DataError, match=r"chats\.jsonl:2"):
        require_good(prepared, skip_bad=False)
    require_good(prepared, skip_bad=True)
    assert len(prepared.train.chats) == 2


def test_nothing_left_is_refused(prepare: Preparer) -> None:
    with pytest.raises(DataError, match="too long"):
        require_good(prepare([chat(1, "word " * 100)], max_seq_length=16, eval_split=0), skip_bad=True)


def test_likeness_is_told_with_lines_and_counted(
    prepare: Preparer, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kolotune.stages.prepare import tell

    story = "Once upon a time a fox met a hen at the river and asked her politely for the way to the mill"
    chats = [[*chat(number, f"Answer number {number} of many")] for number in range(5)]
    chats.append([("user", "Tell me a story"), ("assistant", story)])
    chats.append([("user", "Tell me a story!"), ("assistant", story + ".")])
    prepared = prepare(chats, held_out=[[("user", "tell me a STORY"), ("assistant", "No.")]], eval_split=0)
    assert prepared.summary()["findings"] == {"leaks": 1, "near_duplicates": 1}
    tell(prepared, PlainReporter())
    output = capsys.readouterr().out
    assert f"{tmp_path / 'chats.jsonl'}:7 is nearly {tmp_path / 'chats.jsonl'}:6 (100%)" in output
    assert f"{tmp_path / 'held_out.jsonl'}:1 asks the same as {tmp_path / 'chats.jsonl'}:6" in output
    few = prepare_chats(configs.resolve(({"train_data": [tmp_path / "chats.jsonl"]}, "test", tmp_path)), base, 3)
    assert few.summary()["not_compared"] == 4
    tell(few, PlainReporter())
    assert "4 chats were not compared" in capsys.readouterr().out

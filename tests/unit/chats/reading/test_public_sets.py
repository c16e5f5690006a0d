"""A record in the shape of each of the most used public sets: the chat that it becomes, and what is not read of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.chats.reading.files import read_chat
from kolotune.chats.reading.record_keys import METADATA, canonical
from kolotune.chats.reading.records import parsed_record

SETS = [json.loads(line) for line in Path(__file__).with_name("public_sets.jsonl").read_text("utf-8").splitlines()]


def shown(record: Any) -> tuple[Any, list[str]]:
    """Return the turns that a record becomes, or the kinds of its problems; and its unread keys that may be content."""
    read = read_chat(Path("set.jsonl"), parsed_record(1, json.dumps(record).encode()))
    if read.chat is None:
        return [problem.kind.value for problem in read.problems], []
    turns = []
    for message in read.chat.messages:
        calls = [f"{call['function']['name']}()" for call in message.tool_calls]  # type: ignore[index]
        thought = [f"({message.reasoning})"] if message.reasoning else []
        turns.append(
            " ".join([message.role[0].upper(), *thought, *([message.content] if message.content else []), *calls])
        )
    return turns, [key for key in read.unread if canonical(key.removeprefix("turns: ")) not in METADATA]


@pytest.mark.parametrize("entry", SETS, ids=[entry["set"] for entry in SETS])
def test_public_sets(entry: dict[str, Any]) -> None:
    chat, unread = shown(entry["record"])
    assert chat == entry["chat"]
    assert unread == entry["unread"]


def test_most_of_them_are_read() -> None:
    assert len(SETS) > 70
    refused = {entry["set"] for entry in SETS if not entry["chat"][0][:1].isupper()}
    assert refused == {"OASST1", "stack-exchange-instruction", "hh-rlhf", "PKU-SafeRLHF"}

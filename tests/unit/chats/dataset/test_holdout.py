"""Which chats are held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from kolotune.chats import Chat, Message
from kolotune.chats.dataset.holdout import final_split, is_held_out


def chats(count: int) -> list[Chat]:
    return [
        Chat((Message("user", f"question {number}"), Message("assistant", f"answer {number}")), Path("a.jsonl"), number)
        for number in range(count)
    ]


def split(some: list[Chat], share: float) -> tuple[list[Chat], list[Chat]]:
    hashes = [item.content_hash() for item in some]
    held_out = np.array([is_held_out(item, share) for item in hashes])
    held_out = final_split(held_out, min(range(len(some)), key=hashes.__getitem__), share)
    parts = [[item for item, out in zip(some, held_out, strict=True) if out == expected] for expected in (False, True)]
    return parts[0], parts[1]


def test_a_share_is_held_out_and_nothing_is_lost() -> None:
    train, held_out = split(chats(2000), 0.05)
    assert len(train) + len(held_out) == 2000
    assert 60 < len(held_out) < 140
    assert not set(map(Chat.content_hash, train)) & set(map(Chat.content_hash, held_out))


def test_adding_chats_moves_no_other() -> None:
    _, before = split(chats(500), 0.05)
    _, after = split(chats(1000), 0.05)
    assert set(map(Chat.content_hash, before)) <= set(map(Chat.content_hash, after))


def test_the_order_of_the_files_does_not_matter() -> None:
    _, forward = split(chats(300), 0.1)
    _, backward = split(chats(300)[::-1], 0.1)
    assert set(map(Chat.content_hash, forward)) == set(map(Chat.content_hash, backward))


def test_twenty_chats_give_at_least_one_and_fewer_may_give_none() -> None:
    for count in (20, 25, 40):
        assert len(split(chats(count), 0.0001)[1]) == 1
    assert split(chats(19), 0.0001)[1] == []


def test_no_share_and_too_few_chats() -> None:
    assert split(chats(100), 0.0)[1] == []
    train, held_out = split(chats(1), 0.999999)
    assert (len(train), len(held_out)) == (1, 0)


def test_where_a_chat_was_read_does_not_matter() -> None:
    one = Chat((Message("user", "a"), Message("assistant", "b")), Path("x"), 1)
    other = Chat((Message("user", "a"), Message("assistant", "b")), Path("y"), 9)
    assert one.content_hash() == other.content_hash()
    assert one.content_hash() != Chat((Message("user", "a"), Message("assistant", "b", reasoning="c"))).content_hash()


def test_a_hash_is_that_of_the_chat_as_json_with_sorted_keys() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "ä"}}}
    turns = (
        Message("system", 'say "\u00e9\n\\"'), Message("user", "q\x7f\U0001f389"),
        Message("assistant", "", "r", tool_calls=(call,)), Message("tool", "1", name="f", tool_call_id="x"),
        Message("assistant", "a"),
    )  # fmt: skip
    for item in (Chat(turns[:2]), Chat(turns), Chat(turns, tools=({"z": 1, "name": "f"},))):
        text = json.dumps([item.message_dicts(), list(item.tools)], sort_keys=True, ensure_ascii=False)
        assert item.content_hash() == hashlib.sha256(text.encode()).digest()

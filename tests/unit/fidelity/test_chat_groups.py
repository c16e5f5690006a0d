"""Which chats are read together."""

from __future__ import annotations

from kolotune.fidelity.chat_groups import group_chats, padded, shared_beginning
from kolotune.fidelity.tasks import ComparedChat

BEGIN = list(range(20))


def chat(ids: list[int], first: int = 0) -> ComparedChat:
    return ComparedChat(ids, [first, len(ids) - 1], [])


def test_chats_of_like_length_are_together() -> None:
    chats = [chat([number] * length) for number, length in enumerate((10, 30, 11, 29, 12, 300))]
    assert list(group_chats(chats, 512, 1.1)) == [[0, 2, 4], [3, 1], [5]]
    assert list(group_chats(chats, 32)) == [[0, 2], [4], [3], [1], [5]]


def test_chats_that_begin_alike_are_together() -> None:
    chats = [chat([*BEGIN, 1, 2]), chat([5] * 22), chat([*BEGIN, 3]), chat([6] * 21)]
    assert sorted(map(sorted, group_chats(chats, 512))) == [[0, 2], [1, 3]]


def test_what_chats_share_ends_before_the_first_prediction() -> None:
    chats = [chat([*BEGIN, 1, 2, 3], 21), chat([*BEGIN, 1, 2, 4], 20), chat([*BEGIN, 1, 2, 5], 17), chat(BEGIN, 8)]
    assert shared_beginning(chats, [0, 1]) == BEGIN
    assert shared_beginning(chats, [0, 1, 2]) == BEGIN[:17]
    assert shared_beginning(chats, [0, 1, 2, 3]) == [] == shared_beginning(chats, [0])


def test_padding_is_behind() -> None:
    ids, is_token = padded([chat([1, 2, 3, 4]), chat([1, 2, 5])], [1, 0], 1)
    assert ids.tolist() == [[2, 5, 0], [2, 3, 4]] and is_token.tolist() == [[True, True, False], [True, True, True]]

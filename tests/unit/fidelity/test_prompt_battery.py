"""The battery of prompts."""

from __future__ import annotations

from kolotune.chats.reading.turn_order import order_faults
from kolotune.chats.traits import ChatTrait, traits_of
from kolotune.fidelity.prompt_battery import battery


def test_each_trait_has_a_chat_that_has_it() -> None:
    chats = battery()
    assert set(chats) == set(ChatTrait)
    for trait, chat in chats.items():
        assert trait in traits_of(chat), trait
        assert chat.messages[-1].role == "assistant" and chat.messages[-1].is_plain


def test_they_are_chats_that_can_be_read() -> None:
    assert [order_faults(chat.messages) for chat in battery().values()] == [[]] * len(ChatTrait)

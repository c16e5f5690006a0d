"""One chat of each exchange, where the template leaves out earlier thoughts."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from safetensors.numpy import load_file

from kolotune.chats import Chat, Message
from kolotune.chats.chat import trained_answers
from kolotune.chats.dataset.exchanges import exchanges_of
from kolotune.chats.dataset.prepared import Prepared
from kolotune.run_folder.layout import HELD_OUT_CHATS, TRAIN_TOKENS

Turn: TypeAlias = tuple[str, str, str | None]
PrepareRecords = Callable[..., tuple[Prepared, Path]]
# It writes the thought of the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CHATS: list[list[Turn]] = [
    [("Hi", "Hello", "They greet."), ("Why?", "So.", None), ("And?", "No.", "Hm.")],
    [("Hi", "Hello", "They greet."), ("What?", "That.", "Another."), ("And?", "No.", None)],
    [("A?", "B.", None), ("C?", "D.", None)],
    [("Hi", "Ho", "One.")],
]


@pytest.fixture
def thinking(prepare_records: PrepareRecords, tmp_path: Path) -> PrepareRecords:
    """Prepare chats of (question, answer, thought or None); the answers numbered in `excluded` are not trained on."""
    (tmp_path / "thinking.jinja").write_text(THINKING, encoding="utf-8")

    def call(chats: list[list[Turn]], excluded: tuple[int, ...] = (), **options: Any) -> tuple[Prepared, Path]:
        records = []
        for turns in chats:
            messages: list[dict[str, Any]] = []
            for number, (question, answer, thought) in enumerate(turns):
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer, "train": number not in excluded})
                messages[-1] |= {"reasoning_content": thought} if thought is not None else {}
            records.append({"messages": messages})
        return prepare_records(records, chat_template=tmp_path / "thinking.jinja", **options)

    return call


def trained(prepared: Prepared, folder: Path) -> list[tuple[str, list[int]]]:
    """Return the text of each sequence up to its last answer, and the ids that are trained on."""
    tokens, found = load_file(folder / TRAIN_TOKENS), []
    for start, end in pairwise(tokens["offsets"].tolist()):
        ids, labelled = tokens["ids"][start:end], tokens["labelled"][start:end] == 1
        found.append((prepared.tokenizer.decode(ids).rstrip("\n"), ids[labelled].tolist()))
    return sorted(found)


@pytest.mark.parametrize("empty_thoughts", ["mask", "learn"])
@pytest.mark.parametrize("excluded", [(), (0,), (1, 2)])
def test_the_same_tokens_are_trained(empty_thoughts: str, excluded: tuple[int, ...], thinking: PrepareRecords) -> None:
    """No trained token is lost, and none is trained twice, also with empty thoughts and answers apart."""
    options: dict[str, Any] = {"eval_split": 0, "empty_thoughts": empty_thoughts, "excluded": excluded}
    whole, split = thinking(CHATS, **options), thinking(CHATS, split_thoughts=True, **options)
    assert trained(*split) == trained(*whole)
    before, facts = whole[0].summary(), split[0].summary()
    for name in ("labelled_tokens", "masked_thoughts", "untrained_turns", "excluded"):
        assert facts[name] == before[name]
    assert before["dropped_thoughts"] == 3 and before["split_chats"] == 0
    assert (facts["split_chats"], facts["dropped_thoughts"]) == (2, 0)
    assert facts["split_exchanges"] == 6 - 2 * len(excluded)
    assert facts["chats"] == 2 - (0 in excluded) + facts["split_exchanges"]


def test_exchanges_of_a_chat_are_held_out_together(thinking: PrepareRecords) -> None:
    def chat(at: int) -> list[Turn]:
        return [(f"q {at}", "a", "t"), (f"r {at}", "b", "u"), (f"s {at}", "c", None)]

    prepared, folder = thinking(list(map(chat, range(20))), split_thoughts=True, eval_split=1e-9)
    assert (prepared.train.chats, prepared.held_out.chats) == (57, 3)
    lines = (folder / HELD_OUT_CHATS).read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    assert len(questions) == 3 and len(set(questions)) == 1


def test_copies_are_whole_chats(thinking: PrepareRecords) -> None:
    """Two chats that begin alike are no copies, also not in the exchange that they share."""
    prepared, _ = thinking([CHATS[0], CHATS[0], CHATS[1]], split_thoughts=True, eval_split=0)
    assert prepared.train.chats == 6 and prepared.duplicates.count == 3


def test_calls_stay_with_their_exchange() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    turns = (
        Message("system", "s"), Message("user", "q"), Message("assistant", "", tool_calls=(call,)),
        Message("tool", "r"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b", weight=0.5),
    )  # fmt: skip
    first, second = exchanges_of(Chat(turns))
    assert first.messages == turns[:5] and trained_answers(first) == [2, 4]
    assert len(second.messages) == 7 and trained_answers(second) == [6] and second.messages[6].weight == 0.5

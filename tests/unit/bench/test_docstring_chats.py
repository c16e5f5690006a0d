"""The chats used for measuring."""

from __future__ import annotations

import json
from pathlib import Path

import docstring_chats


def answers(folder: Path, count: int) -> list[str]:
    file = folder / "chats.jsonl"
    docstring_chats.write_chats(file, count)
    chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(chats) == count == len({json.dumps(chat) for chat in chats}), "all differ"
    return [chat[-1]["content"] for chat in chats]


def test_few_chats_are_as_long_as_many(tmp_path: Path) -> None:
    known = sorted(len(text) for _, text in docstring_chats.docstrings())
    for count, off in ((40, 0.1), (160, 0.05), (len(known) + 50, 0.01)):
        lengths = sorted(map(len, answers(tmp_path, count)))
        assert lengths[-1] == known[-1] and lengths[0] == known[0]
        assert abs(sum(lengths) / count / (sum(known) / len(known)) - 1) < off
    assert len(answers(tmp_path, 1)) == 1
    assert answers(tmp_path, 30) == answers(tmp_path, 30), "the same each time"

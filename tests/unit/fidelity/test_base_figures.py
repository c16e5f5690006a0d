"""What is kept of a base model, and when it may be used again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kolotune.fidelity import base_figures
from kolotune.fidelity.tasks import ComparedChat

CHATS = [ComparedChat([1, 2, 3, 4], [1, 2], [1])]
PROMPTS = [[1, 2], [5]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))


def test_figures_are_read_as_they_were_kept() -> None:
    file = base_figures.figures_file("a", CHATS, PROMPTS, 4, 96)
    assert base_figures.read(file) is None
    base_figures.keep(file, [0.1 + 0.2], [[7, 8], []])
    assert base_figures.read(file) == base_figures.BaseFigures([0.1 + 0.2], [[7, 8], []])
    file.write_text("{", encoding="utf-8")
    assert base_figures.read(file) is None


def test_another_base_other_chats_prompts_and_lengths_have_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    other_loss = [ComparedChat([1, 2, 3, 4], [2], [0])]
    files = [
        base_figures.figures_file("a", CHATS, PROMPTS, 4, 96),
        base_figures.figures_file("b", CHATS, PROMPTS, 4, 96),
        base_figures.figures_file("a", other_loss, PROMPTS, 4, 96),
        base_figures.figures_file("a", CHATS, PROMPTS[:1], 4, 96),
        base_figures.figures_file("a", CHATS, PROMPTS, 3, 96),
        base_figures.figures_file("a", CHATS, PROMPTS, 4, 95),
    ]
    monkeypatch.setattr(base_figures, "VERSION", "another")
    files.append(base_figures.figures_file("a", CHATS, PROMPTS, 4, 96))
    assert len(set(files)) == len(files)


def test_a_base_that_did_not_answer_is_not_kept() -> None:
    file = base_figures.figures_file("a", CHATS, PROMPTS, 4, 96)
    base_figures.keep(file, [1.0], [None, None])
    assert not file.exists()
    base_figures.keep(file, [1.0], [])  # there was nothing to answer
    assert file.exists()


def test_the_oldest_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_figures, "_MOST", 2)
    files = [base_figures.figures_file(name, CHATS, PROMPTS, 4, 96) for name in "abc"]
    for age, file in zip((30, 20), files, strict=False):
        base_figures.keep(file, [1.0], [])
        os.utime(file, (1e9 - age, 1e9 - age))
    base_figures.keep(files[2], [1.0], [])
    assert [file.exists() for file in files] == [False, True, True]

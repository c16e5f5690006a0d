"""Finished matrices are found again, half-written ones and those of another quantization are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.gguf.compensation_journal import CompensationJournal

_BLOCKS = {"blk.0.attn_q.weight": b"\n1 2\n" * 9, "blk.0.ffn up.weight": bytes(range(256))}


def filled(path: Path, key: str = "key") -> CompensationJournal:
    journal = CompensationJournal(path, key)
    for name, blocks in _BLOCKS.items():
        journal.add(name, blocks)
    return journal


def test_finished_matrices_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal"
    assert {name: filled(path).get(name) for name in _BLOCKS} == _BLOCKS
    again = CompensationJournal(path, "key")
    assert {name: again.get(name) for name in _BLOCKS} == _BLOCKS
    again.add("last", b"more")
    assert CompensationJournal(path, "key").get("last") == b"more" and again.get("another") is None


@pytest.mark.parametrize("cut", [1, 100, 255, 256, 300])
def test_what_was_not_whole_is_done_again(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = CompensationJournal(path, "key")
    first, last = _BLOCKS
    assert journal.get(first) == _BLOCKS[first] and journal.get(last) is None
    journal.add(last, _BLOCKS[last])
    assert CompensationJournal(path, "key").get(last) == _BLOCKS[last]


def test_a_changed_byte_ends_what_is_used(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    filled(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert CompensationJournal(path, "key").get(list(_BLOCKS)[1]) is None


def test_another_quantization_starts_from_scratch(tmp_path: Path) -> None:
    filled(tmp_path / "journal")
    assert CompensationJournal(tmp_path / "journal", "another").get("blk.0.attn_q.weight") is None


def test_without_a_file_nothing_is_kept() -> None:
    journal = CompensationJournal(None, "key")
    journal.add("name", b"blocks")
    assert journal.get("name") is None

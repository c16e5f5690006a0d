"""Bytes on the disk: checkpoints, and the peak over all stages."""

from __future__ import annotations

import pytest

from kolotune.planning.disk import DiskUse, count_checkpoints, peak_and_end


@pytest.mark.parametrize(
    ("in_epoch", "epochs", "every", "written"),
    [(5, 3, 0, 3), (5, 3, 2, 9), (4, 2, 2, 4), (250, 1, 100, 3), (5, 0, 2, 0)],
)
def test_checkpoints_are_counted(in_epoch: int, epochs: int, every: int, written: int) -> None:
    by_hand = epochs + sum(
        1 for step in range(1, in_epoch * epochs + 1) if every and step % every == 0 and step % in_epoch
    )
    assert count_checkpoints(in_epoch, epochs, every) == by_hand == written


def test_replaced_and_temporary_files_count_toward_the_peak() -> None:
    first_time = [DiskUse(10), DiskUse(100, passes=30), DiskUse(5)]
    assert peak_and_end(first_time) == (140, 115)
    second_time = [DiskUse(10, replaced=10), DiskUse(100, passes=30, replaced=100)]
    assert peak_and_end(second_time) == (130, 0)

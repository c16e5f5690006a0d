"""A quantized GGUF is compared with the unquantized one that is measured at the same time, if that can be measured."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from kolotune.fidelity.measure_gguf import _before
from kolotune.fidelity.tasks import GgufTask


@pytest.fixture
def task(tmp_path: Path) -> GgufTask:
    return GgufTask(
        gguf="m.gguf",
        modelfile="",
        reference="reference.json",
        before="before.npy",
        after="after.npy",
        system="",
        longest_answer=4,
        answer_file="answer.json",
        unquantized=str(tmp_path / "f16.json"),
        unquantized_after=str(tmp_path / "f16.npy"),
    )


def test_its_log_probabilities_are_waited_for(task: GgufTask) -> None:
    writer = threading.Timer(0.1, Path(task.unquantized_after).touch)
    writer.start()
    assert _before(task) == Path(task.unquantized_after)
    writer.join()


def test_without_them_it_is_compared_with_what_was_before(task: GgufTask) -> None:
    Path(task.unquantized).touch()
    assert _before(task) == Path(task.before)
    assert _before(dataclasses.replace(task, unquantized="")) == Path(task.before)

"""Measured steps of a training, with chats of one sequence and of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.training import branching_chats, random_chats

from kolotune.engines.native import calibration, sequence_packing
from kolotune.engines.native.calibration import calibrate
from kolotune.engines.prepared_tokens import PreparedTokens

MakeTraining = Callable[..., Any]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("chats", [random_chats(7, 1), branching_chats(7, 1)])
def test_steps_and_evaluations_are_measured(kind: str, chats: Any, make_training: MakeTraining) -> None:
    measured = calibrate(make_training(kind, chats=chats, held_out=chats[:3]).job())
    assert min(measured.first, measured.per_token, measured.per_held_out_token, measured.checkpoint) > 0


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (40, 2), (1000, 4)])
def test_an_evaluation_of_medium_chats_is_measured(
    budget: int, count: int, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [([5] * length, [1] * length) for length in (30, 40, 20, 50, 10, 15, 12)]
    folder = make_training(chats=chats)
    tokens = PreparedTokens.load(Path(folder.job().data) / "train.safetensors")
    monkeypatch.setattr(sequence_packing, "TOKEN_BUDGET", budget)
    assert calibration._typical_chats(tokens) == [2, 5, 6, 4][:count]

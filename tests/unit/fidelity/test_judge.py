"""Which quantization is recommended, and how far a loss may be from what training measured."""

from __future__ import annotations

import dataclasses
import math

import pytest

from kolotune.fidelity.judge import ADAPTER, Evidence, Made, recommended, verdict
from kolotune.fidelity.result import Measured
from kolotune.fidelity.task import Asked, Reference

Q3, Q4, Q8 = (
    Measured(name, size, loss, 0.1, 0.9) for name, size, loss in (("Q3", 3, 2.5), ("Q4", 4, 2.04), ("Q8", 8, 2.0))
)


@pytest.mark.parametrize(
    ("tried", "base", "name", "why"),
    [
        ((Q3, Q4, Q8), 3.0, "Q4", "smallest"),
        ((Q3, Q4, Q8), 2.1, "Q8", "smallest"),
        ((Q3, Q8), 20.0, "Q3", "smallest"),
        ((Q3, dataclasses.replace(Q4, loss=2.4)), 2.2, "Q4", "the least"),
        ((Q4,), 3.0, "", ""),
        ((), 3.0, "", ""),
    ],
)
def test_loss_against_size(tried: tuple[Measured, ...], base: float, name: str, why: str) -> None:
    found, because = recommended(tried, base, 2.0)
    assert found == name and why in because


def evidence(losses: list[list[float]], recorded: tuple[float, float], whole: bool, four_bit: bool = False) -> Evidence:
    reference = Reference(
        chats=[Asked([1, 2], [0], [0])] * len(losses),
        prompts=[],
        probes=[],
        answers=[],
        chat_losses=losses,
        labels=[10] * len(losses),
        stops=[],
        held_out=True,
        whole=whole,
        prepared_equal=len(losses),
        prepared_chats=len(losses),
        wrong_prepared=[],
        end_token="</s>",
        pieces=[],
        base_loss=sum(each[0] for each in losses) / (10 * len(losses)),
        tuned_loss=sum(each[1] for each in losses) / (10 * len(losses)),
        merged=None,
        notes=[],
    )
    made = Made(ADAPTER, "adapter", 1)
    return Evidence(reference, None, [], "f16", four_bit, made, recorded, ("merged", "f16 GGUF"))


@pytest.mark.parametrize(
    ("recorded", "whole", "four_bit", "fails"),
    [
        ((3.0, 2.0), True, False, ""),
        ((3.02, 2.02), True, False, ""),
        ((3.1, 2.0), True, False, "base"),
        ((3.0, 2.1), True, False, "tuned"),
        ((3.1, 2.1), True, True, ""),
        ((3.1, 2.1), False, False, ""),
        ((9.0, 2.0), False, False, "base"),
        ((math.nan, 2.0), True, False, "base"),
    ],
)
def test_losses_against_what_training_measured(
    recorded: tuple[float, float], whole: bool, four_bit: bool, fails: str
) -> None:
    losses = [[29.0, 19.0], [31.0, 21.0], [30.0, 20.0], [30.5, 20.5], [29.5, 19.5]]
    failure = verdict(evidence(losses, recorded, whole, four_bit)).failure
    if not fails:
        assert failure is None
    else:
        assert failure is not None and failure.stage == "train" and f"the {fails} model's loss" in failure.what

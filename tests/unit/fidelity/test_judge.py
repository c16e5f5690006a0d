"""Which quantization is recommended, and how far a loss may be from what training measured."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kolotune.fidelity.comparison import Comparison, QuantizationFigures
from kolotune.fidelity.judge import ADAPTER, Evidence, MeasuredFile, recommended, verdict
from kolotune.fidelity.tasks import ComparedChat, Figures, GgufMeasurement, Reference

Q3, Q4, Q8 = (
    QuantizationFigures(name, size, loss, 0.1, 0.9)
    for name, size, loss in (("Q3", 3, 2.5), ("Q4", 4, 2.04), ("Q8", 8, 2.0))
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
def test_loss_against_size(tried: tuple[QuantizationFigures, ...], base: float, name: str, why: str) -> None:
    found, because = recommended(tried, base, 2.0)
    assert found == name and why in because


def evidence(losses: list[list[float]], recorded: tuple[float, float], whole: bool, four_bit: bool = False) -> Evidence:
    reference = Reference(
        chats=[ComparedChat([1, 2], [0], [0])] * len(losses),
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
    made = MeasuredFile(ADAPTER, "adapter", 1)
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


def test_what_is_only_tried_is_weighed_and_is_no_gate() -> None:
    own = evidence([[20.0, 10.0]] * 3, (2.0, 1.0), whole=True)

    def answer(loss: float, *wrong: str) -> GgufMeasurement:
        return GgufMeasurement(Figures(loss, 0.9, 0.01, 0.02, wrong=list(wrong)))

    q8, q5 = (MeasuredFile(name, "", size) for name, size in (("Q8_0", 8), ("Q5_K_M", 5)))
    kept = (MeasuredFile("Q6_K", "MergedQ6_K.gguf", 6), "", answer(1.0))
    tried = ((q8, answer(1.0)), (q5, answer(1.02)), (MeasuredFile("IQ1_S", "", 1), answer(9.0, "words", "more")))
    found = verdict(dataclasses.replace(own, ggufs=[kept], tried=tried, weighted=frozenset({"Q5_K_M"})))
    assert [(each.name, each.kept, each.importance_matrix) for each in found.quantizations] == [
        ("Q5_K_M", False, True), ("Q6_K", True, False), ("Q8_0", False, False),
    ]  # fmt: skip
    assert found.recommended == "Q5_K_M" and "--quantization Q5_K_M" in found.recommended_because
    assert "IQ1_S could not be measured: words" in found.notes
    assert found.passed and not {"Q8_0", "Q5_K_M", "IQ1_S"} & {each.name for each in found.checked}
    assert Comparison.from_json(json.loads(json.dumps(found.as_json()))) == found

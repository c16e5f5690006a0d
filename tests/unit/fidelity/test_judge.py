"""The judge: recommended quantizations, and losses compared with those that training measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from kolotune.fidelity.comparison import Comparison, QuantizationFigures, StageCheck
from kolotune.fidelity.defects import DefectKind, defect
from kolotune.fidelity.evidence import ADAPTER, Evidence, MeasuredFile, MeasuredGguf
from kolotune.fidelity.judge import judge
from kolotune.fidelity.likely_cause import Cause, describe_cause, likely_cause
from kolotune.fidelity.prompt_proof import MismatchKind
from kolotune.fidelity.recommendation import RecommendationReason, recommend
from kolotune.fidelity.tasks import ComparedChat, Figures, GgufMeasurement, Reference

Q3, Q4, Q8 = (
    QuantizationFigures(name, size, loss, 0.1, 0.9)
    for name, size, loss in (("Q3", 3, 2.5), ("Q4", 4, 2.04), ("Q8", 8, 2.0))
)


@pytest.mark.parametrize(
    ("quantizations", "base", "name", "reason"),
    [
        ((Q3, Q4, Q8), 3.0, "Q4", RecommendationReason.SMALLEST_GOOD),
        ((Q3, Q4, Q8), 2.1, "Q8", RecommendationReason.SMALLEST_GOOD),
        ((Q3, Q8), 20.0, "Q3", RecommendationReason.SMALLEST_GOOD),
        ((Q3, dataclasses.replace(Q4, loss=2.4)), 2.2, "Q4", RecommendationReason.SMALLEST_LOSS),
        ((Q4,), 3.0, "", None),
        ((), 3.0, "", None),
    ],
)
def test_loss_against_size(
    quantizations: tuple[QuantizationFigures, ...], base: float, name: str, reason: RecommendationReason | None
) -> None:
    recommendation = recommend(quantizations, base, 2.0)
    if recommendation is None:
        assert reason is None
    else:
        assert (recommendation.quantization.name, recommendation.reason) == (name, reason)


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
        prepared_defects=[],
        end_token="</s>",
        pieces=[],
        base_loss=sum(base for base, _ in losses) / (10 * len(losses)),
        tuned_loss=sum(tuned for _, tuned in losses) / (10 * len(losses)),
        merged=None,
        notes=[],
    )
    adapter = MeasuredFile(ADAPTER, "adapter", 1)
    return Evidence(reference, None, [], "f16", four_bit, adapter, recorded, ("merged", "f16 GGUF"))


@pytest.mark.parametrize(
    ("recorded", "whole", "four_bit", "cause"),
    [
        ((3.0, 2.0), True, False, None),
        ((3.02, 2.02), True, False, None),
        ((3.1, 2.0), True, False, Cause.OTHER_BASE),
        ((3.0, 2.1), True, False, Cause.OTHER_ADAPTER),
        ((3.1, 2.1), True, True, None),
        ((3.1, 2.1), False, False, None),
        ((9.0, 2.0), False, False, Cause.OTHER_BASE),
        ((math.nan, 2.0), True, False, Cause.OTHER_BASE),
    ],
)
def test_losses_are_compared_with_those_of_training(
    recorded: tuple[float, float], whole: bool, four_bit: bool, cause: Cause | None
) -> None:
    losses = [[29.0, 19.0], [31.0, 21.0], [30.0, 20.0], [30.5, 20.5], [29.5, 19.5]]
    failure = judge(evidence(losses, recorded, whole, four_bit)).failure
    if cause is None:
        assert failure is None
    else:
        assert failure is not None and failure.stage == "train"
        assert failure.likely_cause == describe_cause(cause, "train")


def test_trials_are_recommended_but_never_fail_a_run(tmp_path: Path) -> None:
    def measured(name: str, size: int, file: str, loss: float, *wrong: str) -> MeasuredGguf:
        defects = [defect(DefectKind.NOT_MEASURABLE, reason=reason) for reason in wrong]
        figures = Figures(loss, 0.9, 0.01, 0.02, defects=defects)
        return MeasuredGguf(MeasuredFile(name, file, size), "", GgufMeasurement(figures))

    trials = (
        measured("Q8_0", 8, "", 1.0),
        measured("Q5_K_M", 5, "", 1.02),
        measured("IQ1_S", 1, "", 9.0, "words", "more"),
    )
    comparison = judge(
        dataclasses.replace(
            evidence([[20.0, 10.0]] * 3, (2.0, 1.0), whole=True),
            ggufs=[measured("Q6_K", 6, "MergedQ6_K.gguf", 1.0)],
            trials=trials,
            with_matrix=frozenset({"Q5_K_M"}),
        )
    )
    assert [(figures.name, figures.kept, figures.importance_matrix) for figures in comparison.quantizations] == [
        ("Q5_K_M", False, True), ("Q6_K", True, False), ("Q8_0", False, False),
    ]  # fmt: skip
    assert comparison.recommended == "Q5_K_M" and "--quantization Q5_K_M" in comparison.recommended_because
    assert any("IQ1_S" in note and "words" in note for note in comparison.notes)
    assert comparison.passed and not {"Q8_0", "Q5_K_M", "IQ1_S"} & {check.name for check in comparison.checked}
    comparison.write(tmp_path / "comparison.json")
    assert Comparison.read(tmp_path / "comparison.json") == comparison


@pytest.mark.parametrize("kind", MismatchKind)
def test_each_kind_of_different_prompts_has_a_cause(kind: MismatchKind) -> None:
    wrong = defect(DefectKind.PROMPTS_DIFFER, count=1, of=1, reason="", mismatch=kind)
    cause = likely_cause(StageCheck("f16 GGUF", "convert"), [wrong], evidence([[1.0, 1.0]], (0.1, 0.1), whole=True))
    assert cause not in (Cause.CONVERTER, Cause.DAMAGED_OR_TOO_COARSE)
    assert (cause is Cause.CHAT_TEMPLATE) is (kind is MismatchKind.TEMPLATE)

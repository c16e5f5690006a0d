"""The share of what training gained: its error, where it is not judged, and which quantization keeps it."""

from __future__ import annotations

import dataclasses

import pytest

from kolotune.fidelity.comparison import MatrixSurvival
from kolotune.fidelity.evidence import ADAPTER, F16, Evidence, MeasuredFile, MeasuredGguf
from kolotune.fidelity.gain import GainKept, gain_kept, lost, rounded_back, smallest_that_keeps
from kolotune.fidelity.tasks import ComparedChat, Figures, GgufMeasurement, Reference


def reference(losses: list[list[float]]) -> Reference:
    """Return a reference of chats with 10 trained tokens each, given losses of base and tuned model."""
    total = 10 * len(losses)
    return Reference(
        chats=[ComparedChat([1, 2], [0], [0])] * len(losses), prompts=[], probes=[], answers=[], chat_losses=losses,
        labels=[10] * len(losses), stops=[], held_out=True, whole=True, prepared_equal=0, prepared_chats=0,
        prepared_defects=[], end_token="", pieces=[], base_loss=sum(base for base, _ in losses) / total,
        tuned_loss=sum(tuned for _, tuned in losses) / total, merged=None, notes=[],
    )  # fmt: skip


def figures(*losses: float, kept: float = 1.0) -> Figures:
    return Figures(
        sum(losses) / (10 * len(losses)), 0.9, 0.1, 0.2, chat_losses=list(losses),
        survival=[MatrixSurvival("blk.0.attn_q.weight", "Q4_K", kept)],
    )  # fmt: skip


CHATS = reference([[30.0, 10.0], [28.0, 12.0], [32.0, 8.0]])


def evidence(**measured: Figures) -> Evidence:
    ggufs = [
        MeasuredGguf(MeasuredFile(name, name, size), "", GgufMeasurement(each))
        for size, (name, each) in enumerate(measured.items())
    ]
    return Evidence(CHATS, None, ggufs, "f16", False, MeasuredFile(ADAPTER, "adapter", 1), None, ())


def test_the_share_of_a_file() -> None:
    assert gain_kept(CHATS, figures(10.0, 12.0, 8.0)) == GainKept(1.0, 0.0)
    assert gain_kept(CHATS, figures(30.0, 28.0, 32.0)) == GainKept(0.0, 0.0)
    half = gain_kept(CHATS, figures(20.0, 20.0, 20.0))
    assert half is not None and half.share == pytest.approx(0.5) and half.error == pytest.approx(0.0)
    uneven = gain_kept(CHATS, figures(30.0, 12.0, 18.0))
    # Residuals -10, 8 and 2: the root of (100 + 64 + 4) * 3 / 2, over the gain of 60.
    assert uneven is not None and uneven.share == pytest.approx(0.5)
    assert uneven.error == pytest.approx((168 * 1.5) ** 0.5 / 60)


@pytest.mark.parametrize(
    "losses",
    [[[20.0, 19.9], [20.0, 19.9]], [[20.0, 25.0], [20.0, 10.0]], [[20.0, 21.0], [20.0, 21.0]], [[20.0, 18.5]]],
)
def test_a_gain_that_does_not_stand_out_is_not_judged(losses: list[list[float]]) -> None:
    assert gain_kept(reference(losses), figures(*[20.0] * len(losses))) is None


def test_one_chat_has_no_error() -> None:
    assert gain_kept(reference([[30.0, 10.0]]), figures(15.0)) == GainKept(0.75, None)


def test_what_was_not_measured_has_no_share() -> None:
    assert gain_kept(CHATS, Figures()) is None
    assert gain_kept(CHATS, Figures(loss=float("nan"))) is None


def test_the_smallest_quantization_that_keeps_it() -> None:
    erased, good = figures(29.0, 27.0, 31.0, kept=0.1), figures(10.0, 12.0, 9.0)
    found = evidence(Q4_1=erased, Q6_K=good, Q8_0=figures(10.0, 12.0, 8.0), **{F16: erased})
    assert smallest_that_keeps(found) == ("Q6_K", pytest.approx(1 - 1 / 60))
    assert lost(found) == ["Q4_1"]
    assert "Q4_1" in rounded_back(found) and "Q6_K" not in rounded_back(found)
    assert smallest_that_keeps(evidence(Q4_1=erased)) is None
    trial = dataclasses.replace(evidence(Q4_1=erased), trials=evidence(Q8_0=good).ggufs)
    assert smallest_that_keeps(trial) == ("Q8_0", pytest.approx(1 - 1 / 60))

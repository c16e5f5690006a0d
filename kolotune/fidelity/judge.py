"""From measurements to a comparison: bounds, defects, and the first stage that fails.

The bounds are wide compared with what was measured, and narrow compared with what damage does. On the sample: merged in
f16 1e-6, f16 GGUF 2e-6, Q8_0 3e-3, Q4_K_M 4e-2; small models suffer most from quantization. A wrong scale, a transposed
matrix or rows in a different order cost 0.1 and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .compared_prompts import compare_prompts
from .comparison import ComparedAnswer, Comparison, Count, Failure, PathCheck, QuantizationFigures, StageCheck
from .defects import Defect, DefectKind, NoteKind, defect, note
from .evidence import F16, MERGED, Evidence, MeasuredFile, MeasuredGguf
from .gain import GAIN_KEPT, GainKept, gain_kept, smallest_that_keeps
from .likely_cause import Cause, describe_cause, likely_cause
from .prompt_proof import Outcome, PromptResult
from .recommendation import describe_recommendation, recommend
from .tasks import Figures, GreedyAnswer, Reference

_MERGED_KL = {"f16": 1e-4, "fp32": 1e-4, "bf16": 1e-2}
_F16_KL = 1e-3
# Mean KL to the unquantized GGUF, by the bits that a quantization's name begins with; fewer bits have no bound.
_QUANTIZED_KL = {"BF": 1e-2, "Q8": 2e-2, "Q6": 0.06, "Q5": 0.12, "Q4": 0.4, "IQ4": 0.4, "MXFP4": 0.4, "Q3": 1.0}
_GAIN = "gain_kept"  # as the bound of a check is named
_ENDS_MISSED = 0.1  # share of the ends that may be missed
_LOSS_APART = 0.01  # from what training measured: it computes in bf16 where that is fast
_LOSS_APART_4BIT = 0.1
_STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class JudgedCheck:
    """A check with its defects; their sentences are not in the check yet."""

    check: StageCheck
    defects: tuple[Defect, ...]


@dataclass(frozen=True)
class FirstFailure:
    """The first check that fails, and its likely cause."""

    judged: JudgedCheck
    cause: Cause


def judge(evidence: Evidence) -> Comparison:
    """Judge the measurements of a run."""
    reference = evidence.reference
    checks = tuple(_judge_all(evidence))
    failure = first_failure(checks, evidence)
    quantizations = tuple(sorted(_quantizations(evidence), key=lambda figures: figures.size_bytes))
    recommendation = recommend(quantizations, reference.base_loss, reference.tuned_loss)
    recorded_base, recorded_tuned = evidence.recorded or (None, None)
    return Comparison(
        chats=len(reference.chats),
        positions=sum(reference.labels),
        held_out=reference.held_out,
        samples=evidence.is_export,
        base_loss=reference.base_loss,
        tuned_loss=reference.tuned_loss,
        recorded_base_loss=recorded_base,
        recorded_tuned_loss=recorded_tuned,
        checked=tuple(replace(judged.check, failed=tuple(map(str, judged.defects))) for judged in checks),
        answers=tuple(map(_compared_answer, reference.answers)),
        not_kept=evidence.not_kept,
        notes=tuple(_notes(evidence)),
        quantizations=quantizations,
        recommended=recommendation.quantization.name if recommendation else "",
        recommended_because=describe_recommendation(recommendation) if recommendation else "",
        failure=None if failure is None else _describe_failure(failure),
        general=reference.general,
        paths=tuple(check for measured in evidence.ggufs for check in _path_checks(measured)),
    )


def first_failure(checks: Sequence[JudgedCheck], evidence: Evidence) -> FirstFailure | None:
    """Return the first check with a defect, and its likely cause; None when all pass."""
    judged = next((judged for judged in checks if judged.defects), None)
    if judged is None:
        return None
    return FirstFailure(judged, likely_cause(judged.check, judged.defects, evidence))


def _describe_failure(failure: FirstFailure) -> Failure:
    check = failure.judged.check
    what = f"{check.name}: {failure.judged.defects[0]}"
    return Failure(check.stage, what, describe_cause(failure.cause, check.stage))


def _notes(evidence: Evidence) -> Iterator[str]:
    """Sentences for what was not compared, each once."""
    notes = list(evidence.reference.notes)
    for measured in evidence.ggufs:
        notes += measured.measurement.notes
    if evidence.is_export:
        notes.append(note(NoteKind.SAMPLE_CHATS))
    elif not evidence.reference.held_out:
        notes.append(note(NoteKind.NOTHING_HELD_OUT))
    if evidence.recorded is None and not evidence.is_export:
        notes.append(note(NoteKind.NO_RECORDED_LOSS))
    for trial in evidence.trials:
        for wrong in trial.measurement.figures.defects[:1]:
            notes.append(note(NoteKind.QUANTIZATION_NOT_MEASURED, name=trial.gguf.name, reason=str(wrong)))
    yield from dict.fromkeys(map(str, notes))


def _compared_answer(answer: GreedyAnswer) -> ComparedAnswer:
    users = [str(turn["content"]) for turn in answer.messages if turn["role"] == "user"]
    return ComparedAnswer(users[-1] if users else "", answer.base, answer.tuned, answer.expected)


def _quantizations(evidence: Evidence) -> Iterator[QuantizationFigures]:
    """The quantizations that could be measured completely."""
    kept = [(measured, True) for measured in evidence.ggufs if measured.gguf.name != F16]
    for measured, is_kept in [*kept, *((trial, False) for trial in evidence.trials)]:
        name, size, figures = measured.gguf.name, measured.gguf.size, measured.measurement.figures
        loss, kl_mean, agreement = figures.loss, figures.kl_mean, figures.top1_agreement
        if figures.defects or size is None or loss is None or kl_mean is None or agreement is None:
            continue
        with_matrix = name in evidence.with_matrix
        gain = gain_kept(evidence.reference, figures)
        yield QuantizationFigures(
            name, size, loss, kl_mean, agreement, with_matrix, is_kept, gain.share if gain else None,
            gain.error if gain else None, tuple(figures.survival),
        )  # fmt: skip


# ---------------------------------------------------------------- checks


def _judge_all(evidence: Evidence) -> Iterator[JudgedCheck]:
    """The checks in the order of the pipeline; what is served comes last, as the Modelfile is written last."""
    reference = evidence.reference
    equal = Count(reference.prepared_equal, reference.prepared_chats)
    yield JudgedCheck(
        StageCheck("prepared chats", "prepare", prompt_ids_equal=equal), tuple(reference.prepared_defects)
    )
    yield _judge_adapter(evidence)
    before = evidence.adapter.name
    if evidence.merged is not None and reference.merged is not None:
        bounds = {"kl_mean": _MERGED_KL[evidence.merge_dtype]}
        yield _judge_weights(evidence, evidence.merged, "merge", before, reference.merged, bounds)
        before = MERGED
    for measured in evidence.ggufs:
        name, figures = measured.gguf.name, measured.measurement.figures
        stage = "convert" if name == F16 else "quantize"
        yield _judge_weights(evidence, measured.gguf, stage, before, figures, _bounds(name, reference, figures))
        before = name if name == F16 else before
    for measured in evidence.ggufs:
        if measured.modelfile:
            yield _judge_served(measured)


def _judge_adapter(evidence: Evidence) -> JudgedCheck:
    stops = len(evidence.reference.stops)
    check = StageCheck(
        evidence.adapter.name,
        "train",
        evidence.adapter.file,
        evidence.adapter.size,
        top1_agreement=1.0,
        kl_mean=0.0,
        kl_p99=0.0,
        loss=evidence.reference.tuned_loss,
        stops=Count(stops, stops),
    )
    return JudgedCheck(check, tuple(_training_defects(evidence)))


def _judge_weights(
    evidence: Evidence, artifact: MeasuredFile, stage: str, against: str, figures: Figures, bounds: dict[str, float]
) -> JudgedCheck:
    defects = list(figures.defects)
    gain = gain_kept(evidence.reference, figures)
    if gain is not None and _GAIN in bounds and gain.share < bounds[_GAIN]:
        defects.append(_lost_gain(gain, bounds[_GAIN], evidence))
    bound = bounds.get("kl_mean")
    if bound is not None and figures.kl_mean is not None and not figures.kl_mean <= bound:
        defects.append(defect(DefectKind.OVER_BOUND, figure="mean KL", value=figures.kl_mean, bound=bound))
    stops = Count(figures.stops, len(evidence.reference.stops) if figures.loss is not None else 0)
    if bounds and stops.of - stops.good > max(1.0, _ENDS_MISSED * stops.of):
        defects.append(defect(DefectKind.ENDS_MISSED, count=stops.good, of=stops.of))
    check = StageCheck(
        artifact.name, stage, artifact.file, artifact.size, against, Count(figures.prompts_equal, figures.prompts),
        figures.top1_agreement, figures.kl_mean, figures.kl_p99, figures.loss, stops, bounds,
        gain_kept=gain.share if gain else None, gain_kept_error=gain.error if gain else None,
    )  # fmt: skip
    return JudgedCheck(check, tuple(defects))


def _lost_gain(gain: GainKept, bound: float, evidence: Evidence) -> Defect:
    """Return the defect of a file that lost too much of what training gained, with the smallest that keeps it."""
    keeping = smallest_that_keeps(evidence)
    if keeping is None:
        return defect(DefectKind.GAIN_LOST, kept=gain.share, bound=bound)
    name, share = keeping
    return defect(DefectKind.GAIN_LOST_HERE, kept=gain.share, bound=bound, keeping=name, keeping_kept=share)


def _judge_served(measured: MeasuredGguf) -> JudgedCheck:
    measurement = measured.measurement
    defects = list(measurement.served_defects)
    ended = Count(measurement.served_ended, measurement.served_answers)
    if ended.of > 1 and not ended.good:
        defects.append(defect(DefectKind.NEVER_ENDS, of=ended.of))
    name = f"served {'f16' if measured.gguf.name == F16 else measured.gguf.name}"
    equal = Count(measurement.served_equal, measurement.served_prompts)
    check = StageCheck(name, "modelfile", measured.modelfile, prompt_ids_equal=equal, stops=ended)
    return JudgedCheck(check, tuple(defects))


def _path_checks(measured: MeasuredGguf) -> Iterator[PathCheck]:
    measurement = measured.measurement
    for asked in measurement.paths:
        prompts = compare_prompts(asked.prompts)
        yield PathCheck(
            measured.gguf.name,
            asked.path,
            asked.path == measurement.ollama_path,
            Count(prompts.equal, prompts.of),
            _by_trait(asked.battery),
        )


def _by_trait(results: Sequence[PromptResult]) -> dict[str, str]:
    """Return the outcome for each trait; where both sides of a switch were asked, that of the one that is wrong."""
    outcomes: dict[str, str] = {}
    for result in results:
        if outcomes.get(result.name, Outcome.EQUAL) == Outcome.EQUAL:
            outcomes[result.name] = result.outcome.value
    return outcomes


def _bounds(name: str, reference: Reference, figures: Figures) -> dict[str, float]:
    """The bounds of a GGUF's figures."""
    if name == F16:
        return {"kl_mean": _F16_KL}
    kl_mean = next((bound for bits, bound in _QUANTIZED_KL.items() if name.startswith(bits)), None)
    bounds = {} if gain_kept(reference, figures) is None else {_GAIN: GAIN_KEPT}
    return bounds if kl_mean is None else {"kl_mean": kl_mean, **bounds}


# ---------------------------------------------------------------- training


def _training_defects(evidence: Evidence) -> Iterator[Defect]:
    """Compare the losses of base and adapter with those that training measured."""
    if evidence.recorded is None:
        return
    reference = evidence.reference
    for number, (model, loss) in enumerate((("base", reference.base_loss), ("tuned", reference.tuned_loss))):
        recorded = evidence.recorded[number]
        if recorded is None:
            continue
        tolerance = _loss_tolerance(evidence, [losses[number] for losses in reference.chat_losses], recorded)
        if not abs(loss - recorded) <= tolerance:
            yield defect(DefectKind.LOSS_DIFFERS, model=model, loss=loss, recorded=recorded)


def _loss_tolerance(evidence: Evidence, losses: Sequence[float], recorded: float) -> float:
    """How far a loss may be from what training measured; when only some chats are compared, chance adds to it."""
    tolerance = (_LOSS_APART_4BIT if evidence.load_in_4bit else _LOSS_APART) * (1 + recorded)
    if evidence.reference.whole:
        return tolerance
    weights = evidence.reference.chat_weights
    if len(losses) < 2:
        return math.inf
    mean = sum(losses) / sum(weights)
    residuals = sum((loss - mean * weight) ** 2 for loss, weight in zip(losses, weights, strict=True))
    error = math.sqrt(residuals * len(losses) / (len(losses) - 1)) / sum(weights)
    return tolerance + _STANDARD_ERRORS * error

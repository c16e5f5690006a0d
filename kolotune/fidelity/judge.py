"""From what was measured to a verdict: bounds, the first stage that fails, and the likely cause.

The bounds are wide against what was measured and narrow against what damage does. On the sample: merged in f16
1e-6, f16 GGUF 2e-6, Q8_0 3e-3, Q4_K_M 4e-2; small models suffer most from quantization. A wrong scale, a
transposed matrix or rows in another order cost 0.1 and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .comparison import ComparedAnswer, Comparison, Count, Failure, QuantizationFigures, StageCheck
from .tasks import Figures, GgufMeasurement, Reference

ADAPTER, MERGED, F16 = "adapter on base", "merged", "f16 GGUF"
_MERGED_KL = {"f16": 1e-4, "fp32": 1e-4, "bf16": 1e-2}
_F16_KL = 1e-3
# Mean KL to the unquantized GGUF, by the bits that a quantization's name begins with; fewer bits have no bound.
_QUANTIZED_KL = {"BF": 1e-2, "Q8": 2e-2, "Q6": 0.06, "Q5": 0.12, "Q4": 0.4, "IQ4": 0.4, "MXFP4": 0.4, "Q3": 1.0}
_STOPS_MISSED = 0.1
_LOSS_APART = 0.01  # of what training measured: it computes in bf16 where that is fast
_LOSS_APART_4BIT = 0.1
_STANDARD_ERRORS = 4.0
_LOSS_KEPT = 0.5  # of what training gained, a quantization keeps at least so much
_NOTABLE_GAIN = 0.2
# The smallest quantization is recommended that loses no more than this share of what training gained, or so many nats.
_LOSS_LOST, _LOSS_UNSEEN = 0.05, 0.01


@dataclass(frozen=True)
class MeasuredFile:
    """One thing that was measured: what it is called and where it is."""

    name: str
    file: str
    size: int | None


@dataclass(frozen=True)
class Evidence:
    """All that the verdict rests on.

    Attributes:
        reference: of the tuned model.
        merged: None when it is not kept.
        ggufs: what was measured, with the Modelfile's name, in order: the unquantized one first, where it is kept.
        merge_dtype: as in `Config`. load_in_4bit: the base was in 4 bits while it was trained.
        adapter: the adapter's size.
        recorded: held-out losses that training measured: of the base, and of what it kept; None: none.
        not_kept: see `Comparison`.
        untied: head and embedding are one in the base and two in the merged model.
        tried: quantizations that were made to be measured, and are not kept: no gate for the run.
        weighted: names of quantizations that were made with an importance matrix.
    """

    reference: Reference
    merged: MeasuredFile | None
    ggufs: Sequence[tuple[MeasuredFile, str, GgufMeasurement]]
    merge_dtype: str
    load_in_4bit: bool
    adapter: MeasuredFile
    recorded: tuple[float, float] | None
    not_kept: tuple[str, ...]
    untied: bool = False
    tried: Sequence[tuple[MeasuredFile, GgufMeasurement]] = ()
    weighted: frozenset[str] = frozenset()


def verdict(evidence: Evidence) -> Comparison:
    """What was found, with the first failure."""
    reference = evidence.reference
    checked = tuple(_checked(evidence))
    notes = list(reference.notes)
    for _, _, answer in evidence.ggufs:
        notes += answer.notes
    if not reference.held_out:
        notes.append("no chats are held out: the first training chats were compared")
    if evidence.recorded is None:
        notes.append("training measured no held-out loss that base and adapter could be held against")
    wrong = {made.name: next(iter(answer.figures.wrong), "") for made, answer in evidence.tried}
    notes += [f"{name} could not be measured: {why}" for name, why in wrong.items() if why]
    recorded = evidence.recorded or (None, None)
    tried = tuple(sorted(_tried(evidence), key=lambda each: each.size_bytes))
    best, because = recommended(tried, reference.base_loss, reference.tuned_loss)
    if any(each.name == best and not each.kept for each in tried):
        because += f"; `kolotune quantize RUN --quantization {best}` makes it"
    return Comparison(
        chats=len(reference.chats),
        positions=sum(reference.labels),
        held_out=reference.held_out,
        base_loss=reference.base_loss,
        tuned_loss=reference.tuned_loss,
        recorded_base_loss=recorded[0],
        recorded_tuned_loss=recorded[1],
        checked=checked,
        answers=tuple(
            ComparedAnswer(_last_of_user(each.messages), each.base, each.tuned, each.expected)
            for each in reference.answers
        ),
        not_kept=evidence.not_kept,
        notes=tuple(dict.fromkeys(notes)),
        quantizations=tried,
        recommended=best,
        recommended_because=because,
        failure=_first_failure(checked, evidence),
    )


def _tried(evidence: Evidence) -> Iterator[QuantizationFigures]:
    """The quantizations that could be measured whole."""
    own = [(made, answer, True) for made, _, answer in evidence.ggufs if made.name != F16]
    for made, answer, kept in [*own, *((made, answer, False) for made, answer in evidence.tried)]:
        seen = answer.figures
        if made.size is None or seen.wrong or seen.loss is None or seen.kl_mean is None or seen.top1_agreement is None:
            continue
        weighted = made.name in evidence.weighted
        yield QuantizationFigures(made.name, made.size, seen.loss, seen.kl_mean, seen.top1_agreement, weighted, kept)


def recommended(tried: Sequence[QuantizationFigures], base_loss: float, tuned_loss: float) -> tuple[str, str]:
    """The quantization with the best loss for its size, and why; "" twice where there are not two to choose from."""
    if len(tried) < 2:
        return "", ""
    allowed = tuned_loss + max(_LOSS_LOST * (base_loss - tuned_loss), _LOSS_UNSEEN)
    good = [each for each in tried if each.loss <= allowed]
    if not good:
        best = min(tried, key=lambda each: each.loss)
        return best.name, "all lose a notable part of what was learnt, and this one the least"
    best = min(good, key=lambda each: each.size_bytes)
    return best.name, f"the smallest whose loss ({best.loss:.4f}) is near that of the tuned model ({tuned_loss:.4f})"


def _last_of_user(messages: Sequence[Mapping[str, object]]) -> str:
    return next((str(each["content"]) for each in reversed(messages) if each["role"] == "user"), "")


def _checked(evidence: Evidence) -> Iterator[StageCheck]:
    """In the order of the road; what is served comes last, for the Modelfile is written last."""
    reference = evidence.reference
    equal = Count(reference.prepared_equal, reference.prepared_chats)
    yield StageCheck("prepared chats", "prepare", prompt_ids_equal=equal, failed=tuple(reference.wrong_prepared))
    yield StageCheck(
        ADAPTER,
        "train",
        evidence.adapter.file,
        evidence.adapter.size,
        top1_agreement=1.0,
        kl_mean=0.0,
        kl_p99=0.0,
        loss=reference.tuned_loss,
        stops=Count(len(reference.stops), len(reference.stops)),
        failed=tuple(_wrong_training(evidence)),
    )
    before = ADAPTER
    if evidence.merged is not None and reference.merged is not None:
        bounds = {"kl_mean": _MERGED_KL[evidence.merge_dtype]}
        yield _judged(evidence, evidence.merged, "merge", before, reference.merged, bounds)
        before = MERGED
    first = before
    for made, _, answer in evidence.ggufs:
        bounds = _bounds(made.name, reference)
        yield _judged(evidence, made, "convert" if made.name == F16 else "quantize", before, answer.figures, bounds)
        first = made.name if made.name == F16 else first
        before = first
    for made, modelfile, answer in evidence.ggufs:
        if modelfile:
            yield _served(made, modelfile, answer)


def _bounds(name: str, reference: Reference) -> dict[str, float]:
    """The bounds of a GGUF."""
    if name == F16:
        return {"kl_mean": _F16_KL}
    found = next((bound for bits, bound in _QUANTIZED_KL.items() if name.startswith(bits)), None)
    if found is None:
        return {}
    bounds = {"kl_mean": found}
    gain = reference.base_loss - reference.tuned_loss
    if gain > _NOTABLE_GAIN:
        bounds["loss"] = reference.tuned_loss + (1 - _LOSS_KEPT) * gain
    return bounds


def _judged(
    evidence: Evidence, made: MeasuredFile, stage: str, against: str, seen: Figures, bounds: Mapping[str, float]
) -> StageCheck:
    failed = list(seen.wrong)
    for name, bound in bounds.items():
        value = getattr(seen, name)
        if value is not None and not value <= bound:
            failed.append(f"{_WORDS[name]} {value:.2g} is over its bound of {bound:.2g}")
    stops = Count(seen.stops, len(evidence.reference.stops) if seen.loss is not None else 0)
    if bounds and stops.of - stops.good > max(1.0, _STOPS_MISSED * stops.of):
        failed.append(f"only {stops.good} of {stops.of} answers end where they should")
    return StageCheck(
        made.name, stage, made.file, made.size, against, Count(seen.prompts_equal, seen.prompts), seen.top1_agreement,
        seen.kl_mean, seen.kl_p99, seen.loss, stops, bounds, tuple(failed),
    )  # fmt: skip


_WORDS = {"kl_mean": "mean KL", "loss": "loss"}


def _served(made: MeasuredFile, modelfile: str, answer: GgufMeasurement) -> StageCheck:
    failed = list(answer.wrong_served)
    ended = Count(answer.served_ended, answer.served_answers)
    if ended.of > 1 and not ended.good:
        failed.append(f"none of {ended.of} answers ends by itself, and all do with the adapter on its base")
    name = f"served {'f16' if made.name == F16 else made.name}"
    equal = Count(answer.served_equal, answer.served_prompts)
    return StageCheck(name, "modelfile", modelfile, prompt_ids_equal=equal, stops=ended, failed=tuple(failed))


# ---------------------------------------------------------------- training


def _wrong_training(evidence: Evidence) -> Iterator[str]:
    """Base and adapter against the losses that training measured with them."""
    if evidence.recorded is None:
        return
    reference = evidence.reference
    for number, (name, loss) in enumerate((("base", reference.base_loss), ("tuned", reference.tuned_loss))):
        recorded = evidence.recorded[number]
        allowed = _allowed(evidence, [each[number] for each in reference.chat_losses], recorded)
        if not abs(loss - recorded) <= allowed:
            yield f"the {name} model's loss is {loss:.4f}, and training measured {recorded:.4f}"


def _allowed(evidence: Evidence, losses: Sequence[float], recorded: float) -> float:
    """How far a loss may be from what training measured; of a part of the chats, as far as chance goes."""
    apart = (_LOSS_APART_4BIT if evidence.load_in_4bit else _LOSS_APART) * (1 + recorded)
    if evidence.reference.whole:
        return apart
    labels = evidence.reference.labels
    if len(losses) < 2:
        return math.inf
    mean = sum(losses) / sum(labels)
    residuals = sum((loss - mean * count) ** 2 for loss, count in zip(losses, labels, strict=True))
    error = math.sqrt(residuals * len(losses) / (len(losses) - 1)) / sum(labels)
    return apart + _STANDARD_ERRORS * error


# ---------------------------------------------------------------- causes


def _first_failure(checked: Sequence[StageCheck], evidence: Evidence) -> Failure | None:
    failed = next((each for each in checked if each.failed), None)
    if failed is None:
        return None
    return Failure(failed.stage, f"{failed.name}: {failed.failed[0]}", _cause(failed, evidence))


def _cause(failed: StageCheck, evidence: Evidence) -> str:
    """The likely cause, from what kind of thing is wrong."""
    words = " ".join(failed.failed)
    if failed.stage == "prepare":
        return "the template, the tokenizer or the labels were changed after the chats had been prepared"
    if failed.stage == "train":
        if "base model's loss" in words:
            return "this is not the base model that was trained on: its shape is the same, its weights are others"
        return "this is not the adapter that training ended with: it was replaced, or its halves are mixed up"
    if failed.stage == "modelfile":
        return _cause_of_served(failed)
    where = {"merge": "merged model's", "convert": "GGUF's", "quantize": "quantized GGUF's"}[failed.stage]
    if "vocabulary" in words:
        return f"the {where} vocabulary is not in the order of the trained tokenizer"
    if "prompts get other tokens" in words:
        return f"the {where} chat template was changed, or its tokenizer adds a BOS that training did not have"
    return _cause_in_weights(failed, evidence)


def _cause_of_served(failed: StageCheck) -> str:
    words = " ".join(failed.failed)
    if "no stop" in words:
        return "a PARAMETER stop is missing in the Modelfile, so that answers run on"
    if "SYSTEM" in words:
        return "the SYSTEM line was dropped or changed"
    if "prompts get other tokens" in words:
        return (
            "the TEMPLATE writes conversations otherwise than the trained template (its system turn, its BOS, a turn)"
        )
    return "the Modelfile was changed by hand"


def _cause_in_weights(failed: StageCheck, evidence: Evidence) -> str:
    if failed.stage == "quantize":
        return "a tensor of the file is damaged, or the quantization is too coarse for this model (Q8_0 keeps more)"
    if failed.stage == "convert":
        return (
            "the converter reads this model otherwise than transformers does (another version of it?), or the file "
            "was damaged"
        )
    reference = evidence.reference
    if "weights lack" in " ".join(failed.failed):
        return "head and embedding were untied in the config, and the head's weights are not there"
    if evidence.untied:
        return "head and embedding are one in the base and two in the merged model, and differ"
    near_base = failed.loss is not None and abs(failed.loss - reference.base_loss) < abs(
        failed.loss - reference.tuned_loss
    )
    if near_base:
        return "the adapter was added with too small a scale or not at all, or to another base model"
    return "the adapter was added with a wrong scale or orientation"

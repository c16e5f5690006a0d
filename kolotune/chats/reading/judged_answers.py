"""Records of two answers and a key that says which of them is better: which one is preferred, which one rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .faults import FaultKind, fail
from .json_values import is_filled
from .printable import printable, quoted
from .record_keys import canonical


class _JudgedForm(NamedTuple):
    """The keys of two answers, the key that says which is better, and the verdicts for the first and for the second."""

    first: str
    second: str
    verdict: str
    for_first: tuple[str, ...]
    for_second: tuple[str, ...]


_FORMS = (
    _JudgedForm("response_0", "response_1", "better_response_id", ("0",), ("1",)),
    _JudgedForm("human_ref_a", "human_ref_b", "labels", ("1",), ("0",)),
    _JudgedForm("response_a", "response_b", "winner", ("model_a", "a", "response_a"), ("model_b", "b", "response_b")),
    _JudgedForm("conversation_a", "conversation_b", "winner", ("model_a", "a"), ("model_b", "b")),
)
_TIES = ("tie", "both_bad", "bothbad", "tie_(bothbad)", "both", "neither")


def judged_answers(record: Mapping[str, object]) -> dict[str, object] | None:
    """Return the record with its answers as "chosen" and "rejected"; None if it is no such record.

    Where neither answer is better, both are the same, so that the record is counted as one that decides nothing.

    Raises:
        RecordError: The verdict is none that is known.
    """
    names = {canonical(name): name for name in record}
    for form in _FORMS:
        if not {form.first, form.second, form.verdict} <= names.keys() or "chosen" in names:
            continue
        if not (is_filled(record[names[form.first]]) and is_filled(record[names[form.second]])):
            continue
        verdict = canonical(str(record[names[form.verdict]])).removesuffix(".0")
        better, worse = names[form.first], names[form.second]
        if verdict in form.for_second:
            better, worse = worse, better
        elif verdict in _TIES:
            worse = better
        elif verdict not in form.for_first:
            known = ", ".join([*form.for_first[:1], *form.for_second[:1]])
            cause = f"{form.verdict} is {printable(verdict, 20)}; known: {known}, tie"
            fail(FaultKind.NO_PREFERENCE, cause, subject=quoted(form.verdict))
        used = {names[key] for key in (form.first, form.second, form.verdict)}
        rest = {name: value for name, value in record.items() if name not in used}
        # SHP calls what was written before the answers their history.
        prompt = {"prompt": rest.pop(names["history"])} if form.verdict == "labels" and "history" in names else {}
        return {**rest, **prompt, "chosen": record[better], "rejected": record[worse]}
    return None


def judged_columns(columns: Sequence[str]) -> bool:
    """Whether a table's columns have such records."""
    names = set(map(canonical, columns))
    return any({form.first, form.second, form.verdict} <= names for form in _FORMS)

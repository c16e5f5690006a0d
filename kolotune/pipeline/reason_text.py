"""The sentences that `kolotune run` and `kolotune status` show for reasons and cleaned outputs."""

from __future__ import annotations

from collections.abc import Sequence

from kolotune.run_folder.reasons import Reason, ReasonKind

_SENTENCES = {
    ReasonKind.NEVER_RAN: "it has not run yet",
    ReasonKind.OPTION_CHANGED: "{name} changed from {before} to {after}",
    ReasonKind.INPUT_CHANGED: "{name} changed",
    ReasonKind.INPUT_NOT_GIVEN: "{name} is no longer given",
    ReasonKind.VERSION_CHANGED: "{name} changed from {before} to {after}",
    ReasonKind.OUTPUT_MISSING: "{name} is missing",
    ReasonKind.OUTPUT_ALTERED: "{name} was changed since it was made",
}
# Labels are part of records and stay as they are; these read badly.
_LABELS = {"what training measured": "metrics.jsonl"}


def format_reason(reason: Reason) -> str:
    """Return a reason as a sentence without its full stop."""
    is_option = reason.kind is ReasonKind.OPTION_CHANGED
    return _SENTENCES[reason.kind].format(
        name=reason.name.replace("_", "-") if is_option else _LABELS.get(reason.name, reason.name),
        before=_format_value(reason.before),
        after=_format_value(reason.after),
    )


def format_cleaned(names: Sequence[str]) -> str:
    """Return a sentence about outputs that were cleaned."""
    return f"{', '.join(names)} cleaned since; made again when needed"


def _format_value(value: object) -> str:
    """Return an option's value as the user would write it."""
    if value in (None, "", []):
        return "nothing"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

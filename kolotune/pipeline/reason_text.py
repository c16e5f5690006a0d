"""The sentences that `kolotune run` and `kolotune status` show for reasons and cleaned outputs."""

from __future__ import annotations

from collections.abc import Sequence

from kolotune.run_folder.reasons import Reason, ReasonKind

# Labels are part of records and stay as they are; these read badly.
_LABELS = {"what training measured": "metrics.jsonl"}


def format_reason(reason: Reason) -> str:
    """Return a reason as a sentence without its full stop."""
    name = _LABELS.get(reason.name, reason.name)
    match reason.kind:
        case ReasonKind.NEVER_RAN:
            return "it has not run yet"
        case ReasonKind.OPTION_CHANGED:
            before, after = _format_value(reason.before), _format_value(reason.after)
            return f"{name.replace('_', '-')} changed from {before} to {after}"
        case ReasonKind.INPUT_CHANGED:
            return f"{name} changed"
        case ReasonKind.INPUT_NOT_GIVEN:
            return f"{name} is no longer given"
        case ReasonKind.VERSION_CHANGED:
            return f"{name} changed from {reason.before} to {reason.after}"
        case ReasonKind.OUTPUT_MISSING:
            return f"{name} is missing"
        case ReasonKind.OUTPUT_ALTERED:
            return f"{name} was changed since it was made"


def format_cleaned(names: Sequence[str]) -> str:
    """Return a sentence about outputs that were cleaned."""
    return f"{', '.join(names)} cleaned since; made again when needed"


def _format_value(value: object) -> str:
    """Return an option's value as the user would write it."""
    if value in (None, "", []):
        return "nothing"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

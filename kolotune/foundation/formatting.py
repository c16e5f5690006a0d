"""Sizes, durations and measured values as people read them."""

from __future__ import annotations

from collections.abc import Mapping


def format_size(count: float) -> str:
    """Return a number of bytes as text, such as ``1.5 MB``."""
    from rich.filesize import decimal

    return decimal(int(count))


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as ``12 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / (24 * 3600):.1f} days"


def format_fields(fields: Mapping[str, object]) -> list[str]:
    """Return the fields of a running count as text: ``loss 2.4109``, ``612 tokens/s``."""
    shown = []
    for name, value in fields.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        unit, per, _ = name.partition("_per_second")
        shown.append(f"{text} {unit}/s" if per else f"{name.replace('_', ' ')} {text}")
    return shown

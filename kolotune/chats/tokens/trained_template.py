"""Which template a run trains with: the base's, bound to one date and to what training hands to it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from kolotune.foundation.config import Config

from ..templates.template_binding import bind
from .tokenizer import template_text


def trained_template(config: Config, base: Path, tokens: Mapping[str, object]) -> str:
    """Return the Jinja source that a run trains with, stores and serves.

    Args:
        config: The resolved config; without a date, today's is used.
        base: The folder of the base model.
        tokens: The special tokens of its tokenizer; see `tokenizer.special_tokens`.

    Raises:
        TemplateError: There is no template, or it can't be bound.
        ModelError: A file of the tokenizer can't be read.
    """
    day = date.fromisoformat(config.template_date) if config.template_date else date.today()
    return bind(template_text(base), day, tokens)

"""Which template a run trains with, bound to what training hands to it, and where a finished run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.source import read_source

from ..templates.plain_text import plain_text_template
from ..templates.template_binding import bind
from .text_encoder import begin_tokens
from .tokenizer import TOKENIZER_FILES, has_template, load_tokenizer, template_text


def trained_template(config: Config, base: Path, tokens: Mapping[str, object]) -> str:
    """Return the Jinja source that a run trains with, stores and serves.

    A base without a chat template that is trained on plain text gets one that writes texts alone.

    Args:
        config: The resolved config; without a date, today's is used.
        base: The folder of the base model.
        tokens: The special tokens of its tokenizer; see `tokenizer.special_tokens`.

    Raises:
        ConfigError: The user's template can't be read, or the template does not have a variable that is to stay free.
        TemplateError: There is no template, or it can't be bound.
        ModelError: A file of the tokenizer can't be read.
    """
    own = config.chat_template
    if own is None and config.objective == "text" and not has_template(base):
        return plain_text_template(begins=bool(begin_tokens(load_tokenizer(base))))
    day = date.fromisoformat(config.template_date) if config.template_date else date.today()
    return bind(template_text(base) if own is None else _read(own), day, tokens, config.template_switch)


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the chat template can't be read: {error}", "Give a Jinja file in UTF-8.") from None
    if not text.strip():
        raise ConfigError(f"{file}: the chat template is empty", "Give a Jinja file, or omit --chat-template.")
    return text


def trained_folder(run: RunFolder) -> Path:
    """Return the folder of a finished run that contains the trained tokenizer and template.

    Raises:
        ArtifactError: There is none.
    """
    source = read_source(run)
    folders = [run.tokenizer, run.merged_model, run.exported_tokenizer, *([source] if source else [])]
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    raise ArtifactError(f"{run.root}: its tokenizer is missing")

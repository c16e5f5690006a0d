"""The beginnings of documents as prompts, for a model that is served a prompt as it is."""

from __future__ import annotations

import itertools
from pathlib import Path

from kolotune.chats.reading.documents import read_document
from kolotune.chats.reading.files import opened
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.foundation.objectives import LearnsFrom

from .prompt_proof import Prompt
from .trained_format import TrainedFormat

_BEGINNING, _EXPECTED = 24, 300  # tokens of a document that are a prompt; characters of what follows, to show


def held_out_beginnings(file: Path, trained: TrainedFormat, most: int) -> list[Prompt]:
    """Return the beginnings of some held-out documents; none where the base is served chats."""
    if not is_plain_text(trained.template.jinja):
        return []
    reading = ReadingOptions(learns_from=LearnsFrom.TEXT)
    with opened(file, reading) as (_, records):
        texts = [read_document(file, record, reading).text for record in itertools.islice(records, most)]
    return [beginning(text, trained)[0] for text in texts if text is not None]


def beginning(text: str, trained: TrainedFormat) -> tuple[Prompt, str]:
    """Return the prompt that is the beginning of a document, and what follows it."""
    ids = trained.tokens(text)
    if len(ids) > 2 * _BEGINNING:
        start = str(trained.tokenizer.decode(ids[:_BEGINNING], clean_up_tokenization_spaces=False))
    else:
        start = text[: len(text) // 2]
    start = start.rsplit(None, 1)[0] if len(start.split()) > 1 else start
    start = start if text.startswith(start) else text[: len(start)]
    return trained.prompt([{"role": "user", "content": start}], None), text[len(start) :][:_EXPECTED]

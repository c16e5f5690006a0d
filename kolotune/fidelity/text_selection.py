"""Which pieces of documents are compared, and the prompts: their beginnings, or questions where the base chats.

A base without a chat template is served a prompt as it is, so the beginnings of documents are its prompts. One with a
template is served chats, on which this training did not work: kolotune's starter chats ask what became of them.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path

from kolotune.chats.chat import trained_answers
from kolotune.chats.reading.documents import read_document
from kolotune.chats.reading.files import opened, read_chats
from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.chats.tokens.text_encoder import TextEncoder, pieces_of
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.errors import ArtifactError, DataError, KolotuneError

from .defects import DefectKind, NoteKind, defect, note
from .selection_result import Selection, compared_chat
from .tasks import ModelsTask
from .text_prompts import beginning
from .trained_format import TrainedFormat

_SEARCHED_TOKENS = 1_000_000
"""Tokens of documents that are encoded again to find those that are compared."""
_MOST_PROMPTS = 16


def select_documents(task: ModelsTask, trained: TrainedFormat) -> Selection:
    """Select the pieces to compare, and check that their documents still get the prepared tokens.

    Raises:
        TrainingError, ArtifactError: the prepared documents can't be read, or there are none.
    """
    selection = Selection()
    tokens = PreparedTokens.load(Path(task.tokens))
    if not len(tokens):
        raise ArtifactError(f"{task.tokens}: there is nothing to compare with", "Run `kolotune prepare` again.")
    total = 0
    for index in range(min(len(tokens), task.most_chats)):
        numbers = tokens.sequences(index)
        total += sum(map(tokens.sequence_length, numbers))
        if selection.chats and total > task.most_tokens:
            break
        start = len(selection.chats)
        for ids, _ in map(tokens.sequence, numbers):
            selection.chats.append(compared_chat(ids.tolist(), [False] + [True] * (len(ids) - 1), trained.end_id))
        selection.sequences.append(range(start, len(selection.chats)))
    selection.is_whole = len(selection.sequences) == len(tokens)
    _check_texts(selection, task, trained, tokens.longest)
    if is_plain_text(trained.template.jinja):
        return selection
    _add_questions(selection, trained)
    return selection


def _check_texts(selection: Selection, task: ModelsTask, trained: TrainedFormat, longest: int) -> None:
    encoder = TextEncoder(trained.tokenizer)
    wanted = {tuple(chat.ids) for chat in selection.chats}
    reproduced: set[tuple[int, ...]] = set()
    searched, is_all = 0, True
    for text in _texts(task):
        (ids,) = encoder.encode_all([text])
        if isinstance(ids, DataError):
            continue
        pieces = {tuple(piece) for piece in pieces_of(ids, longest)}
        if pieces & wanted and is_plain_text(trained.template.jinja) and len(selection.prompts) < _MOST_PROMPTS:
            _add_beginning(selection, text, trained)
        reproduced |= pieces & wanted
        searched += len(ids)
        if reproduced == wanted or searched > _SEARCHED_TOKENS:
            is_all = reproduced == wanted
            break
    if not reproduced:
        selection.notes.append(note(NoteKind.TEXTS_MISSING))
        return
    selection.reproduced = sum(tuple(chat.ids) in reproduced for chat in selection.chats)
    selection.with_text = len(selection.chats) if is_all else selection.reproduced
    changed = selection.with_text - selection.reproduced
    if changed:
        selection.defects.append(defect(DefectKind.CHATS_DIFFER, count=changed, of=selection.with_text))


def _add_beginning(selection: Selection, text: str, trained: TrainedFormat) -> None:
    try:
        prompt, expected = beginning(text, trained)
    except KolotuneError as error:
        selection.defects.append(defect(DefectKind.PROMPT_REFUSED, reason=error.cause))
        return
    selection.prompts.append(prompt)
    selection.expected.append(expected)


def _add_questions(selection: Selection, trained: TrainedFormat) -> None:
    """Add the first questions of the starter chats, which this training did not answer."""
    with importlib.resources.as_file(importlib.resources.files("kolotune.chats.starter") / "chats.jsonl") as file:
        chats = read_chats([file]).chats[:_MOST_PROMPTS]
    for chat in chats:
        first = trained_answers(chat)[0]
        try:
            prompt = trained.prompt(chat.message_dicts()[:first], None)
        except KolotuneError:
            continue  # such as a system turn, where the template has no place for one
        selection.prompts.append(prompt)
        selection.expected.append(None)


def _texts(task: ModelsTask) -> Iterator[str]:
    """Yield the texts of the held-out documents, or of all where none is held out."""
    for path in map(Path, [task.chats_file] if task.chats_file else task.train_data):
        try:
            with opened(path, task.reading) as (_, records):
                for record in records:
                    text = read_document(path, record, task.reading).text
                    if text is not None:
                        yield text
        except KolotuneError:
            return

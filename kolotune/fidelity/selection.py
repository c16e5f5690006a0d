"""Which chats and prompts are compared, and whether they are still prepared as they were for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kolotune.chats import Chat
from kolotune.chats.chat import trained_answers
from kolotune.chats.dataset.exchanges import exchanges_of
from kolotune.chats.reading.files import read_chats
from kolotune.chats.templates.rendering import has_thought
from kolotune.chats.templates.thoughts import empty_thought
from kolotune.chats.tokens.encoded_chat import EncodedChat
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens
from kolotune.foundation.errors import ArtifactError, KolotuneError
from kolotune.foundation.objectives import LearnsFrom

from .defects import DefectKind, NoteKind, defect, note
from .selection_result import Selection, compared_chat
from .tasks import ComparedChat, ModelsTask
from .text_selection import select_documents
from .trained_format import TrainedFormat

# Training chats that are read for each one compared: some of them are held out or were dropped.
_SEARCHED = 4


def select(task: ModelsTask, trained: TrainedFormat) -> Selection:
    """Select the chats to compare, and check how they were prepared.

    Raises:
        TrainingError, ArtifactError: the prepared chats can't be read, or there are none.
    """
    if task.tokens and task.reading.learns_from is LearnsFrom.TEXT:
        return select_documents(task, trained)
    selection = Selection()
    samples = [] if task.tokens else _add_samples(selection, task, trained)
    if task.tokens:
        _add_chats(selection, task, trained)
    without_end = sum(not chat.ends for chat in selection.chats)
    if without_end:
        selection.defects.append(
            defect(DefectKind.END_NOT_TRAINED, count=without_end, of=len(selection.chats), token=trained.end)
        )
    _add_texts(selection, _texts(selection, task, trained) if task.tokens else samples, trained)
    _add_probes(selection, task, trained)
    return selection


def _add_chats(selection: Selection, task: ModelsTask, trained: TrainedFormat) -> None:
    tokens = PreparedTokens.load(Path(task.tokens))
    total = 0
    for index in range(min(len(tokens), task.most_chats)):
        numbers = tokens.preferred_sequences(index)
        total += sum(map(tokens.sequence_length, numbers))
        if selection.chats and total > task.most_tokens:
            break
        start = len(selection.chats)
        for ids, labels, weights in ((*tokens.sequence(each), tokens.sequence_weights(each)) for each in numbers):
            chat = compared_chat(ids.tolist(), (labels != IGNORED).tolist(), trained.end_id)
            if weights is not None:
                chat = dataclasses.replace(chat, weights=[float(weights[at + 1]) for at in chat.positions])
            selection.chats.append(chat)
        selection.sequences.append(range(start, len(selection.chats)))
    if not selection.chats:
        raise ArtifactError(f"{task.tokens}: there is no chat to compare with", "Run `kolotune prepare` again.")
    selection.is_whole = len(selection.sequences) == len(tokens)


def _add_samples(selection: Selection, task: ModelsTask, trained: TrainedFormat) -> Sequence[Chat]:
    """Encode the chats in files, for a model that was not trained on any of its own; return those that were taken."""
    taken = []
    for chat in read_chats([Path(path) for path in task.train_data], task.reading).chats[: task.most_chats]:
        try:
            encoded = trained.encoder.encode(chat)
        except KolotuneError:
            continue  # such as a system turn, where the template has no place for one
        start, at = len(selection.chats), 0
        for length in encoded.lengths:
            ids, labels = encoded.ids[at : at + length], encoded.labelled[at : at + length]
            selection.chats.append(compared_chat(ids, labels, trained.end_id))
            at += length
        selection.sequences.append(range(start, len(selection.chats)))
        taken.append(chat)
        if sum(len(each.ids) for each in selection.chats) > task.most_tokens:
            break
    if not taken:
        raise ArtifactError(
            "the model's template writes none of the chats to compare with", "Skip the comparison with --no-compare."
        )
    return taken


def _add_probes(selection: Selection, task: ModelsTask, trained: TrainedFormat) -> None:
    """Add a prompt with a system turn, which serving must not lose, where the template supports one.

    What a template leaves out is in no chat that is trained on; llama.cpp's server writes it into the first question.
    """
    if trained.turns is None or trained.turns.refuses_system or trained.turns.system_style == "ignored":
        return
    if not selection.prompts:
        return
    turns = [turn for turn in selection.prompts[0].messages if turn["role"] != "system"]
    try:
        probe = trained.prompt([{"role": "system", "content": task.system or "Be brief."}, *turns], None)
    except KolotuneError:
        return
    selection.probes.append(probe)


def _add_texts(selection: Selection, texts: Sequence[Chat | None], trained: TrainedFormat) -> None:
    """Encode the chats' texts again, and add the prompts in them."""
    if not texts:
        selection.notes.append(note(NoteKind.TEXTS_MISSING))
    not_servable = 0
    for numbers, chat in zip(selection.sequences, texts, strict=False):
        if chat is None:
            continue
        compared = [selection.chats[number] for number in numbers]
        selection.with_text += 1
        try:
            encoded = trained.encoder.encode(chat)
        except KolotuneError as error:
            selection.defects.append(defect(DefectKind.CHAT_REFUSED, reason=error.cause))
            continue
        if not _is_same(compared, encoded):
            continue
        selection.reproduced += 1
        if encoded.special_in_content:
            not_servable += 1
            continue
        try:
            _add_prompts(selection, chat, compared, trained)
        except KolotuneError as error:
            selection.defects.append(defect(DefectKind.PROMPT_REFUSED, reason=error.cause))
    changed = selection.with_text - selection.reproduced
    if changed:
        selection.defects.append(defect(DefectKind.CHATS_DIFFER, count=changed, of=selection.with_text))
    if not_servable:
        selection.notes.append(note(NoteKind.PROMPTS_NOT_SERVABLE, count=not_servable))


def _add_prompts(selection: Selection, chat: Chat, compared: Sequence[ComparedChat], trained: TrainedFormat) -> None:
    """Add the prompt before each answer; that of a trained one must equal the tokens before it.

    A sequence shows them for its first trained answer only.
    """
    messages, trained_numbers = chat.message_dicts(), trained_answers(chat)
    starts = [sequence.ids[: sequence.positions[0] + 1] for sequence in compared if sequence.positions]

    def stands_alone(ids: list[int]) -> bool:
        """Whether nothing but an empty thought is between a prompt and what is trained on."""
        return any(start[: len(ids)] == ids and _is_empty_thought(trained, start[len(ids) :]) for start in starts)

    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        prompt = trained.prompt(messages[:index], list(chat.tools) or None, has_thought(chat.messages[index]))
        is_shown = index in trained_numbers and (index == trained_numbers[0] or len(starts) > 1)
        if is_shown and prompt.ids not in starts and not stands_alone(prompt.ids):
            selection.defects.append(defect(DefectKind.FIRST_PROMPT_DIFFERS))
        selection.prompts.append(prompt)
        selection.expected.append(str(message["content"]))


def _is_empty_thought(trained: TrainedFormat, ids: list[int]) -> bool:
    text = str(trained.tokenizer.decode(ids, skip_special_tokens=False))
    return empty_thought(text) == len(text)


def _is_same(compared: Sequence[ComparedChat], encoded: EncodedChat) -> bool:
    ids, labelled, start = encoded.ids, encoded.labelled, 0
    if [len(sequence.ids) for sequence in compared] != encoded.lengths:
        return False
    for sequence in compared:
        end = start + len(sequence.ids)
        positions = [index - 1 for index in range(1, len(sequence.ids)) if labelled[start + index]]
        if sequence.ids != ids[start:end] or sequence.positions != positions:
            return False
        start = end
    return True


def _texts(selection: Selection, task: ModelsTask, trained: TrainedFormat) -> Sequence[Chat | None]:
    """The text of each selected chat, None where it is unknown; empty when all are."""
    if task.chats_file:
        return read_chats([Path(task.chats_file)]).chats
    return _training_texts(selection, task, trained)


def _training_texts(selection: Selection, task: ModelsTask, trained: TrainedFormat) -> Sequence[Chat | None]:
    """The texts of training chats, found by their tokens in the user's files."""
    numbers = {
        tuple(token for sequence in sequences for token in selection.chats[sequence].ids): number
        for number, sequences in enumerate(selection.sequences)
    }
    texts: list[Chat | None] = [None] * len(selection.sequences)
    try:
        read = read_chats([Path(path) for path in task.train_data], task.reading)
    except KolotuneError:
        return []
    split = task.reading.splits_thoughts
    candidates = [each for chat in read.chats for each in ([chat, *exchanges_of(chat)] if split else [chat])]
    for chat in candidates[: _SEARCHED * len(texts)]:
        try:
            number = numbers.get(tuple(trained.encoder.encode(chat).ids))
        except KolotuneError:
            continue
        if number is not None:
            texts[number] = chat
    return texts if any(texts) else []

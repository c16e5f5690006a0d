"""Measure with transformers: the base, the adapter on it (the reference), and the merged model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from kolotune.chats.tokens.tokenizer import special_tokens
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError, SpaceError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners.child_process import emit
from kolotune.runners.meanwhile import done_meanwhile
from kolotune.weights.adapter import LoraAdapter, read_adapter
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.stored_names import StoredNames
from kolotune.weights.weight_files import weight_files

from . import base_figures, log_probabilities
from .adapter_place import GgufPlace
from .compared_prompts import ComparedPrompts, compare_prompts
from .defects import Defect, DefectKind, NoteKind, defect, note
from .figures import compute_figures
from .log_probabilities import loss_of, split
from .measure_general import GeneralMeasurement
from .measure_prompts import ask_ahead
from .measured_model import MeasuredModel, open_by_transformers, open_measured
from .missing_weights import MissingWeightsError
from .packed_reference import PackedReference
from .prompt_proof import Prompt, PromptSet, ask
from .selection import select
from .selection_result import Selection
from .tasks import (
    CHANGES_FILE,
    MERGED_FILE,
    REFERENCE_FILE,
    TUNED_FILE,
    ComparedChat,
    Figures,
    GreedyAnswer,
    ModelsTask,
    Reference,
)
from .trained_format import TrainedFormat
from .vocabulary import moved_entry, vocabulary_by_id


def measure(file: Path) -> None:
    """Carry out the `ModelsTask` in a file; leave the reference and log-probabilities in its scratch folder.

    Raises:
        KolotuneError: base, adapter, tokenizer or prepared chats can't be used. What is wrong with the merged model
            is in its figures.
    """
    task = typed_storage.read(ModelsTask, file)
    trained = TrainedFormat.load(Path(task.tokenizer), learns_empty_thoughts=task.learns_empty_thoughts)
    selection = select(task, trained)
    prompts = PromptSet(
        prompts=selection.prompts,
        probes=selection.probes,
        battery=trained.battery(),
        pieces=vocabulary_by_id(trained.tokenizer),
        bos=special_tokens(trained.tokenizer).get("bos_token", ""),
    )
    emit("doing", text="the base model, and the adapter on it" if task.adapter else "the model")
    # PyTorch takes one core to load.
    with done_meanwhile([partial(ask_ahead, task.ggufs, prompts, Path(task.scratch))]):
        model = open_measured(task, selection.chats)
        reference, tuned = _measure_tuned(model, task, trained, selection, prompts)
        if task.merged:
            emit("doing", text="the merged model")
            merged = _measure_merged(model, Path(task.merged), reference, tuned, Path(task.scratch))
            reference = dataclasses.replace(reference, merged=merged)
    typed_storage.write(Path(task.scratch) / REFERENCE_FILE, reference)


def _measure_tuned(
    model: MeasuredModel, task: ModelsTask, trained: TrainedFormat, selection: Selection, asked: PromptSet
) -> tuple[Reference, np.ndarray]:
    """Measure the base and the adapter on it; return the reference and the log-probabilities of the tuned model."""
    chats = selection.chats
    prompts, expected = _prompts_to_answer(task, trained, selection)
    prompt_ids = [prompt.ids for prompt in prompts]
    general = GeneralMeasurement(task, trained)
    base = None
    base_answers: Sequence[list[int] | None]
    tuned_answers: Sequence[list[int] | None]
    if task.adapter:
        base = _BaseMeasurement(model, task, chats, prompt_ids, trained.end_id)
        if general.is_wanted:
            emit("doing", text="what the base model can do in general")
        general.measure_base(model)
        model.add(Path(task.adapter))
    tuned = _tuned_log_probabilities(model, task, chats)
    tuned_losses = [loss_of(array, chat) for array, chat in split(tuned, chats)]
    if base is None:
        base_losses = tuned_losses
        base_answers = tuned_answers = model.answers(prompt_ids, trained.end_id, task.longest_answer)
    else:
        base_losses, (base_answers, tuned_answers) = base.losses, base.answers_of_both(model)
    notes = list(selection.notes)
    if prompts and tuned_answers[0] is None:
        notes.append(note(NoteKind.READ_BY_LAYER))
    answers = zip(prompts, expected, base_answers, tuned_answers, strict=True)
    weights = [chat.weight for chat in chats]
    reference = Reference(
        chats=chats,
        prompts=selection.prompts,
        probes=selection.probes,
        answers=[_greedy_answer(trained, *answer) for answer in answers],
        chat_losses=[[base, tuned] for base, tuned in zip(base_losses, tuned_losses, strict=True)],
        labels=[len(chat.positions) for chat in chats],
        weights=weights if any(chat.weights is not None for chat in chats) else [],
        stops=_stops(tuned, chats, trained.end_id),
        held_out=bool(task.chats_file),
        whole=selection.is_whole,
        prepared_equal=selection.reproduced,
        prepared_chats=selection.with_text,
        prepared_defects=selection.defects,
        end_token=trained.end,
        pieces=list(asked.pieces),
        base_loss=sum(base_losses) / sum(weights),
        tuned_loss=sum(tuned_losses) / sum(weights),
        merged=None,
        notes=notes,
        battery=list(asked.battery),
        bos=asked.bos,
        general=general.measure_tuned(model),
    )
    log_probabilities.release(tuned)
    return reference, tuned


def _tuned_log_probabilities(model: MeasuredModel, task: ModelsTask, chats: Sequence[ComparedChat]) -> np.ndarray:
    """Compute and write the tuned model's log-probabilities of the chats; record what an adapter changes on the way."""
    written = partial(log_probabilities.write, Path(task.scratch) / TUNED_FILE, chats)
    if not task.adapter:
        return written(model.log_probabilities(chats))
    from .adapter_change import ChangeRecorder

    adapter = read_adapter(Path(task.adapter))
    recorder = ChangeRecorder(model, adapter)
    with recorder.recording():
        tuned = written(model.log_probabilities(chats))
    recorder.write(Path(task.scratch) / CHANGES_FILE, _places(task, adapter))
    return tuned


def _places(task: ModelsTask, adapter: LoraAdapter) -> dict[str, GgufPlace]:
    """Return where the GGUF has what the adapter changes, by the adapter's names."""
    entries = MappedTensors(weight_files(Path(task.base))).entries
    names = StoredNames(Path(task.base), entries)
    stored = {name: names.find(name) or name for name in adapter.deltas}
    return {name: task.places[place] for name, place in stored.items() if place in task.places}


class _BaseMeasurement:
    """What the base does with the chats, from the cache where an earlier comparison has left it.

    Its answers wait for those of the tuned model where both can grow together.

    Attributes:
        losses: on each chat.
    """

    def __init__(
        self,
        model: MeasuredModel,
        task: ModelsTask,
        chats: Sequence[ComparedChat],
        prompts: Sequence[list[int]],
        end: int,
    ) -> None:
        self._prompts, self._end, self._longest = prompts, end, task.longest_answer
        self._file = base_figures.figures_file(task.base_sha256, chats, prompts, end, task.longest_answer)
        self._answers: Sequence[list[int] | None] | None = None
        if known := base_figures.read(self._file):
            self.losses, self._answers = known.losses, known.answers
            return
        self.losses = model.losses(chats)
        if not isinstance(model, PackedReference):
            self._answers = model.answers(prompts, end, task.longest_answer)
            base_figures.keep(self._file, self.losses, self._answers)

    def answers_of_both(self, model: MeasuredModel) -> tuple[Sequence[list[int] | None], Sequence[list[int] | None]]:
        """Return the greedy answers of the base, and of the tuned model, which `model` is by now."""
        asked = self._prompts, self._end, self._longest
        if self._answers is not None:
            return self._answers, model.answers(*asked)
        assert isinstance(model, PackedReference)
        base, tuned = model.answers_of_both(*asked)
        base_figures.keep(self._file, self.losses, base)
        return base, tuned


def _prompts_to_answer(
    task: ModelsTask, trained: TrainedFormat, selection: Selection
) -> tuple[list[Prompt], list[str | None]]:
    """The prompts to answer and the expected answers: the user's own prompts, else the first of the chats."""
    if task.own_prompts:
        system: list[JsonObject] = [{"role": "system", "content": task.system}] if task.system else []
        own = [trained.prompt([*system, {"role": "user", "content": text}], None) for text in task.own_prompts]
        return own, [None] * len(own)
    pairs = zip(selection.prompts, selection.expected, strict=True)
    first = [(prompt, text) for prompt, text in pairs if _is_first(prompt)][: task.most_answers]
    return [prompt for prompt, _ in first], [text for _, text in first]


def _is_first(prompt: Prompt) -> bool:
    return all(turn["role"] != "assistant" for turn in prompt.messages)


def _stops(tuned: np.ndarray, chats: Sequence[ComparedChat], end: int) -> list[list[int]]:
    """Ends of answers where the tuned model's most likely token is the end token, as (chat, index)."""
    return [
        [number, index]
        for number, (array, chat) in enumerate(split(tuned, chats))
        for index in chat.ends
        if int(array[index].argmax()) == end
    ]


def _greedy_answer(
    trained: TrainedFormat, prompt: Prompt, expected: str | None, base: list[int] | None, tuned: list[int] | None
) -> GreedyAnswer:
    ended = tuned is not None and tuned[-1:] == [trained.end_id]
    texts = trained.decode(base), trained.decode(tuned)
    return GreedyAnswer(prompt.messages, prompt.ids, *texts, ended, expected, tuned or [])


def _measure_merged(
    model: MeasuredModel, folder: Path, reference: Reference, tuned: np.ndarray, scratch: Path
) -> Figures:
    """Measure the merged model, compared with the adapter on its base, whose `model` is used up."""
    prompts, defects = ComparedPrompts(of=len(reference.prompts)), list[Defect]()
    try:
        merged = TrainedFormat.load(folder)
        prompts = compare_prompts(list(ask(reference.prompts, merged, reference.pieces)))
        if moved := moved_entry(reference.pieces, [piece or "" for piece in vocabulary_by_id(merged.tokenizer)]):
            defects.append(moved)
        if merged.end != reference.end_token:
            defects.append(defect(DefectKind.END_TOKEN_DIFFERS, token=merged.end, expected=reference.end_token))
        if not model.read(folder):
            model.close()  # two do not have to fit
            model = open_by_transformers(folder)
        by_chat = model.log_probabilities(reference.chats)
        after = log_probabilities.write(scratch / MERGED_FILE, reference.chats, by_chat)
    except SpaceError:
        raise
    except KolotuneError as error:
        kind = DefectKind.WEIGHTS_MISSING if isinstance(error, MissingWeightsError) else DefectKind.NOT_MEASURABLE
        defects.append(defect(kind, reason=error.cause))
        return Figures(prompts_equal=prompts.equal, prompts=prompts.of, defects=[*prompts.defects, *defects])
    return compute_figures(reference, tuned, after, prompts, defects)

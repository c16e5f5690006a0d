"""Measure with llama.cpp: one GGUF, and how Ollama serves it with its Modelfile."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.chats.traits import ChatTrait
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, KolotuneError, ToolchainError
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile
from kolotune.ollama.prompt_path import PromptPath

from . import log_probabilities
from .change_survival import change_survival
from .compared_prompts import ComparedPrompts, compare_prompts
from .defects import Defect, DefectKind, Note, NoteKind, defect, note
from .figures import compute_figures
from .measure_prompts import ask_paths, ollama_path
from .prompt_proof import Outcome
from .tasks import CHANGES_FILE, AskedPath, Figures, GgufMeasurement, GgufTask, GreedyAnswer, Reference
from .vocabulary import moved_entry

if TYPE_CHECKING:
    import numpy as np

_SECONDS_BETWEEN_LOOKS = 0.02


def measure(file: Path) -> None:
    """Carry out the `GgufTask` in a file. What is wrong with the GGUF or its Modelfile is in the measurement."""
    task = typed_storage.read(GgufTask, file)
    reference = typed_storage.read(Reference, Path(task.reference))
    typed_storage.write(Path(task.answer_file), _measure(task, reference))


def _measure(task: GgufTask, reference: Reference) -> GgufMeasurement:
    lengths = [len(chat.ids) for chat in reference.chats]
    lengths += [len(prompt.ids) for prompt in reference.prompts] + [len(answer.ids) for answer in reference.answers]
    modelfile = _read_modelfile(task)
    template = modelfile.template if isinstance(modelfile, Modelfile) else None
    ask = partial(ask_paths, Path(task.gguf), template, reference.prompt_set, Path(task.reference).parent)
    try:
        # The GGUFs of a run mostly ask the same. The unquantized one computes the longest, so it asks last.
        paths = ask() if task.unquantized else []
        model = ExactGguf(Path(task.gguf), max(lengths) + task.longest_answer + 1, threads=task.threads)
    except (ArtifactError, ToolchainError) as error:
        return _not_measurable(reference, error)
    with contextlib.closing(model):
        computed = _compute(model, task, reference, modelfile)
        try:
            paths = paths or ask()
        except (ArtifactError, ToolchainError) as error:
            return _not_measurable(reference, error)
        figures = _figures(model, task, reference, _compared(paths[0], task.traits), computed.after)
        measurement = GgufMeasurement(figures, paths=paths, notes=list(_unused_notes(paths[0], task)))
        if isinstance(modelfile, Defect):
            return dataclasses.replace(measurement, served_defects=[modelfile])
        return measurement if modelfile is None else _with_served(modelfile, task, reference, measurement, computed)


def _not_measurable(reference: Reference, error: KolotuneError) -> GgufMeasurement:
    wrong = defect(DefectKind.NOT_MEASURABLE, reason=error.cause)
    return GgufMeasurement(Figures(prompts=len(reference.prompts), defects=[wrong]))


def _read_modelfile(task: GgufTask) -> Modelfile | Defect | None:
    """Read the task's Modelfile, if it has one."""
    if not task.modelfile:
        return None
    path = Path(task.modelfile)
    try:
        return parse_modelfile(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, KolotuneError) as error:
        reason = error.cause if isinstance(error, KolotuneError) else f"{path.name}: can't be read: {error}"
        return defect(DefectKind.MODELFILE_UNREADABLE, reason=reason)


def _compared(path: AskedPath, traits: Collection[str] | None) -> ComparedPrompts:
    """Compare the prompts of the chats, and those of the battery that have a trait of the run's chats."""
    return compare_prompts([*path.prompts, *(result for result in path.battery if result.name in (traits or ()))])


def _unused_notes(path: AskedPath, task: GgufTask) -> Iterator[Note]:
    """Yield a note of the traits that are served otherwise than trained, and that the run's chats don't have."""
    wrong = [result for result in path.battery if result.outcome in (Outcome.DIFFERENT, Outcome.SERVER_REFUSES)]
    unused = [ChatTrait(result.name).sentence for result in wrong if result.name not in (task.traits or ())]
    if unused:
        yield note(NoteKind.TRAITS_DIFFER, traits="; ".join(unused))


@dataclass
class _Computed:
    """What llama.cpp computes with a GGUF.

    Attributes:
        after: log-probabilities of the chats, fp32 ``[positions, vocabulary]``.
        ended: for each answer of the reference that ended, whether it ends as it is served.
    """

    after: np.ndarray | Defect
    ended: list[bool]


def _compute(model: ExactGguf, task: GgufTask, reference: Reference, modelfile: Modelfile | Defect | None) -> _Computed:
    """Compute and write the log-probabilities of the chats; answer prompts, each behind a chat that begins with it."""
    stops = tuple(modelfile.stops) if isinstance(modelfile, Modelfile) else ()
    waiting = [answer for answer in reference.answers if answer.ended and isinstance(modelfile, Modelfile)]
    ended: list[bool] = []

    def answer(prompts: Sequence[GreedyAnswer]) -> None:
        for prompt in prompts:
            waiting.remove(prompt)
            ended.append(model.answer(prompt.ids, stops, task.longest_answer, prompt.tuned_ids)[1])

    def by_chat() -> Iterator[tuple[int, np.ndarray]]:
        for number, chat in enumerate(reference.chats):
            if task.others and all(Path(other).is_file() for other in task.others):
                model.use_all_cores()
            yield number, model.log_probabilities(chat.ids, chat.positions)
            answer([prompt for prompt in waiting if chat.ids[: len(prompt.ids)] == prompt.ids])

    after = _written(task, reference, by_chat())
    answer(list(waiting))
    return _Computed(after, ended)


def _written(task: GgufTask, reference: Reference, by_chat: Iterable[tuple[int, np.ndarray]]) -> np.ndarray | Defect:
    """Write the log-probabilities of the chats, as they are computed; return them all."""
    unfinished = Path(task.after).with_suffix(".partial")
    try:
        after = log_probabilities.write(unfinished, reference.chats, by_chat)
    except KolotuneError as error:
        return defect(DefectKind.NOT_MEASURABLE, reason=error.cause)
    unfinished.replace(task.after)  # others wait for a whole file
    return after


def _figures(
    model: ExactGguf, task: GgufTask, reference: Reference, prompts: ComparedPrompts, after: np.ndarray | Defect
) -> Figures:
    """Compute the figures of the GGUF itself: its vocabulary and its weights; `prompts` is what its template writes."""
    moved = moved_entry(reference.pieces, [model.piece(index) for index in range(model.vocabulary_size)])
    defects = [] if moved is None else [moved]
    if isinstance(after, Defect):
        defects.append(after)
        return Figures(prompts_equal=prompts.equal, prompts=prompts.of, defects=[*prompts.defects, *defects])
    survival = change_survival(Path(task.gguf), Path(task.reference).with_name(CHANGES_FILE))
    figures = compute_figures(reference, log_probabilities.load(_before(task)), after, prompts, defects)
    return dataclasses.replace(figures, survival=survival)


def _before(task: GgufTask) -> Path:
    """Return the log-probabilities to compare with, once they are known."""
    if not task.unquantized:
        return Path(task.before)
    after, measured = Path(task.unquantized_after), Path(task.unquantized)
    while not (after.is_file() or measured.is_file()):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return after if after.is_file() else Path(task.before)


def _with_served(
    modelfile: Modelfile, task: GgufTask, reference: Reference, measurement: GgufMeasurement, computed: _Computed
) -> GgufMeasurement:
    """Add what Ollama makes of the Modelfile: the tokens of prompts, and where answers stop."""
    taken = ollama_path(Path(task.gguf), modelfile)
    served = measurement.paths[-1]  # of TEMPLATE, which every Ollama may take, if there is one
    prompts = _compared(served, task.traits)
    not_servable = sum(not prompt.plain for prompt in reference.prompts)
    notes = [*measurement.notes, *_path_notes(taken, served.path, not_servable)]
    return dataclasses.replace(
        measurement,
        served_equal=prompts.equal,
        served_prompts=prompts.of,
        served_ended=sum(computed.ended),
        served_answers=len(computed.ended),
        served_defects=[*_modelfile_defects(modelfile, task, reference), *prompts.defects],
        notes=notes,
        ollama_path=taken,
    )


def _path_notes(taken: str, compared: str, not_servable: int) -> Iterator[Note]:
    """Yield notes of what Ollama does that was not compared."""
    if taken == PromptPath.RENDERER:
        yield note(NoteKind.OWN_RENDERER)
    elif not_servable and taken != PromptPath.JINJA and compared == PromptPath.TEMPLATE:
        yield note(NoteKind.TURNS_NOT_SERVABLE, count=not_servable)


def _modelfile_defects(modelfile: Modelfile, task: GgufTask, reference: Reference) -> list[Defect]:
    """What a Modelfile says wrongly, or does not say."""
    defects = []
    expected = f"./{Path(task.gguf).name}"
    if modelfile.from_ != expected:
        defects.append(defect(DefectKind.FROM_DIFFERS, path=modelfile.from_, expected=expected))
    if reference.end_token not in modelfile.stops:
        defects.append(defect(DefectKind.STOP_MISSING, token=reference.end_token))
    if (modelfile.system or "") != task.system:
        defects.append(defect(DefectKind.SYSTEM_DIFFERS))
    return defects

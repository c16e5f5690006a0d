"""Measure with llama.cpp: one GGUF, and how Ollama serves it with its Modelfile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.tokenizer import writes_bos
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.ollama.go_template_renderer import render_go_template
from kolotune.ollama.modelfile import Modelfile
from kolotune.ollama.modelfile_parser import parse_modelfile

from . import log_probabilities
from .defects import Defect, DefectKind, NoteKind, defect, note
from .figures import compare_prompts, compute_figures
from .tasks import Figures, GgufMeasurement, GgufTask, Prompt, Reference
from .vocabulary import moved_entry


def measure(file: Path) -> None:
    """Carry out the `GgufTask` in a file. What is wrong with the GGUF or its Modelfile is in the measurement."""
    task = typed_storage.read(GgufTask, file)
    reference = typed_storage.read(Reference, Path(task.reference))
    lengths = [len(chat.ids) for chat in reference.chats]
    lengths += [len(prompt.ids) for prompt in reference.prompts] + [len(answer.ids) for answer in reference.answers]
    try:
        model = ExactGguf(Path(task.gguf), max(lengths) + task.longest_answer + 1)
    except KolotuneError as error:
        wrong = defect(DefectKind.NOT_MEASURABLE, reason=error.cause)
        measurement = GgufMeasurement(Figures(prompts=len(reference.prompts), defects=[wrong]))
    else:
        measurement = GgufMeasurement(_measure_file(model, task, reference))
        if task.modelfile:
            measurement = _measure_served(model, task, reference, measurement)
        model.close()
    typed_storage.write(Path(task.answer_file), measurement)


def _measure_file(model: ExactGguf, task: GgufTask, reference: Reference) -> Figures:
    """Measure the GGUF itself: its chat template, its vocabulary, its weights."""
    equal, defects = compare_prompts(reference.prompts, _GgufTemplate(model).ids)
    if moved := moved_entry(reference.pieces, [model.piece(index) for index in range(model.vocabulary_size)]):
        defects.append(moved)
    try:
        by_chat = (model.log_probabilities(chat.ids, chat.positions) for chat in reference.chats)
        after = log_probabilities.write(Path(task.after), reference.chats, by_chat)
    except KolotuneError as error:
        defects.append(defect(DefectKind.NOT_MEASURABLE, reason=error.cause))
        return Figures(prompts_equal=equal, prompts=len(reference.prompts), defects=defects)
    return compute_figures(reference, log_probabilities.load(Path(task.before)), after, equal, defects)


class _GgufTemplate:
    """The Jinja template in a GGUF, and the BOS that its tokenizer adds."""

    def __init__(self, model: ExactGguf) -> None:
        self._model = model
        self._problem: KolotuneError | None = None
        self._added_bos = ""
        try:
            named = {"bos_token": model.bos, "eos_token": model.eos}
            self._template = ChatTemplate(model.template, {name: text for name, text in named.items() if text})
            # Where the tokenizer adds a BOS, a server leaves out the one that the template writes.
            self._added_bos = model.bos if model.adds_bos and writes_bos(self._template, model.template) else ""
        except KolotuneError as error:
            self._problem = error

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt, as a server makes them from the GGUF alone."""
        if self._problem is not None:
            raise self._problem
        text = self._template.render(prompt.messages, prompt.tools or None, True)
        return self._model.tokens(text.removeprefix(self._added_bos))


def _measure_served(
    model: ExactGguf, task: GgufTask, reference: Reference, measurement: GgufMeasurement
) -> GgufMeasurement:
    """Measure what Ollama makes of the Modelfile: the tokens of prompts, and where answers stop."""
    path = Path(task.modelfile)
    try:
        modelfile = parse_modelfile(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, KolotuneError) as error:
        reason = error.cause if isinstance(error, KolotuneError) else f"{path.name}: can't be read: {error}"
        wrong = defect(DefectKind.MODELFILE_UNREADABLE, reason=reason)
        return dataclasses.replace(measurement, served_defects=[wrong])
    has_template = modelfile.template is not None
    servable = [prompt for prompt in reference.prompts if prompt.plain or not has_template]
    probes = [prompt for prompt in reference.probes if prompt.plain and has_template]
    equal, defects = compare_prompts([*servable, *probes], lambda prompt: _served_ids(model, modelfile, prompt))
    not_servable = len(reference.prompts) - len(servable)
    ending = [answer for answer in reference.answers if answer.ended]
    ended = sum(model.answer(answer.ids, tuple(modelfile.stops), task.longest_answer)[1] for answer in ending)
    return dataclasses.replace(
        measurement,
        served_equal=equal,
        served_prompts=len(servable) + len(probes),
        served_ended=ended,
        served_answers=len(ending),
        served_defects=[*_modelfile_defects(modelfile, task, reference), *defects],
        notes=[note(NoteKind.TURNS_NOT_SERVABLE, count=not_servable)] if not_servable else [],
    )


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


def _served_ids(model: ExactGguf, modelfile: Modelfile, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt as Ollama makes them; without a TEMPLATE it takes the GGUF's own."""
    if modelfile.template is None:
        return _GgufTemplate(model).ids(prompt)
    return model.tokens(render_go_template(modelfile.template, prompt.messages))

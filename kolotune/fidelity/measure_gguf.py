"""What is measured with llama.cpp: one GGUF, and how Ollama serves it by its Modelfile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.tokens.tokenizer import writes_bos
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.ollama import go_template
from kolotune.ollama.modelfile import Modelfile, parse

from .figures import compared, keep, load, prompts_equal
from .selection import misplaced
from .tasks import Figures, GgufMeasurement, GgufTask, Prompt, Reference


def measure(file: Path) -> None:
    """Carries out the `GgufTask` in a file. What is wrong with the GGUF or Modelfile stands in the answer."""
    asked = typed_storage.read(GgufTask, file)
    reference = typed_storage.read(Reference, Path(asked.reference))
    rows: list[list[int]] = [each.ids for each in reference.chats]
    rows += [each.ids for each in reference.prompts] + [each.ids for each in reference.answers]
    longest = max(map(len, rows))
    try:
        model = ExactGguf(Path(asked.gguf), longest + asked.longest_answer + 1)
    except KolotuneError as error:
        answer = GgufMeasurement(Figures(prompts=len(reference.prompts), wrong=[error.cause]))
    else:
        answer = GgufMeasurement(_own(model, asked, reference))
        if asked.modelfile:
            answer = _served(model, asked, reference, answer)
        model.close()
    typed_storage.write(Path(asked.answer_file), answer)


def _own(model: ExactGguf, asked: GgufTask, reference: Reference) -> Figures:
    """The file's own figures: its vocabulary, its template, its weights."""
    equal, wrong = prompts_equal(reference.prompts, _Template(model).ids)
    if moved := misplaced(reference.pieces, [model.piece(each) for each in range(model.words)]):
        wrong.append(moved)
    try:
        rows = (model.log_probabilities(each.ids, each.positions) for each in reference.chats)
        after = keep(Path(asked.after), reference.chats, rows)
    except KolotuneError as error:
        return Figures(prompts_equal=equal, prompts=len(reference.prompts), wrong=[*wrong, error.cause])
    return compared(reference, load(Path(asked.before)), after, equal, wrong)


class _Template:
    """The Jinja template in a GGUF, and the BOS that its tokenizer adds."""

    def __init__(self, model: ExactGguf) -> None:
        self._model = model
        self._problem: KolotuneError | None = None
        self._strip = ""
        try:
            named = {"bos_token": model.bos, "eos_token": model.eos}
            self._template = ChatTemplate(model.template, {name: text for name, text in named.items() if text})
            # A server leaves out the BOS that the template writes where the tokenizer adds one.
            self._strip = model.bos if model.adds_bos and writes_bos(self._template, model.template) else ""
        except KolotuneError as error:
            self._problem = error

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt as a server makes them that goes by the GGUF alone."""
        if self._problem is not None:
            raise self._problem
        text = self._template.render(prompt.messages, prompt.tools or None, True)
        return self._model.tokens(text.removeprefix(self._strip))


def _served(model: ExactGguf, asked: GgufTask, reference: Reference, answer: GgufMeasurement) -> GgufMeasurement:
    """What Ollama makes of the Modelfile as it stands there: the prompts' tokens, and where answers stop."""
    path = Path(asked.modelfile)
    try:
        told = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        return dataclasses.replace(answer, wrong_served=[f"{path.name}: can't be read: {error}"])
    except KolotuneError as error:
        return dataclasses.replace(answer, wrong_served=[error.cause])
    wrong = _wrong_words(told, asked, reference)
    stops = tuple(str(value) for name, value in told.parameters if name == "stop")
    plain = [each for each in reference.prompts if each.plain or told.template is None]
    probes = [each for each in reference.probes if each.plain and told.template is not None]
    equal, found = prompts_equal([*plain, *probes], lambda prompt: _ids(model, told, prompt))
    notes = []
    if len(plain) < len(reference.prompts):
        notes.append(
            f"{len(reference.prompts) - len(plain)} prompts have turns that a TEMPLATE can't write as they were "
            "trained on (`modelfile` said so); they were not compared as served"
        )
    ending = [each for each in reference.answers if each.ended]
    ended = sum(model.answer(each.ids, stops, asked.longest_answer)[1] for each in ending)
    return dataclasses.replace(
        answer,
        served_equal=equal,
        served_prompts=len(plain) + len(probes),
        served_ended=ended,
        served_answers=len(ending),
        wrong_served=[*wrong, *found],
        notes=notes,
    )


def _wrong_words(told: Modelfile, asked: GgufTask, reference: Reference) -> list[str]:
    """What a Modelfile says that it should not, or does not say."""
    wrong = []
    if told.from_ != f"./{Path(asked.gguf).name}":
        wrong.append(f"FROM names {told.from_}, not ./{Path(asked.gguf).name}")
    if reference.end_token not in [value for name, value in told.parameters if name == "stop"]:
        wrong.append(f"no stop for {reference.end_token!r}, with which answers end in training")
    if (told.system or "") != asked.system:
        wrong.append("SYSTEM is not the system prompt that the run was given")
    return wrong


def _ids(model: ExactGguf, told: Modelfile, prompt: Prompt) -> list[int]:
    """The ids of a prompt as Ollama makes them; without a TEMPLATE it takes the GGUF's own."""
    if told.template is None:
        return _Template(model).ids(prompt)
    return model.tokens(go_template.render(told.template, prompt.messages))

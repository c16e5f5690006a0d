"""Read a Modelfile as Ollama reads it, quirks included: a port of Ollama's parser/parser.go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kolotune.foundation.errors import ArtifactError
from kolotune.run_folder.results import Result

from .modelfile import ModelDescription, Modelfile
from .parameters import IGNORED, KNOWN, Value, typed_value

COMMANDS = frozenset(
    [
        "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
        "requires",
    ]
)  # fmt: skip
_SINGLE = ("template", "system", "renderer", "parser")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Command:
    """One instruction, as Ollama's parser returns it: a parameter has its own name."""

    name: str
    args: str
    is_parameter: bool = False


def read_description(result: Result) -> ModelDescription:
    """Read the Modelfile of a run's GGUF, with the changes its user made.

    Raises:
        ArtifactError: Ollama would refuse it, or its FROM names a different file.
    """
    try:
        text = result.modelfile.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArtifactError(f"{result.modelfile}: is not UTF-8", "Write it again with `kolotune modelfile`.") from None
    description = parse_description(text)
    if Path(description.from_) != Path(result.gguf.name):
        raise ArtifactError(
            f"{result.modelfile}: its FROM is {description.from_}, not ./{result.gguf.name}",
            "Choose the GGUF with --quantization, and leave FROM as it was.",
        )
    return description


def parse_description(text: str) -> ModelDescription:
    """Parse any Modelfile, which a user may have edited.

    Args:
        text: the whole file.

    Returns:
        What it says. Of several TEMPLATE, SYSTEM, RENDERER or PARSER instructions the last counts, as in Ollama.

    Raises:
        ArtifactError: Ollama would refuse the file, or it has an instruction that kolotune does not support (ADAPTER
            and similar, or a second FROM).
    """
    fields: dict[str, str] = {}
    parameters: list[tuple[str, Value]] = []
    licenses: list[str] = []
    messages: list[tuple[str, str]] = []
    for command in read_commands(text):
        name = command.name
        if command.is_parameter:
            parameters += _parameter(command)
        elif name in _SINGLE or (name == "model" and name not in fields):
            fields[name] = command.args
        elif name == "license":
            licenses.append(command.args)
        elif name == "message":
            role, _, content = command.args.partition(": ")
            messages.append((role, content))
        else:
            _refuse(f"{'a second FROM' if name == 'model' else name.upper()} is not supported")
    return ModelDescription(
        fields["model"],
        fields.get("template"),
        fields.get("system"),
        tuple(parameters),
        tuple(licenses),
        tuple(messages),
        fields.get("renderer"),
        fields.get("parser"),
    )


def parse_modelfile(text: str) -> Modelfile:
    """Parse a Modelfile that kolotune wrote; the inverse of `modelfile_writer.render_modelfile`.

    Raises:
        ArtifactError: as in `parse_description`, and for what kolotune never writes (MESSAGE, a second LICENSE).
    """
    description = parse_description(text)
    if description.messages or len(description.licenses) > 1:
        _refuse(f"{'MESSAGE' if description.messages else 'a second LICENSE'} is not supported")
    return Modelfile(
        from_=description.from_,
        template=description.template,
        system=description.system,
        parameters=description.parameters,
        license=next(iter(description.licenses), None),
        comments=tuple(_comments(text)),
        renderer=description.renderer,
        parser=description.parser,
    )


def read_commands(text: str) -> tuple[Command, ...]:
    """Return the instructions in a Modelfile, in order, by the rules of Ollama's parser.

    It reads one character after another. A value ends at a line end, unless it began with quotes that are still open
    there. Printable characters, spaces, tabs and line ends inside values are kept; all others are dropped.

    Raises:
        ArtifactError: where Ollama's parser fails.
    """
    reader = _CommandReader()
    for character in text.removeprefix("\ufeff"):
        reader.read(character)
    return reader.finish()


def _parameter(command: Command) -> Iterator[tuple[str, Value]]:
    """The parameter that a command sets, in its type; none where Ollama ignores it."""
    if command.name in IGNORED:
        return
    if command.name not in KNOWN:
        _refuse(f"unknown parameter {command.name!r}")
    try:
        yield command.name, typed_value(command.name, command.args)
    except ValueError as error:
        _refuse(str(error))


def _comments(text: str) -> Iterator[str]:
    """The comment lines above the first instruction."""
    for line in re.split("[\r\n]", text.removeprefix("\ufeff")):
        bare = line.lstrip(" \t")
        if bare.startswith("#"):
            yield bare[1:].removeprefix(" ")
        elif bare:
            return


def _refuse(cause: str) -> NoReturn:
    raise ArtifactError(f"Modelfile: {cause}", "Write it again with `kolotune modelfile`.")


class _CommandReader:
    """The state of reading: what is being read, and its characters so far."""

    def __init__(self) -> None:
        self.state = "between"
        self.buffer = ""
        self.name = ""
        self.role = ""
        self.is_parameter = False
        self.line = 1
        self.commands: list[Command] = []

    def read(self, character: str) -> None:
        if character in "\r\n":
            self.line += 1
        getattr(self, f"_in_{self.state}")(character)

    def finish(self) -> tuple[Command, ...]:
        if self.state == "value":
            self._end_value(closed_by="")
        elif self.state not in ("between", "comment"):
            _refuse("ends in the middle of an instruction")
        if self.state == "value":
            _refuse(f"the quotes of {self.name.upper()} are never closed")
        if not any(command.name == "model" and not command.is_parameter for command in self.commands):
            _refuse("no FROM line")
        return tuple(self.commands)

    def _in_between(self, character: str) -> None:
        if character == "#":
            self.state = "comment"
        elif character not in " \t\r\n":
            self._enter("name", character)

    def _in_comment(self, character: str) -> None:
        if character in "\r\n":
            self.state = "between"

    def _in_name(self, character: str) -> None:
        if _is_letter(character):
            self.buffer += character
            return
        word = self.buffer.lower()
        if character not in " \t" or word not in COMMANDS:
            _refuse(f"line {self.line}: {self.buffer + character.strip()!r} is not an instruction")
        self.is_parameter = word == "parameter"
        self.name = "model" if word == "from" else word
        self._enter({"parameter": "parameter", "message": "message"}.get(word, "value"))

    def _in_parameter(self, character: str) -> None:
        if _is_letter(character) or character in "0123456789_":
            self.buffer += character
        elif character in " \t":
            self.name = self.buffer
            self._enter("value")
        else:
            _refuse(f"line {self.line}: parameter {self.buffer!r} has no value")

    def _in_message(self, character: str) -> None:
        if _is_letter(character):
            self.buffer += character
        elif character in " \t" and self.buffer in _ROLES:
            self.role = self.buffer
            self._enter("value")
        else:
            _refuse(f"line {self.line}: the role of a MESSAGE is one of {', '.join(_ROLES)}")

    def _in_value(self, character: str) -> None:
        if character in "\r\n":
            self._end_value(closed_by=character)
        # Python and Go agree on what is printable, each by its version of Unicode. Python 3.11's is older than
        # Ollama's, so a character that is new to it is refused, though Ollama may know it.
        elif character in " \t" or character.isprintable():
            self.buffer += character

    def _end_value(self, closed_by: str) -> None:
        value = _unquote(self.buffer.strip())
        if value is None:
            self.buffer += closed_by
            return
        if self.role:
            value = f"{self.role}: {value}"
            self.role = ""
        self.commands.append(Command(self.name, value, self.is_parameter))
        self._enter("between")

    def _enter(self, state: str, first: str = "") -> None:
        self.state = state
        # The parser keeps only printable characters, also of the one that begins a word.
        self.buffer = first if first.isprintable() else ""


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _unquote(text: str) -> str | None:
    """The text inside its quotes; None when they are still open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            size = len(quotes)
            closed = len(text) >= 2 * size and text.endswith(quotes)
            return text[size:-size] if closed else None
    return text

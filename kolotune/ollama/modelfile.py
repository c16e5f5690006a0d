"""Write a Modelfile, and read it as Ollama reads it.

The format has no escapes and its parser drops what it does not like without a word, so a text can close
its own quotes and go on as an instruction. Hence the rule of this module: what is written is read back
with a port of Ollama's parser, and anything but equality is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from kolotune.foundation.errors import ArtifactError, ConfigError

from . import parameters as known
from .parameters import Parameters, Value

COMMANDS = frozenset(
    {
        "from",
        "license",
        "template",
        "system",
        "adapter",
        "draft",
        "renderer",
        "parser",
        "parameter",
        "message",
        "requires",
    }
)
_ROLES = ("system", "user", "assistant")
_API_HINT = "`kolotune install --system` or `--parameter` sends it through Ollama's JSON API, which carries any text."


@dataclass(frozen=True)
class Modelfile:
    """What kolotune says to Ollama about a model.

    Args:
        from_: the GGUF file, as a relative path that begins with `./` (anything that is not found there
            is taken by Ollama for the name of a model, so other forms are refused).
        template: the Go template, or None for what Ollama chooses.
        system: the system prompt.
        parameters: name and value pairs; `stop` may stand there several times.
        license: the text of the license.
        comments: lines for people, at the top.
    """

    from_: str
    template: str | None = None
    system: str | None = None
    parameters: Parameters = ()
    license: str | None = None
    comments: tuple[str, ...] = ()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(str(value) for name, value in self.parameters if name == "stop")


@dataclass(frozen=True)
class Command:
    """One instruction as Ollama's parser hands it on: parameters stand under their own name."""

    name: str
    args: str
    parameter: bool = False


def render(modelfile: Modelfile) -> str:
    """The text of a Modelfile, proven to be read by Ollama as what was meant.

    Write it with `newline=""`, so that no system changes its line ends.

    Args:
        modelfile: what to say.

    Returns:
        The text; `parse` gives the same `Modelfile` back.

    Raises:
        ConfigError: a path, text or parameter that the format can't carry; the hint names another way.
    """
    _check_path(modelfile.from_)
    pairs = known.validate(modelfile.parameters)
    for comment in modelfile.comments:
        if "\n" in comment or "\r" in comment:
            raise ConfigError("A comment of a Modelfile must be one line.", "Give one comment for each line.")
        _check_characters("a comment", comment)
    lines = [f"# {comment}" for comment in modelfile.comments]
    lines.append(f"FROM {modelfile.from_}")
    for name in ("template", "system", "license"):
        text = getattr(modelfile, name)
        if text is not None:
            lines.append(_line(name, name.upper(), text, ('"""',)))
    for name, value in pairs:
        lines.append(_parameter_line(name, value))
    text = "\n".join(lines) + "\n"
    try:
        same = parse(text) == modelfile
    except ArtifactError as error:
        raise ConfigError(f"The Modelfile can't be carried: {error.cause}", _API_HINT) from error
    if not same:
        raise ConfigError("The Modelfile is not read back by Ollama as it was meant.", _API_HINT)
    return text


@dataclass(frozen=True)
class Description:
    """All that a Modelfile may say which Ollama's API takes too; see `Modelfile` for what kolotune's say.

    Attributes:
        from_: what stands behind FROM.
        template, system: None where there is none.
        parameters: name and value pairs.
        licenses: the texts of licenses.
        messages: role and text of the turns that every chat begins with.
    """

    from_: str
    template: str | None = None
    system: str | None = None
    parameters: Parameters = ()
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()


def describe(text: str) -> Description:
    """Read a Modelfile as Ollama does, quirks included: a user may have edited it.

    Args:
        text: the whole file.

    Returns:
        What it says. Of several TEMPLATE or SYSTEM lines the last counts, as in Ollama.

    Raises:
        ArtifactError: Ollama would refuse the file, or it says what has no place here (ADAPTER and the like, or
            several FROM).
    """
    fields: dict[str, str] = {}
    pairs: list[tuple[str, Value]] = []
    licenses: list[str] = []
    messages: list[tuple[str, str]] = []
    for command in read_commands(text):
        name = command.name
        if command.parameter:
            pairs += _pair(command)
        elif name in ("template", "system") or (name == "model" and name not in fields):
            fields[name] = command.args
        elif name == "license":
            licenses.append(command.args)
        elif name == "message":
            role, _, said = command.args.partition(": ")
            messages.append((role, said))
        else:
            again = "a second " if name in fields else ""
            _refuse(f"{again}{name.upper()} has no place in a Modelfile of kolotune")
    found = (fields["model"], fields.get("template"), fields.get("system"))
    return Description(*found, tuple(pairs), tuple(licenses), tuple(messages))


def parse(text: str) -> Modelfile:
    """Read a Modelfile that kolotune wrote; the inverse of `render`.

    Raises:
        ArtifactError: as in `describe`, and for what kolotune's Modelfiles never say (MESSAGE, several LICENSE).
    """
    found = describe(text)
    if found.messages or len(found.licenses) > 1:
        _refuse(f"{'MESSAGE' if found.messages else 'a second LICENSE'} has no place in a Modelfile of kolotune")
    return Modelfile(
        from_=found.from_,
        template=found.template,
        system=found.system,
        parameters=found.parameters,
        license=next(iter(found.licenses), None),
        comments=tuple(_comments(text)),
    )


def _pair(command: Command) -> Iterator[tuple[str, Value]]:
    """The parameter that a line sets, in its type; none where Ollama ignores it."""
    if command.name in known.IGNORED:
        return
    if command.name not in known.KNOWN:
        _refuse(f"unknown parameter {command.name!r}")
    try:
        yield command.name, known.typed(command.name, command.args)
    except ValueError as error:
        _refuse(str(error))


def _refuse(cause: str) -> NoReturn:
    raise ArtifactError(f"Modelfile: {cause}", "Write it anew with `kolotune modelfile`.")


# ---------------------------------------------------------------- reading


def read_commands(text: str) -> tuple[Command, ...]:
    """The instructions in a Modelfile, by the rules of Ollama's parser.

    It walks through the text by characters. A value ends at a line end, unless it began with quotes that
    are still open there; printable characters, spaces, tabs and line ends inside of values are kept, and
    everything else is dropped.

    Args:
        text: the whole file.

    Returns:
        The instructions in order.

    Raises:
        ArtifactError: where Ollama's parser fails.
    """
    reader = _Reader()
    for character in text.removeprefix("\ufeff"):
        reader.read(character)
    return reader.finish()


class _Reader:
    """The state of the walk: what is being read now, and the characters of it so far."""

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
        if not any(command.name == "model" and not command.parameter for command in self.commands):
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
            _refuse(f"line {self.line}: {self.buffer + character.strip()!r} is no instruction")
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
        # Python's notion of printable is Go's, each by its version of Unicode. Python 3.11's is older than
        # Ollama's: a character that is new to it is refused, though Ollama may know it.
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
        # A character that opens a word counts only if it prints: the parser asks that of all it keeps.
        self.buffer = first if first.isprintable() else ""


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _unquote(text: str) -> str | None:
    """The text inside of its quotes, or None when they are still open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            size = len(quotes)
            closed = len(text) >= 2 * size and text.endswith(quotes)
            return text[size:-size] if closed else None
    return text


def _comments(text: str) -> Iterator[str]:
    """The comment lines above the first instruction."""
    for line in re.split("[\r\n]", text.removeprefix("\ufeff")):
        bare = line.lstrip(" \t")
        if bare.startswith("#"):
            yield bare[1:].removeprefix(" ")
        elif bare:
            return


# ---------------------------------------------------------------- writing


def _check_path(path: str) -> None:
    parts = path.split("/")
    if parts[0] != "." or len(parts) < 2 or any(part in ("", ".", "..") for part in parts[1:]):
        reason = "is not a plain path that begins with `./`"
    elif path != path.strip() or "\\" in path or not path.isprintable():
        reason = "has a character that a Modelfile can't carry in a path"
    else:
        return
    raise ConfigError(f"FROM {path!r} {reason}.", "Name a file in the folder of the Modelfile, as ./Merged.gguf.")


def _check_characters(what: str, text: str) -> None:
    for place, character in enumerate(text):
        if not character.isprintable() and character not in "\t\r\n":
            raise ConfigError(
                f"A Modelfile can't carry U+{ord(character):04X} (character {place + 1} of {what}): "
                "Ollama drops it without a word.",
                f"Take the character out. {_API_HINT}",
            )


def _line(what: str, start: str, text: str, quotes: tuple[str, ...]) -> str:
    """The instruction in the first quotes with which Ollama reads that very text, and nothing else."""
    _check_characters(what, text)
    # Without quotes, a text of one line may hold any quotes inside, so that is the last resort.
    for mark in (*quotes, ""):
        line = f"{start} {mark}{text}{mark}"
        try:
            read = read_commands(f"FROM x\n{line}\n")
        except ArtifactError:
            continue
        if len(read) == 2 and read[1].args == text:
            return line
    early = re.search('"""[ \t]*[\r\n]', text)
    shown = early.group() if early else text
    raise ConfigError(
        f"A Modelfile can't carry the {what}: {shown!r} in it would end it, and what follows would be read "
        "as instructions to Ollama.",
        f'Keep """ away from the end of a line. {_API_HINT}',
    )


def _parameter_line(name: str, value: Value) -> str:
    if isinstance(value, str):
        return _line(f"parameter {name}", f"PARAMETER {name}", value, ('"', '"""'))
    return f"PARAMETER {name} {str(value).lower() if isinstance(value, bool) else repr(value)}"

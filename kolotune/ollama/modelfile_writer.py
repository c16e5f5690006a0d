"""Write a Modelfile that Ollama reads as it was meant.

The format has no escapes, and Ollama's parser silently drops what it does not accept, so a text can close its own
quotes and continue as an instruction. Hence everything that is written is parsed again as Ollama does, and anything but
an equal result is an error.
"""

from __future__ import annotations

import re

from kolotune.foundation.errors import ArtifactError, ConfigError

from .modelfile import Modelfile
from .modelfile_parser import parse_modelfile, read_commands
from .parameters import Value, validate

_API_HINT = "`kolotune install --system` or `--parameter` sends it through Ollama's JSON API, which carries any text."


def render_modelfile(modelfile: Modelfile) -> str:
    """Return the text of a Modelfile.

    Write it with `newline=""`, so that no system changes its line ends.

    Returns:
        The text; `parse_modelfile` returns an equal `Modelfile`.

    Raises:
        ConfigError: the format can't carry a path, text or parameter; the hint names an alternative.
    """
    _check_path(modelfile.from_)
    parameters = validate(modelfile.parameters)
    for comment in modelfile.comments:
        if "\n" in comment or "\r" in comment:
            raise ConfigError("A comment of a Modelfile must be one line.", "Use one comment for each line.")
        _check_characters("a comment", comment)
    lines = [f"# {comment}" for comment in modelfile.comments]
    lines.append(f"FROM {modelfile.from_}")
    texts = {"template": modelfile.template, "system": modelfile.system, "license": modelfile.license}
    lines += [_line(name, name.upper(), text, ('"""',)) for name, text in texts.items() if text is not None]
    lines += _own_code_lines(modelfile)
    lines += [_parameter_line(name, value) for name, value in parameters]
    text = "\n".join(lines) + "\n"
    try:
        same = parse_modelfile(text) == modelfile
    except ArtifactError as error:
        raise ConfigError(f"The Modelfile can't be written: {error.cause}", _API_HINT) from error
    if not same:
        raise ConfigError("Ollama would not read the Modelfile as it was meant.", _API_HINT)
    return text


def _own_code_lines(modelfile: Modelfile) -> list[str]:
    """The lines that name Ollama's own code for the model."""
    names = {"RENDERER": modelfile.renderer, "PARSER": modelfile.parser}
    return [_line(command.lower(), command, name, ()) for command, name in names.items() if name is not None]


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
    for index, character in enumerate(text, start=1):
        if not character.isprintable() and character not in "\t\r\n":
            raise ConfigError(
                f"A Modelfile can't carry U+{ord(character):04X} (character {index} of {what}): "
                "Ollama drops it silently.",
                f"Remove the character. {_API_HINT}",
            )


def _line(what: str, start: str, text: str, quotes: tuple[str, ...]) -> str:
    """The instruction in the first quotes with which Ollama reads exactly that text, and nothing else."""
    _check_characters(what, text)
    # Without quotes, a text of one line may contain any quotes, so that is the last resort.
    for mark in (*quotes, ""):
        line = f"{start} {mark}{text}{mark}"
        try:
            commands = read_commands(f"FROM x\n{line}\n")
        except ArtifactError:
            continue
        if len(commands) == 2 and commands[1].args == text:
            return line
    early_end = re.search('"""[ \t]*[\r\n]', text)
    shown = early_end.group() if early_end else text
    raise ConfigError(
        f"A Modelfile can't carry the {what}: {shown!r} in it would end it, and what follows would be read "
        "as instructions to Ollama.",
        f'Keep """ away from the end of a line. {_API_HINT}',
    )


def _parameter_line(name: str, value: Value) -> str:
    if isinstance(value, str):
        return _line(f"parameter {name}", f"PARAMETER {name}", value, ('"', '"""'))
    return f"PARAMETER {name} {str(value).lower() if isinstance(value, bool) else repr(value)}"

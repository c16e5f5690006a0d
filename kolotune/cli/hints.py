"""Wrong command lines in two lines: what is wrong, and what was probably meant."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kolotune.foundation.chat_paths import CHAT_SUFFIXES, hub_source
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, DataError

CONFIG_NAME, CHATS_NAME = "kolotune.yaml", "chats.jsonl"


def explained(error: Any) -> ConfigError:
    """A wrong command line, as click found it, in our words."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "kolotune"
    cause = str(error.message if hasattr(error, "message") else error.format_message()).rstrip(".")
    hint = f"`{path} --help` shows what there is."
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        cause = f"{path}: there is no option {option}"
        near = _near_options(option, context.command.params if context else ())
        hint = f"Did you mean {' or '.join(near)}? {hint}" if near else hint
    elif cause.startswith("No such command") and context:
        verb = cause.split("'")[1] if "'" in cause else ""
        cause = f"{path}: there is no verb {verb!r}"
        near = difflib.get_close_matches(verb, context.command.commands, n=2)
        if verb.lower().endswith(CHAT_SUFFIXES):
            hint = f"Did you mean: {path} run {verb}"
        elif near:
            hint = f"Did you mean {' or '.join(near)}? {hint}"
    elif cause.startswith("Missing argument"):
        cause = f"{path}: {cause[0].lower()}{cause[1:]}"
    elif hasattr(error, "format_message"):
        message = str(error.format_message()).rstrip(".")
        cause = f"{path}: {message[0].lower()}{message[1:]}"
    return ConfigError(cause, hint)


def _near_options(wrong: str, parameters: Iterable[Any]) -> list[str]:
    """At most three options that may be meant: with the word, with such initials, longer, or spelled nearly so."""
    options = ["--help"]
    options += [option for each in parameters for option in (*each.opts, *each.secondary_opts) if option[:2] == "--"]
    bare = wrong.lstrip("-").lower().replace("_", "-")
    words = {option: option.lstrip("-").split("-") for option in options}
    near = [option for option in options if bare in words[option] or bare == "".join(word[0] for word in words[option])]
    longer = [option for option in options if len(bare) > 2 and option.startswith(f"--{bare}")]
    near += longer or difflib.get_close_matches(f"--{bare}", options, n=2, cutoff=0.7)
    return list(dict.fromkeys(near))[:3]


def no_chats(verb: str) -> ConfigError:
    """No training data was given: what there is in this folder, or how to begin."""
    hint = f"Name a file: kolotune {verb} chats.jsonl. `kolotune init FOLDER` writes some to begin with."
    if Path(CONFIG_NAME).is_file():
        hint = f"Here is a config: kolotune {verb} --config {CONFIG_NAME}"
    elif Path(CHATS_NAME).is_file():
        hint = f"Here are chats: kolotune {verb} {CHATS_NAME}"
    return ConfigError("no training data was given", hint)


def require_files(config: Config) -> None:
    """Files of chats and the template must be there before anything is fetched or made for them.

    Raises:
        DataError: one is not; with the name of a similar one that is.
    """
    template = () if config.chat_template is None else (config.chat_template,)
    for path in (*config.train_data, *config.eval_data, *template):
        try:
            if path.exists():
                continue
            beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        except (OSError, ValueError):
            continue  # a name that no file can have, or an unreadable folder: reading it reports the error
        near = difflib.get_close_matches(
            path.name, [name for name in beside if name.endswith((*CHAT_SUFFIXES, ".jinja"))], n=1, cutoff=0.8
        )
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the name and the folder."
        if source := hub_source(path):
            hint = f"It came from the hub; give its name to get it again: {source}"
        raise DataError(f"{path}: no such file", hint)


def command(*words: str | Path) -> str:
    """Return a command of ours as the user would type it, quoted for the system's shell; paths relative if shorter."""
    typed = ["kolotune", *[_relative(word) if isinstance(word, Path) else word for word in words]]
    return " ".join(map(_quoted_on_windows, typed)) if sys.platform == "win32" else shlex.join(typed)


def _quoted_on_windows(word: str) -> str:
    """Return a word that PowerShell and cmd read as one."""
    return word if re.fullmatch(r"[\w.:/\\=+-]+", word) else '"' + word.replace('"', '""') + '"'


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

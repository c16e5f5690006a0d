"""The parameters that a Modelfile may set, and the values that Ollama accepts for each.

`ollama create` fails for a name that Ollama does not know, so all names are checked before anything is built. The names
are the fields of `Options` in Ollama's api/types.go; an older server refuses the newer ones.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping

from kolotune.foundation.errors import ConfigError

Value = str | int | float | bool
Parameters = tuple[tuple[str, Value], ...]
Options = dict[str, Value | list[Value]]
"""Parameters as Ollama's JSON has them: all stop strings in one list."""

KNOWN: dict[str, type] = {
    "draft_num_predict": int,
    "frequency_penalty": float,
    "main_gpu": int,
    "min_p": float,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_keep": int,
    "num_predict": int,
    "num_thread": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": str,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
    "use_mmap": bool,
}

IGNORED = frozenset(
    [
        "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat",
        "mirostat_tau", "mirostat_eta",
    ]
)  # fmt: skip
"""Ollama still reads these, warns and drops them. A user who sets one should learn that it has no effect."""

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLS = {word: True for word in ("1", "t", "T", "true", "TRUE", "True")} | {
    word: False for word in ("0", "f", "F", "false", "FALSE", "False")
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_FLOAT32_MAX = 3.4028235677973366e38


def typed_value(name: str, text: str) -> Value:
    """Return the value that Ollama reads from the text of a PARAMETER line, in the type of the parameter.

    Args:
        name: a name in `KNOWN`.
        text: the text after the name, unquoted.

    Raises:
        ValueError: the text is not such a value; the message says what is expected.
    """
    kind = KNOWN[name]
    if kind is str:
        return text
    if kind is bool and text in _BOOLS:
        return _BOOLS[text]
    if kind is int and _INT.fullmatch(text) and -(2**63) <= int(text) < 2**63:
        return int(text)
    if kind is float and _FLOAT.fullmatch(text) and abs(float(text)) < _FLOAT32_MAX:
        return float(text)
    raise ValueError(f"{name} must be {_KINDS[kind]}, not {text!r}")


def validate(parameters: Mapping[str, object] | Iterable[tuple[str, object]]) -> Parameters:
    """Check the parameters that a user set, and convert each to its type.

    Args:
        parameters: names and values; a value may be text, as from a command line, and `stop` a list.

    Returns:
        Name and value pairs in the order given, one pair for each stop string.

    Raises:
        ConfigError: all names that Ollama does not know or ignores, and all values of a wrong type.
    """
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    problems: list[str] = []
    checked: list[tuple[str, Value]] = []
    for name, given in pairs:
        if name in IGNORED:
            problems.append(f"{name} is ignored by Ollama")
        elif name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            problems.append(f"{name} is unknown" + (f" (did you mean {near[0]}?)" if near else ""))
        else:
            for value in given if name == "stop" and isinstance(given, list | tuple) else [given]:
                try:
                    checked.append((name, _convert(name, value)))
                except ValueError as error:
                    problems.append(str(error))
    single = [name for name, _ in checked if name != "stop"]
    problems += [f"{name} is set twice" for name in dict.fromkeys(single) if single.count(name) > 1]
    if problems:
        raise ConfigError(
            "Ollama can't take these parameters: " + "; ".join(problems),
            "The parameters are: " + ", ".join(KNOWN) + ".",
        )
    return tuple(checked)


def as_options(parameters: Parameters) -> Options:
    """Return the parameters as Ollama's JSON has them."""
    options: Options = {name: value for name, value in parameters if name != "stop"}
    stops = [value for name, value in parameters if name == "stop"]
    return options | {"stop": stops} if stops else options


def _convert(name: str, given: object) -> Value:
    kind = KNOWN[name]
    if isinstance(given, str):
        if given == "":
            # An empty stop would end every answer before it begins.
            raise ValueError(f"{name} is empty")
        return typed_value(name, given)
    if kind is float and isinstance(given, int | float) and not isinstance(given, bool):
        # Ollama keeps 32 bits, and JSON has no infinity.
        if math.isfinite(given) and abs(given) < _FLOAT32_MAX:
            return float(given)
    elif kind is bool and isinstance(given, bool):
        return given
    elif kind is int and isinstance(given, int) and not isinstance(given, bool):
        return typed_value(name, str(given))
    raise ValueError(f"{name} must be {_KINDS[kind]}, not {given!r}")

"""The options of a user's own llama-server are read by llama.cpp's parser as what the library is given."""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from kolotune.foundation import shared_libraries
from kolotune.llamacpp import model_server_process, server_program
from kolotune.llamacpp.model_server import ServerSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the name of the function is another one")
_PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
_SERVER = 12  # of llama.cpp's programs
_HEAD = object.__basicsize__
# The address of the program is among its messages. An adapter's strength is 0 where it is not applied.
_DIFFERENT = {"verbosity", "lora_init_without_apply", "lora_adapters", "default_template_kwargs", "speculative"}


def parsed(arguments: Sequence[str]) -> Any:
    """Return what llama.cpp makes of arguments; None when it refuses one."""
    parameters = xllamacpp.CommonParams()
    for value in (12345, -1):  # the first field: the structure is where it is sought
        parameters.n_predict = value
        assert ctypes.c_int32.from_address(id(parameters) + _HEAD).value == value
    library = shared_libraries._of_package()
    assert library is not None
    parse = getattr(ctypes.CDLL(str(library.files[0])), _PARSE)
    parse.restype = ctypes.c_bool
    texts = (ctypes.c_char_p * (len(arguments) + 2))(b"llama-server", *map(str.encode, arguments), None)
    is_read = parse(len(arguments) + 1, texts, ctypes.c_void_p(id(parameters) + _HEAD), _SERVER, None)
    return parameters if is_read else None


def plain(value: Any) -> Any:
    """Return a parameter as values that can be compared."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, int | float | str | dict | set | enum.Enum | None):
        return value
    return {name: plain(getattr(value, name)) for name in fields(value)}


def fields(value: Any) -> list[str]:
    kind = type(value)
    return [name for name in dir(kind) if not name.startswith("_") and not callable(getattr(kind, name))]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "my run", "context": 300, "parallel": 3, "threads": 2, "batch": 64, "gpu_layers": 0, "embeds": True},
        {"parallel": 4, "embeds": True},
        {"template": "{{ x }}"},
        {"parallel": 2, "adapters": ("a,b.gguf", 'c"d.gguf')},
    ],
)
def test_the_program_gets_what_the_library_gets(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["adapters"] = tuple(str(tmp_path / name) for name in settings.get("adapters", ()))
    for path in settings["adapters"]:
        Path(path).touch()
    task = model_server_process._ServerTask(**{**ServerSettings(**settings).__dict__, "key": "k", "path": "a.gguf"})
    monkeypatch.setattr(xllamacpp, "Server", lambda parameters: parameters)
    monkeypatch.setattr(server_program, "ServerProgram", lambda _, options, flags, __: (options, flags))
    wanted: Any = model_server_process._started_library(task)
    options: Any = model_server_process._started_program(Path("llama-server"), task)
    made = parsed([*server_program.arguments(*options), "--api-key", "k"])
    assert made is not None
    different = {name for name in fields(wanted) if plain(getattr(made, name)) != plain(getattr(wanted, name))}
    assert different <= _DIFFERENT, {name: (getattr(made, name), getattr(wanted, name)) for name in different}
    assert [each.path for each in made.lora_adapters] == list(settings["adapters"])
    assert made.lora_init_without_apply == bool(settings["adapters"])
    assert made.default_template_kwargs == {"preserve_reasoning": "null"} and made.verbosity == 3


def test_an_option_that_it_does_not_have() -> None:
    assert parsed(["--no-such-option"]) is None

"""The command line: flags → Config → call → exit code. Verbs stand in the modules of this package."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from kolotune.foundation.errors import (
    ArtifactError,
    ConfigError,
    Interrupted,
    KolotuneError,
    SpaceError,
    ToolchainError,
)

from . import (
    container,
    hints,
    in_container,
    init,
    launch,
    looking,
    making,
    ollama,
    plan,
    proving,
    run_listing,
    sweep,
    talking,
)
from .options import reporter

# What only `kolotune[local]` brings; a client works without.
_LOCAL_PACKAGES = frozenset(
    {
        "gguf",
        "jinja2",
        "llama_cpp",
        "markupsafe",
        "matplotlib",
        "numpy",
        "psutil",
        "pyarrow",
        "safetensors",
        "starlette",
        "tokenizers",
        "torch",
        "transformers",
        "uvicorn",
    }
)
_HELP = "From a file of chats to a model that runs in Ollama. Begin with: kolotune run chats.jsonl"

app = typer.Typer(
    name="kolotune",
    help=_HELP,
    epilog=in_container.HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to load than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
# typer's own copy of click raises these, older versions the package's: a base of one of them fits both.
_CommandLineError: Any = typer.BadParameter.__mro__[2]
for module in (making, sweep, plan, looking, run_listing, talking, ollama, proving, launch, init, container):
    module.add_to(app)


def run_command_line(arguments: list[str]) -> int:
    """Runs one command and turns expected errors into two lines and an exit code.

    Returns:
        0, the exit code of the error (see `errors`), or 2 for a wrong command line.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of another encoding must not stop a run
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)
    try:
        result = in_container.main(command, arguments)
    except _CommandLineError as error:
        return _wrong_line(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(Interrupted("stopped"), arguments)
    except KolotuneError as error:
        return _fail(error, arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _LOCAL_PACKAGES:
            raise
        return _fail(ToolchainError(f"this needs {package}", "Install it: pip install 'kolotune[local]'."), arguments)
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(_named(error), arguments)
    if result == Interrupted.exit_code:  # typer has caught the interruption itself
        return _fail(Interrupted("stopped"), arguments)
    return result if isinstance(result, int) else 0


def _named(error: OSError) -> KolotuneError:
    """An error of the system at a file, such as a name that is too long, or a full disk: no bug."""
    from kolotune.foundation.files import explained

    found = explained(error, Path(os.fsdecode(error.filename2 or error.filename)))
    if isinstance(found, SpaceError):
        return found
    return ArtifactError(f"{error.filename}: {error.strerror}", "Check the name and its folder.")


def _wrong_line(error: Any, arguments: list[str]) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # `kolotune` alone: its message is the help
        error.show()
        return ConfigError.exit_code
    return _fail(hints.explained(error), arguments)


def _fail(error: KolotuneError, arguments: list[str]) -> int:
    if isinstance(error, Interrupted):  # it ends now; more Ctrl-C must not end it in a traceback
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    reporter("--json" in arguments).failure(error.cause, error.hint, error.exit_code)
    return error.exit_code


def _terminate(number: int, frame: FrameType | None) -> None:
    """A polite request to stop ends like Ctrl-C, so that children end and the state is noted."""
    raise KeyboardInterrupt

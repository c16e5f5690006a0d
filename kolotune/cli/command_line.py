"""Run one command; turn expected errors into two lines and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from kolotune.foundation import installation
from kolotune.foundation.errors import (
    ArtifactError,
    ConfigError,
    Interrupted,
    KolotuneError,
    SpaceError,
    ToolchainError,
)
from kolotune.runners import signals

from . import hints, in_container
from .app import app
from .options import reporter

# typer's own copy of click raises these, older versions the package's: a base of one of them fits both.
_CommandLineError: Any = typer.BadParameter.__mro__[2]


def run_command_line(arguments: list[str]) -> int:
    """Run one command.

    Returns:
        0, the exit code of the error (see `errors`), or 2 for a wrong command line.
    """
    signals.interrupt_on_termination()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal with another encoding must not stop a run
            stream.reconfigure(errors="replace")
    try:
        result = in_container.main(_command(), arguments)
    except _CommandLineError as error:
        return _fail_on_usage(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(Interrupted("interrupted"), arguments)
    except KolotuneError as error:
        return _fail(error, arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in installation.LOCAL_PACKAGES:
            raise
        return _fail(ToolchainError(f"{package} is not installed", installation.INSTALL_LOCAL), arguments)
    except BrokenPipeError:  # the reader of a pipe has exited
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(_error_at_file(error), arguments)
    if result == Interrupted.exit_code:  # typer has caught the interruption itself
        return _fail(Interrupted("interrupted"), arguments)
    return result if isinstance(result, int) else 0


@functools.cache
def _command() -> TyperGroup:
    """Return all verbs, with the options of shell completion."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def _error_at_file(error: OSError) -> KolotuneError:
    """Return an expected error for what the system refused: a name that is too long, a full disk."""
    from kolotune.foundation.files import explained

    explanation = explained(error, Path(os.fsdecode(error.filename2 or error.filename)))
    if isinstance(explanation, SpaceError):
        return explanation
    return ArtifactError(f"{error.filename}: {error.strerror}", "Check the name and its folder.")


def _fail_on_usage(error: Any, arguments: list[str]) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # `kolotune` alone: its message is the help
        error.show()
        return ConfigError.exit_code
    return _fail(hints.explained(error), arguments)


def _fail(error: KolotuneError, arguments: list[str]) -> int:
    if isinstance(error, Interrupted):  # this process is ending: another Ctrl-C must not show a traceback
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    reporter("--json" in arguments).failure(error.cause, error.hint, error.exit_code)
    return error.exit_code

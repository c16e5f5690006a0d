"""The command line: flags → Config → call → exit code. Verbs stand in the modules of this package."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click
import typer

from ..errors import Interrupted, KolotuneError
from . import looks, roads, start, talk
from .options import reporter

_HELP = "From a file of chats to a model that runs in Ollama. Begin with: kolotune run chats.jsonl"

app = typer.Typer(
    name="kolotune",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help takes longer to load than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for module in (roads, looks, talk, start):
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
        result = command.main(arguments, prog_name="kolotune", standalone_mode=False)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail(Interrupted("stopped"))
    except KolotuneError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of a pipe went away
        sys.stderr.close()
        return 0
    return result if isinstance(result, int) else 0


def _fail(error: KolotuneError) -> int:
    reporter("--json" in sys.argv).failure(error.cause, error.hint)
    return error.exit_code


def _terminate(number: int, frame: FrameType | None) -> None:
    """A polite request to stop ends like Ctrl-C, so that children end and the state is noted."""
    raise KeyboardInterrupt

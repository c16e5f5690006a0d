"""The command line: flags → Config → call → exit code. Each verb is a module of its name; `app` puts them together."""

from .command_line import run_command_line

__all__ = ["run_command_line"]

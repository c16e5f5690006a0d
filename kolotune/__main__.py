"""``python -m kolotune`` and the `kolotune` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line; returns the exit code."""
    from kolotune.cli import run_command_line
    from kolotune.runners import watchdog

    watchdog.end_with_parent()
    watchdog.report_process()
    return run_command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

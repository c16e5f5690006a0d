"""The verb `report`, and the page that `run` and `compare` write at their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import FidelityError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Run


def report(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False) -> int:
    """Write report.html, one page about the run."""
    from kolotune.report import page

    written = page.write(RunFolder(run.absolute()))
    reporter(json).success(f"{written} ({format_size(written.stat().st_size)}): open it in a browser")
    return 0


@contextmanager
def reporting(folder: RunFolder, say: Reporter) -> Iterator[None]:
    """Write the page when the block ends, also when it ends because the comparison failed."""
    try:
        yield
    except FidelityError:
        _write_report(folder, say)
        raise
    _write_report(folder, say)


def _write_report(folder: RunFolder, say: Reporter) -> None:
    """Write the page in a child process: drawing needs memory, and a failure to draw is no failure of the run."""
    from kolotune.runners import local

    log = folder.log("report")
    code = local.run(local.python("kolotune.report", str(folder.root)), log=log, ends_with_parent=True)
    if code == 0:
        say.success(f"report: {folder.report.name}")
    else:
        say.warning(f"could not write {folder.report.name}: {local.last_lines(log)}")

"""``python -m kolotune.report RUN``: write the report in a separate process, which frees its memory when it ends."""

from __future__ import annotations

import sys
from pathlib import Path

from kolotune.foundation.errors import KolotuneError
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.watchdog import end_with_parent

from .page import write

if __name__ == "__main__":
    end_with_parent()
    try:
        write(RunFolder(Path(sys.argv[1])))
    except KolotuneError as error:
        sys.exit(error.cause)

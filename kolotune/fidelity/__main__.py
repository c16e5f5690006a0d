"""``python -m kolotune.fidelity models|gguf TASK``: measures in a process of its own, so that its memory comes back."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from kolotune.engines.job import emit
from kolotune.foundation.errors import KolotuneError
from kolotune.runners.watchdog import end_with_parent


def main(arguments: list[str]) -> int:
    """Carries out the task in the file `arguments[1]`; returns the exit code."""
    end_with_parent()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind, file = arguments[0], Path(arguments[1])
    try:
        if kind == "models":
            from . import models

            models.measure(file)
        else:
            from . import gguf_reader

            gguf_reader.measure(file)
    except KolotuneError as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

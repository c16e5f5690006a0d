"""``python -m kolotune.fidelity models|gguf|computation|general TASK``: measure in a child process.

Its memory is given back when it ends, and llama.cpp may end it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from kolotune.runners import child_process


def main(arguments: list[str]) -> int:
    """Carry out the task in the file `arguments[1]`; return the exit code."""
    kind, file = arguments[0], Path(arguments[1])
    return child_process.carry_out(lambda: _measure(kind, file))


def _measure(kind: str, file: Path) -> None:
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if kind == "models":
        from . import measure_models

        measure_models.measure(file)
    elif kind == "computation":
        from . import computation_proof

        computation_proof.measure(file)
    elif kind == "general":
        from . import general_chats

        general_chats.write_general_chats(file)
    else:
        from . import measure_gguf

        measure_gguf.measure(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

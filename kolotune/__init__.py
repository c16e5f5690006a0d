"""kolotune: from a file of chats to a model that runs in Ollama.

from pathlib import Path
import kolotune

config = kolotune.resolve(({"train_data": ["chats.jsonl"], "output_dir": "outputs"}, "my script", Path.cwd()))
run_folder = kolotune.run(config)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .version import VERSION

if TYPE_CHECKING:
    from .foundation.config import Config, resolve
    from .foundation.reporter import Reporter
    from .run_folder.layout import RunFolder

__version__ = VERSION
__all__ = ["Config", "RunFolder", "load_run", "resolve", "run"]
_PUBLIC = {"Config": "foundation.config", "resolve": "foundation.config", "RunFolder": "run_folder.layout"}


def run(config: Config, reporter: Reporter | None = None) -> RunFolder:
    """Run all stages that have work; see `pipeline.run.run_pipeline`."""
    from .foundation.reporter import make_reporter
    from .pipeline.run import run_pipeline

    return run_pipeline(config, reporter or make_reporter())


def load_run(folder: Path | str) -> RunFolder:
    """Return the run folder at a path.

    Raises:
        RunFolderError: it is not a run folder.
    """
    from .run_folder.layout import RunFolder as Folder

    return Folder(Path(folder).absolute()).require()


def __getattr__(name: str) -> object:
    """Load the other public names on first use."""
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`kolotune clean`: free what a run can make again.

Freed is what takes seconds to make: checkpoints of a finished training, the merged model, the unquantized GGUF, and
partial files that a killed process left. Everything else stays; the quantized GGUFs go only on request. The run folder
records what was freed, so that `kolotune status` shows it and the stages make only what they need again (see
`pipeline.selection`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.cache import cache_folder
from kolotune.foundation.files import remove, size_of
from kolotune.pipeline.status import read_status
from kolotune.run_folder.cleaned import add_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.results import quantize_facts
from kolotune.stages import convert, merge, quantize, train

from .list import folder_size

_LEFTOVERS = (".partial", ".old")
# The caches, and what it takes to fill them again.
CACHES = {
    "models": "unpacked base models; fetched and unpacked again",
    "base_ggufs": "base models as GGUF, for comparing; converted again",
    "toolchain": "llama.cpp's converter; fetched again",
    "conversions": "results of trial conversions; repeated",
    "torchtune": "torchtune's environment; installed again, which takes minutes",
    "container": "log of the image's build, hashes",
}


@dataclass(frozen=True)
class FreeableFile:
    """A file or folder that can be freed.

    Attributes:
        path: where it is.
        size: bytes.
        remake: how it is made again.
        digest: its SHA-256 when a stage's record promises it; "" for what nothing promises.
    """

    path: Path
    size: int
    remake: str
    digest: str = ""


def find_freeable(run: RunFolder, all_but_adapter: bool = False) -> list[FreeableFile]:
    """Find what can be freed in a run folder, according to its status.

    Args:
        run: the run folder.
        all_but_adapter: the quantized GGUFs too.

    Raises:
        RunFolderError, ConfigError: it is not a run folder, or its config can't be read.
    """
    statuses = read_status(run)
    finished = {status.name for status in statuses if not status.has_work}
    files = []
    if train.NAME in finished and run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        files.append(FreeableFile(run.checkpoints, size_of(run.checkpoints), "not needed: the training is finished"))
    for stage, names, remake in _remakable(run, {status.name for status in statuses}, finished, all_but_adapter):
        record = read_record(run, stage)
        for path in (run.root / name for name in names):
            if path.exists() and not path.is_symlink():
                output = record.outputs.get(path.name) if record else None
                files.append(FreeableFile(path, size_of(path), remake, output.sha256 if output else ""))
    leftovers = [path for folder in (run.root, run.state) for path in folder.glob(".*") if path.suffix in _LEFTOVERS]
    return files + [FreeableFile(path, size_of(path), "unfinished, of no use") for path in sorted(leftovers)]


def _remakable(
    run: RunFolder, stages: set[str], finished: set[str], all_but_adapter: bool
) -> Iterator[tuple[str, Sequence[str], str]]:
    """Yield stage, outputs and how they are made again, where all stages that read the outputs are done."""
    if {merge.NAME, convert.NAME} <= finished:
        yield merge.NAME, [run.merged_model.name], "merged again from adapter and base"
    record = read_record(run, quantize.NAME)
    is_merged = merge.NAME in finished or merge.NAME not in stages  # an exported model may be merged already
    if is_merged and {convert.NAME, quantize.NAME} <= finished and record and record.outputs:
        yield convert.NAME, [run.gguf.name], "merged and converted again"
    if all_but_adapter and finished >= stages:
        quantized = [run.quantized(name).name for name in quantize_facts(record).made]
        yield quantize.NAME, quantized, "merged, converted and quantized again"


def free(run: RunFolder, files: Sequence[FreeableFile]) -> None:
    """Remove files. Call it with the run folder locked since `find_freeable` found them."""
    add_cleaned(run, {run.relative(file.path): file.digest for file in files if file.digest})
    for file in files:
        # Renamed first: a half removed folder must not be found under its name.
        aside = file.path.with_name(f".{file.path.name.lstrip('.')}.old")
        if file.path != aside:
            remove(aside)
            file.path.rename(aside)
        remove(aside)


def find_caches() -> list[FreeableFile]:
    """Return what kolotune keeps in the user's cache; see `CACHES`."""
    folders = [(cache_folder(kind), remake) for kind, remake in CACHES.items()]
    return [FreeableFile(path, folder_size(path), remake) for path, remake in folders if path.is_dir()]

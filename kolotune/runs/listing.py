"""Which runs there are and what they take, and what of it can be freed because it can be made again.

Freed is what costs seconds to make: checkpoints of a finished training, the merged model, the unquantized GGUF, halves
of files that a killed process left. The adapter, metrics, records, prepared tokens (the training is held against
them), Modelfiles and the quantized GGUFs stay; the last ones go too when it is asked for. What was freed is noted in
the run folder, so that `status` tells it and the stages make again what they need and no more (see `pipeline.run`).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models.downloads import cache_folder
from kolotune.foundation import config as configs
from kolotune.foundation.errors import KolotuneError, RunFolderError
from kolotune.foundation.files import remove, size_of
from kolotune.pipeline import run as pipeline
from kolotune.run_folder import records
from kolotune.run_folder.layout import RunFolder
from kolotune.stages import convert, merge, modelfile, quantize, train

_DEPTH = 5
_LEFT_HALVES = (".partial", ".old")
# The caches and what it takes to fill them again.
CACHES = {
    "models": "unpacked base models; fetched and unpacked again",
    "base_ggufs": "base models as GGUF, for comparing; converted again",
    "toolchain": "llama.cpp's converter; fetched again",
    "conversions": "answers of dry conversions; asked again",
    "torchtune": "torchtune's environment; installed again, which takes minutes",
    "container": "log of the image's build, hashes",
}


@dataclass(frozen=True)
class Run:
    """A run as its records tell it; nothing is hashed.

    Attributes:
        folder: the run folder.
        base: name of the base model; "" when it is not known.
        state: "done", "running: train", "failed: merge", "interrupted: train", "done up to merge" or "not begun".
        size: bytes.
        age: seconds since its last sign of life.
        held_out_loss: after the training, or None.
    """

    folder: RunFolder
    base: str
    state: str
    size: int
    age: float
    held_out_loss: float | None


@dataclass(frozen=True)
class Item:
    """Something that can be freed.

    Attributes:
        path: file or folder.
        size: bytes.
        again: how it is made again.
        digest: its hash when a stage's record promises it; "" for what nothing promises.
    """

    path: Path
    size: int
    again: str
    digest: str = ""


def runs_below(folder: Path) -> Iterator[Run]:
    """The run folders in `folder` and below it, in the order of their names; links are not followed.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder", "Name one that holds run folders.")
    for place, below, _ in os.walk(folder):
        run = RunFolder(Path(place))
        if run.state.is_dir():
            yield _described(run)
            below.clear()
        deep = len(run.root.relative_to(folder).parts) >= _DEPTH
        below[:] = [] if deep else sorted(name for name in below if not name.startswith("."))


def _described(run: RunFolder) -> Run:
    base = ""
    if run.config.is_file():
        with contextlib.suppress(KolotuneError):  # a damaged config: the rest can be told all the same
            base = str(configs.load_file(run.config).get("base_model", ""))
    trained = records.read(run, train.NAME)
    loss = trained.facts.get("held_out_loss") if trained else None
    age = max(0.0, datetime.datetime.now().timestamp() - _last_change(run))
    size = _size(run.root)
    return Run(run, Path(base).name if Path(base).is_absolute() else base, _state(run), size, age, loss)


def _state(run: RunFolder) -> str:
    held = pipeline.is_held(run)
    for name in pipeline.NAMES:
        mark = records.marked(run, name).get("state")
        if mark:
            return f"{'interrupted' if mark == 'running' and not held else mark}: {name}"
    if held:
        return "running"
    done = [name for name in pipeline.NAMES if records.read(run, name) is not None]
    if not done:
        return "not begun"
    # What comes behind the Modelfiles only looks at the result.
    return "done" if modelfile.NAME in done else f"done up to {done[-1]}"


def _last_change(run: RunFolder) -> float:
    """When a stage began, ended or failed last, in seconds since 1970. Not the files' times, which a copy changes."""
    told = [record.finished for name in pipeline.NAMES if (record := records.read(run, name))]
    told += [mark["time"] for name in pipeline.NAMES if "time" in (mark := records.marked(run, name))]
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(max(told)).timestamp()
    return run.state.stat().st_mtime


def _size(folder: Path) -> int:
    """Bytes below a folder; files may vanish meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
    return size


def freeable(run: RunFolder, all_but_adapter: bool = False) -> list[Item]:
    """What can be freed in a run folder, by what `pipeline.status` knows of it.

    Args:
        run: the run folder.
        all_but_adapter: the quantized GGUFs too.

    Raises:
        RunFolderError, ConfigError: it is no run folder, or its config can't be read.
    """
    found = {each.name: each for each in pipeline.status(run)}
    finished = {name for name, each in found.items() if not each.has_work}
    # What a stage made is only freed when those that read it are done: else it is needed next.
    made: list[tuple[str, Sequence[str], str]] = []
    merged = merge.NAME in finished or merge.NAME not in found  # what is exported may be merged already
    if {merge.NAME, convert.NAME} <= finished:
        made.append((merge.NAME, [run.merged_model.name], "merged again from adapter and base"))
    record = records.read(run, quantize.NAME)
    quantized = [run.quantized(name).name for name in record.facts.get("made", {})] if record else []
    if merged and {convert.NAME, quantize.NAME} <= finished and record and record.outputs:
        made.append((convert.NAME, [run.gguf.name], "merged and converted again"))
    if all_but_adapter and finished >= set(found):
        made.append((quantize.NAME, quantized, "merged, converted and quantized again"))
    items = []
    if train.NAME in finished and run.checkpoints.is_dir() and not run.checkpoints.is_symlink():
        items.append(Item(run.checkpoints, size_of(run.checkpoints), "not needed: the training is finished"))
    for stage, names, again in made:
        record = records.read(run, stage)
        outputs = record.outputs if record else {}
        for path in (run.root / name for name in names):
            if path.exists() and not path.is_symlink():
                digest = str(outputs.get(path.name, {}).get("sha256", ""))
                items.append(Item(path, size_of(path), again, digest))
    halves = [path for room in (run.root, run.state) for path in room.glob(".*") if path.suffix in _LEFT_HALVES]
    return items + [Item(path, size_of(path), "half made, of no use") for path in sorted(halves)]


def free(run: RunFolder, items: Sequence[Item]) -> None:
    """Removes `items`. Call it with the run folder locked, and with what `freeable` said under the same lock."""
    records.note_cleaned(run, {run.relative(each.path): each.digest for each in items if each.digest})
    for each in items:
        # Aside first: a folder that is half removed must not stand under its name.
        aside = each.path.with_name(f".{each.path.name.lstrip('.')}.old")
        if each.path != aside:
            remove(aside)
            each.path.rename(aside)
        remove(aside)


def caches() -> list[Item]:
    """What kolotune keeps in the user's cache; see `CACHES`."""
    folders = [(cache_folder(kind), again) for kind, again in CACHES.items()]
    return [Item(path, _size(path), again) for path, again in folders if path.is_dir()]

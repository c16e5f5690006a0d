"""What went into a stage and what came out, and from that: why a stage has to run again.

A record is written after the stage's outputs, so it can't promise what is not there. Content decides: inputs
and outputs are compared by SHA-256, never by time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.files import Hasher, remove, size_of, write_json
from kolotune.foundation.reporter import Reporter

from .layout import RunFolder

_NOT_INSTALLED = "-"
_SEAL = "sha256"  # of the rest of a record: one digit of a fact that flips is seen by nothing else


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        config: the resolved options.
        run: the run folder.
        base: the folder of the base model.
        source: an adapter or merged folder made elsewhere (`kolotune export`), in place of the run's own.
        hasher: reads each file once.
    """

    config: Config
    run: RunFolder
    base: Path
    source: Path | None = None
    hasher: Hasher = dataclasses.field(default_factory=Hasher, compare=False)


class Stage(Protocol):
    """One step of the road; each is a module in `stages/` with these names."""

    NAME: str
    DOING: str

    def options(self, config: Config) -> dict[str, Any]:
        """The options that its outputs depend on."""

    def inputs(self, context: Context) -> dict[str, Path]:
        """The files and folders that it reads, by the name that they have in messages."""

    def outputs(self, context: Context) -> list[Path]:
        """The files and folders that it makes."""

    def packages(self) -> Sequence[str]:
        """The installed packages whose version its outputs depend on."""

    def preflight(self, context: Context, reporter: Reporter) -> None:
        """Raises now what could only fail later; called before any stage runs."""

    def run(self, context: Context, reporter: Reporter) -> dict[str, Any]:
        """Makes the outputs; returns facts worth keeping in the record."""


@dataclass(frozen=True)
class Record:
    """A finished stage: its fingerprint (options, hashes of inputs, versions), outputs and facts.

    `machine` says where it ran (see `hardware.machine`); it is no part of the fingerprint.
    """

    stage: str
    options: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    started: str
    finished: str
    machine: dict[str, str] = field(default_factory=dict)


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(run: RunFolder, name: str) -> Record | None:
    """The record of stage `name`; None when there is none, or it is not as it was written."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        loaded = json.loads(run.record(name).read_text(encoding="utf-8"))
        if loaded.pop(_SEAL, None) not in (None, _digest(loaded)):  # earlier versions wrote none
            return None
        record = Record(**loaded)
        parts = [record.options, record.inputs, record.versions, record.facts, record.outputs, record.machine]
        if all(isinstance(part, dict) for part in [*parts, *record.outputs.values()]):
            return record
    return None


def versions_of(stage: Stage) -> dict[str, str]:
    """The versions of the packages that the stage depends on; "-" where one is not installed."""
    found = {}
    for name in stage.packages():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = _NOT_INSTALLED
    return found


def reasons(stage: Stage, context: Context, hasher: Hasher) -> list[str]:
    """Why the stage has to run, one sentence each; empty when its outputs stand and nothing has changed."""
    record = read(context.run, stage.NAME)
    if record is None:
        return ["it has not run yet"]
    found = [
        f"{name.replace('_', '-')} changed from {_in_words(record.options.get(name))} to {_in_words(value)}"
        for name, value in _through_json(stage.options(context.config)).items()
        if record.options.get(name) != value
    ]
    inputs, gone = stage.inputs(context), cleaned(context.run)
    found += [
        f"{label} changed"
        for label, path in inputs.items()
        if not _is_as_recorded(path, record.inputs.get(label), context.run, gone, hasher)
    ]
    found += [f"{label} is no longer given" for label in record.inputs if label not in inputs]
    found += [
        f"{name} changed from {record.versions.get(name)} to {version}"
        for name, version in versions_of(stage).items()
        # What is not installed here can't have made the outputs otherwise: a client only looks.
        if version != _NOT_INSTALLED and record.versions.get(name) != version
    ]
    for path in stage.outputs(context):
        name = context.run.relative(path)
        made = record.outputs.get(name, {}).get("sha256")
        if not path.exists() and (name not in gone or gone[name] != made):
            found.append(f"{name} is missing")
        elif not _is_as_recorded(path, made, context.run, gone, hasher):
            found.append(f"{name} is not the file that was made")
    return found


def _is_as_recorded(path: Path, recorded: str | None, run: RunFolder, gone: dict[str, str], hasher: Hasher) -> bool:
    """Whether a file or folder is what it was; of what was cleaned, the hash that it had counts."""
    for name, digest in gone.items():
        if path == run.root / name:
            return recorded == digest
        if run.root / name in path.parents:  # a file of a cleaned folder, which as a whole was as recorded
            return recorded is not None
    return recorded == hasher.of(path)


def cleaned(run: RunFolder) -> dict[str, str]:
    """What was removed to free space: relative names, with the hash that each had. It is made again when needed."""
    with contextlib.suppress(OSError, ValueError):
        loaded = json.loads(run.cleaned.read_text(encoding="utf-8"))
        if isinstance(loaded, dict):
            return {str(name): str(digest) for name, digest in loaded.items() if not (run.root / name).exists()}
    return {}


def note_cleaned(run: RunFolder, names: dict[str, str]) -> None:
    """Notes what is about to be removed; see `cleaned`."""
    write_json(run.cleaned, cleaned(run) | names)


def forget_cleaned(run: RunFolder, paths: Sequence[Path]) -> None:
    """From now on these count as missing, and their stage as one that has to run."""
    kept = {name: digest for name, digest in cleaned(run).items() if run.root / name not in paths}
    if run.cleaned.exists():
        write_json(run.cleaned, kept)


def write(stage: Stage, context: Context, hasher: Hasher, facts: dict[str, Any], started: str) -> Record:
    """Writes the record of a stage whose outputs are in place."""
    record = Record(
        stage=stage.NAME,
        options=_through_json(stage.options(context.config)),
        inputs={label: hasher.of(path) for label, path in stage.inputs(context).items()},
        versions=versions_of(stage),
        outputs={
            context.run.relative(path): {"size": size_of(path), "sha256": hasher.of(path)}
            for path in stage.outputs(context)
        },
        facts=facts,
        started=started,
        finished=now(),
        machine=hardware.machine(),
    )
    plain = _through_json(dataclasses.asdict(record))
    write_json(context.run.record(stage.NAME), plain | {_SEAL: _digest(plain)})
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _in_words(value: Any) -> str:
    """An option's value as the user would write it."""
    if value in (None, "", []):
        return "nothing"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _through_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a record, so that tuples and lists compare equal."""
    loaded: dict[str, Any] = json.loads(json.dumps(value))
    return loaded


def mark(run: RunFolder, name: str, state: str, cause: str = "") -> None:
    """Notes that stage `name` is running, failed or was interrupted; for `status` only."""
    write_json(_mark_file(run, name), {"state": state, "cause": cause, "time": now()})


def unmark(run: RunFolder, name: str) -> None:
    """Forgets what `mark` noted: the stage is done."""
    remove(_mark_file(run, name))


def marked(run: RunFolder, name: str) -> dict[str, str]:
    """What `mark` noted last; empty when the stage is done or was never started."""
    with contextlib.suppress(OSError, ValueError):
        loaded = json.loads(_mark_file(run, name).read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}
    return {}


def _mark_file(run: RunFolder, name: str) -> Path:
    return run.state / f"{name}.unfinished.json"

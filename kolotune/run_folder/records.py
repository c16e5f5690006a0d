"""Records of finished stages: what went in, what came out, and the facts about it.

A record is written after the stage's outputs, so it can't promise what does not exist. It is sealed with its own
SHA-256: a record that was changed by one digit is no record.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from dataclasses import dataclass, field

from kolotune.foundation import hardware, installation, typed_storage
from kolotune.foundation.files import size_of
from kolotune.foundation.typed_storage import JsonObject

from .layout import RunFolder
from .stage import Context, Stage

NOT_INSTALLED = "-"
_SEAL = "sha256"


@dataclass(frozen=True)
class FileHash:
    """Size in bytes and SHA-256 of a file or folder."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """A finished stage.

    Attributes:
        stage: its name.
        options, inputs, versions: its fingerprint: options, SHA-256 of each input by label, versions of packages.
        outputs: by their names in the run folder.
        facts: what the stage returned.
        started, finished: UTC, as `now` gives it.
        machine: where it ran (see `hardware.machine`); not part of the fingerprint.
    """

    stage: str
    options: JsonObject
    inputs: dict[str, str]
    versions: dict[str, str]
    outputs: dict[str, FileHash]
    facts: JsonObject
    started: str
    finished: str
    machine: dict[str, str] = field(default_factory=dict)


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_record(run: RunFolder, stage: str) -> Record | None:
    """Read the record of a stage; None when there is none, or it was damaged or changed."""
    with contextlib.suppress(OSError, typed_storage.StorageError, RecursionError):
        fields = typed_storage.read_object(run.record(stage))
        if fields.pop(_SEAL, None) in (None, _digest(fields)):  # early versions wrote no seal
            return typed_storage.convert(Record, fields)
    return None


def write_record(stage: Stage, context: Context, facts: JsonObject, started: str) -> Record:
    """Write the record of a stage whose outputs are in place."""
    run, hasher = context.run, context.hasher
    record = Record(
        stage=stage.NAME,
        options=typed_storage.through_json(stage.options(context.config)),
        inputs={label: hasher.of(path) for label, path in stage.inputs(context).items()},
        versions=package_versions(stage),
        outputs={run.relative(path): FileHash(size_of(path), hasher.of(path)) for path in stage.outputs(context)},
        facts=facts,
        started=started,
        finished=now(),
        machine=hardware.machine(),
    )
    fields: JsonObject = typed_storage.through_json(record)
    typed_storage.write(run.record(stage.NAME), fields | {_SEAL: _digest(fields)})
    return record


def package_versions(stage: Stage) -> dict[str, str]:
    """Return the versions of the packages that a stage depends on; `NOT_INSTALLED` for those that are missing."""
    return {name: installation.version_in_use(name) or NOT_INSTALLED for name in stage.packages()}


def _digest(fields: JsonObject) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

"""Why a stage has to run again. Content decides: inputs and outputs are compared by SHA-256, never by time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.config import OPTIONS, Config, plain_values
from kolotune.foundation.typed_storage import JsonObject

from .cleaned import read_cleaned
from .layout import RunFolder
from .records import NOT_INSTALLED, Record, package_versions, read_record
from .stage import Context, Stage


class ReasonKind(Enum):
    """What makes a stage run again."""

    NEVER_RAN = auto()
    OPTION_CHANGED = auto()
    INPUT_CHANGED = auto()
    INPUT_NOT_GIVEN = auto()
    VERSION_CHANGED = auto()
    OUTPUT_MISSING = auto()
    OUTPUT_ALTERED = auto()


@dataclass(frozen=True)
class Reason:
    """One reason why a stage has to run.

    Attributes:
        kind: what happened.
        name: the option, the label of the input, the package, or the output's name in the run folder.
        before, after: the recorded and the present value of an option, or version of a package.
    """

    kind: ReasonKind
    name: str = ""
    before: object = None
    after: object = None


def find_reasons(stage: Stage, context: Context) -> list[Reason]:
    """Return why a stage has to run; empty when its outputs are as recorded and nothing has changed."""
    record = read_record(context.run, stage.NAME)
    if record is None:
        return [Reason(ReasonKind.NEVER_RAN)]
    recorded = _RecordedHashes(context)
    return [
        *_changed_options(stage, context, record),
        *_changed_inputs(stage, context, record, recorded),
        *_changed_versions(stage, record),
        *_changed_outputs(stage, context, record, recorded),
    ]


def _changed_options(stage: Stage, context: Context, record: Record) -> Iterator[Reason]:
    options: JsonObject = typed_storage.through_json(stage.options(context.config))
    # Some are recorded only where they are not the default.
    defaults = plain_values(Config(), [name for name in record.options if name in OPTIONS and name not in options])
    left_out: JsonObject = typed_storage.through_json(defaults)
    for name, value in {**options, **left_out}.items():
        if record.options.get(name) != value:
            yield Reason(ReasonKind.OPTION_CHANGED, name, record.options.get(name), value)


def _changed_inputs(stage: Stage, context: Context, record: Record, recorded: _RecordedHashes) -> Iterator[Reason]:
    inputs = stage.inputs(context)
    for label, path in inputs.items():
        if not recorded.matches(path, record.inputs.get(label)):
            yield Reason(ReasonKind.INPUT_CHANGED, label)
    for label in record.inputs:
        if label not in inputs:
            yield Reason(ReasonKind.INPUT_NOT_GIVEN, label)


def _changed_versions(stage: Stage, record: Record) -> Iterator[Reason]:
    for name, version in package_versions(stage).items():
        # A package that is not installed here can't have changed the outputs: a client only reads them. Nor can one
        # that the record does not name: an earlier version did without it.
        if version != NOT_INSTALLED and record.versions.get(name, version) != version:
            yield Reason(ReasonKind.VERSION_CHANGED, name, record.versions[name], version)


def _changed_outputs(stage: Stage, context: Context, record: Record, recorded: _RecordedHashes) -> Iterator[Reason]:
    for path in stage.outputs(context):
        name = context.run.relative(path)
        output = record.outputs.get(name)
        digest = output.sha256 if output else None
        if not path.exists() and (name not in recorded.cleaned or recorded.cleaned[name] != digest):
            yield Reason(ReasonKind.OUTPUT_MISSING, name)
        elif not recorded.matches(path, digest):
            yield Reason(ReasonKind.OUTPUT_ALTERED, name)


class _RecordedHashes:
    """Compares files and folders with the hashes in a record; a cleaned one counts with the hash that it had."""

    def __init__(self, context: Context) -> None:
        self._run: RunFolder = context.run
        self._hasher = context.hasher
        self.cleaned = read_cleaned(context.run)

    def matches(self, path: Path, digest: str | None) -> bool:
        for name, cleaned_digest in self.cleaned.items():
            if path == self._run.root / name:
                return digest == cleaned_digest
            if self._run.root / name in path.parents:  # a file of a cleaned folder, which as a whole was as recorded
                return digest is not None
        return digest == self._hasher.of(path)

"""The manifest of a run: data, base, config, versions, machine, and the size and hash of every file that was made.

It is written from the records of the stages when all of them belong together, and adds nothing to them but the hashes
of single files. `runs.verify` compares a run folder with it, `runs.rebuild` repeats a run from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.chat_paths import hub_source
from kolotune.foundation.errors import ManifestError
from kolotune.foundation.files import files_of, remove, size_of
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.typed_storage import JsonObject

from .records import FileHash, Record, read_record
from .stage import Context, Stage

FORMAT = 1
DataPart = Literal["training", "held-out"]
# Paths, which may differ on another machine; the content behind them is compared by hashes.
PATH_OPTIONS = ("train_data", "eval_data", "chat_template", "start_from", "base_model", "output_dir")
_VERSIONS_OF_MACHINE = ("kolotune", "python")  # which a record keeps with the machine


@dataclass(frozen=True)
class Artifact:
    """A result: the stage that made it, size and SHA-256, and those of every file in it ("" names the file itself)."""

    stage: str
    size: int
    sha256: str
    files: dict[str, FileHash]


@dataclass(frozen=True)
class DataFile:
    """A file of chats, and which part of the data it is.

    Attributes:
        part, path, sha256: as they are named.
        hub: where the hub has it, with its revision; None for a file that is not from there.
    """

    part: DataPart
    path: str
    sha256: str
    hub: str | None = None


@dataclass(frozen=True)
class Data:
    """The files of chats, and the facts of `prepare` that count chats and tokens."""

    files: list[DataFile]
    counts: JsonObject


@dataclass(frozen=True)
class BaseModel:
    """The base model, as the user named it."""

    name: str
    sha256: str


@dataclass(frozen=True)
class ExportedModel:
    """The adapter or merged model that was exported in place of an adapter of the run's own."""

    path: str
    sha256: str


@dataclass(frozen=True)
class StageEntry:
    """What the manifest repeats of a stage's record; of the facts those that are single values."""

    options: JsonObject
    inputs: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, str]
    facts: JsonObject
    started: str
    finished: str


@dataclass(frozen=True)
class Manifest:
    """What a run consists of.

    Attributes:
        format: of this file.
        data, base, source: what the run was made from.
        config: the resolved options, as in the run folder's config file. It holds no secret.
        versions: of kolotune, Python, llama.cpp and the packages that the results depend on.
        machine: where the model was trained, or where the first stage ran: see `hardware.machine`.
        stages: by name.
        artifacts: the results, by their names in the run folder.
        notes: files that are worth keeping and differ each time.
    """

    format: int
    data: Data
    base: BaseModel
    source: ExportedModel | None
    config: JsonObject
    versions: dict[str, str]
    machine: dict[str, str]
    stages: dict[str, StageEntry]
    artifacts: dict[str, Artifact]
    notes: dict[str, FileHash]

    def facts_of(self, stage: str) -> JsonObject:
        """Return the facts of a stage; none for a stage that the run does not have."""
        return self.stages[stage].facts if stage in self.stages else {}


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: there is none, or the file is no manifest of this format.
    """
    try:
        fields = typed_storage.read_object(path)
        if fields.get("format") != FORMAT:
            raise ManifestError(f"{path}: not a manifest of format {FORMAT}", "Use the kolotune that wrote it.")
        return typed_storage.convert(Manifest, fields)
    except OSError:
        raise ManifestError(
            f"{path}: there is no manifest", "`kolotune run` writes one when every stage of the run is done."
        ) from None
    except typed_storage.StorageError as error:
        raise ManifestError(f"{path}: not a manifest: {error}") from None


def write_manifest(stages: Sequence[Stage], context: Context) -> Manifest | None:
    """Write the run's manifest when its stages are done and belong together; otherwise remove an old one.

    Args:
        stages: all stages that the run has.
        context: of the run; its hasher knows the files that were just made.

    Returns:
        The manifest; None when there is none.
    """
    target = context.run.manifest
    done = _matching_records(stages, context)
    if done is None:
        remove(target)
        return None
    previous = typed_storage.read_or_none(Manifest, target)
    manifest = _manifest_of(done, stages, context, previous)
    if manifest != previous:
        typed_storage.write(target, manifest)
    return manifest


def entry_of(record: Record) -> StageEntry:
    """Return what a manifest repeats of a record."""
    return StageEntry(
        options=record.options,
        inputs=record.inputs,
        versions=record.versions,
        machine=record.machine,
        facts={name: value for name, value in record.facts.items() if not isinstance(value, (dict, list))},
        started=record.started,
        finished=record.finished,
    )


def hash_files(path: Path, hasher: Hasher) -> dict[str, FileHash]:
    """Return size and hash of a file, named "", or of every file of a folder by its name in it."""
    return {
        each.relative_to(path).as_posix() if path.is_dir() else "": FileHash(size_of(each), hasher.of(each))
        for each in files_of(path)
    }


def _matching_records(stages: Sequence[Stage], context: Context) -> dict[str, Record] | None:
    """Return the stages' records when each was made with these options from what the stages before it made."""
    done: dict[str, Record] = {}
    for stage in stages:
        record = read_record(context.run, stage.NAME)
        if record is None or record.options != typed_storage.through_json(stage.options(context.config)):
            return None
        done[stage.NAME] = record
    outputs = {
        context.run.root / name: file.sha256 for record in done.values() for name, file in record.outputs.items()
    }
    for stage in stages:
        inputs = done[stage.NAME].inputs
        if any(inputs.get(label) != outputs[path] for label, path in stage.inputs(context).items() if path in outputs):
            return None
    return done


def _manifest_of(
    done: dict[str, Record], stages: Sequence[Stage], context: Context, previous: Manifest | None
) -> Manifest:
    import yaml

    config, run, source = context.config, context.run, context.source
    inputs = {
        path: done[stage.NAME].inputs.get(label, "")
        for stage in stages
        for label, path in stage.inputs(context).items()
    }
    parts: list[tuple[DataPart, Path]] = [("training", path) for path in config.train_data]
    parts += [("held-out", path) for path in config.eval_data]
    entries = {name: entry_of(record) for name, record in done.items()}
    trained = done.get("train") or next(iter(done.values()))
    return Manifest(
        format=FORMAT,
        data=Data(
            files=[DataFile(part, str(path), inputs[path], hub_source(path)) for part, path in parts if path in inputs],
            counts=entries["prepare"].facts if "prepare" in entries else {},
        ),
        base=BaseModel(config.base_model, inputs.get(context.base, "")),
        source=None if source is None else ExportedModel(str(source), inputs.get(source, "")),
        config=typed_storage.through_json(yaml.safe_load(configs.dump(config))),
        versions=_versions(done.values()),
        machine={name: value for name, value in trained.machine.items() if name not in _VERSIONS_OF_MACHINE},
        stages=entries,
        artifacts=_artifacts(done, context, previous),
        notes={run.relative(run.metrics): hash_files(run.metrics, context.hasher)[""]} if run.metrics.is_file() else {},
    )


def _versions(done: Iterable[Record]) -> dict[str, str]:
    """Return every version; where stages ran with several ones, all of them."""
    versions: dict[str, dict[str, None]] = {}
    for record in done:
        of_stage = {name: record.machine[name] for name in _VERSIONS_OF_MACHINE if name in record.machine}
        if "toolchain" in record.facts:
            of_stage["llama.cpp"] = str(record.facts["toolchain"])
        for name, version in {**of_stage, **record.versions}.items():
            versions.setdefault(name, {})[version] = None
    return {name: ", ".join(several) for name, several in versions.items()}


def _artifacts(done: dict[str, Record], context: Context, previous: Manifest | None) -> dict[str, Artifact]:
    """Return the results, file by file. Files that the old manifest lists for the same hash are not read again."""
    known = previous.artifacts if previous else {}
    artifacts = {}
    for stage, record in done.items():
        for name, output in record.outputs.items():
            path = context.run.root / name
            if name in known and known[name].sha256 == output.sha256:
                files = known[name].files
            else:
                files = hash_files(path, context.hasher) if path.exists() else {}  # it was cleaned
            artifacts[name] = Artifact(stage, output.size, output.sha256, files)
    return artifacts

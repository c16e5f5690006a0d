"""`kolotune verify`: compare a run folder with its manifest, byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path

from kolotune.foundation import config as configs
from kolotune.foundation.hashing import Hasher
from kolotune.pipeline.context import open_context
from kolotune.pipeline.stages import stages_of
from kolotune.run_folder.cleaned import read_cleaned
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import PATH_OPTIONS, Manifest, StageEntry, entry_of, hash_files, read_manifest
from kolotune.run_folder.records import FileHash, read_record
from kolotune.run_folder.stage import Context
from kolotune.stages import prepare, train


class DifferenceKind(Enum):
    """How something differs from the manifest; the value is its sentence."""

    MISSING = "{name} is missing"
    UNEXPECTED_FILE = "{name} was not made by the run"
    SIZE = "{name} has {actual} bytes, not {expected}"
    CONTENT = "{name} was changed since it was made (sha256 {actual:.12}…, not {expected:.12}…)"
    MANIFEST_HASHES = "{name}: the manifest's hash of the whole does not match its hashes of the files"
    OPTION = "config.yaml: {name} is {actual}, not {expected}"
    RECORD_MISSING = "{name} is missing or can't be read"
    RECORD = "{name}: {expected} differs from the manifest"
    STAGE_INPUT = "{name}: the manifest has a different file for its input, {expected}"
    SOURCE = "{name} is not the one that the run was made from"


@dataclass(frozen=True)
class ManifestDifference:
    """One difference between a run folder and its manifest.

    Attributes:
        kind: how they differ.
        name: the file in the run folder, the option, the stage or the source that differs.
        expected, actual: what the manifest says, and what was found; "" where only the name matters.
    """

    kind: DifferenceKind
    name: str
    expected: str = ""
    actual: str = ""

    def __str__(self) -> str:
        return self.kind.value.format(name=self.name, expected=self.expected, actual=self.actual)


@dataclass(frozen=True)
class Findings:
    """The result of a check.

    Attributes:
        differences: empty when everything is as it was made.
        unchecked: what could not be read: sources that are not on this machine, and outputs that were cleaned.
        files, bytes: number and size of the files of the run that were read.
    """

    differences: list[ManifestDifference]
    unchecked: list[str]
    files: int
    bytes: int


def verify(folder: RunFolder) -> Findings:
    """Compare a run folder with its manifest.

    Checked are the results (names, sizes and hashes of all files), the records, the saved config, that every stage
    read what the one before it made, and the data and the base model where they are on this machine.

    Raises:
        RunFolderError: it is not a run folder.
        ManifestError: it has no manifest that can be read.
    """
    folder.require()
    manifest = read_manifest(folder.manifest)
    context = open_context(folder)  # its hasher trusts no earlier process: what is on the disk now
    cleaned = read_cleaned(folder)
    existing = {name: each for name, each in manifest.artifacts.items() if cleaned.get(name) != each.sha256}
    differences = [
        *compare_artifacts(manifest, folder, existing, context.hasher),
        *_compare_notes(manifest, context),
        *_compare_config(manifest, folder),
        *_compare_records(manifest, context),
        *_compare_inputs(manifest, context),
    ]
    of_sources, unchecked = _compare_sources(manifest, context)
    unchecked += [f"{name}, which was cleaned" for name in manifest.artifacts if name not in existing]
    sizes = [file.size for artifact in existing.values() for file in artifact.files.values()]
    sizes += [note.size for note in manifest.notes.values()]
    return Findings(differences + of_sources, unchecked, len(sizes), sum(sizes))


def compare_artifacts(
    manifest: Manifest, folder: RunFolder, names: Iterable[str], hasher: Hasher
) -> list[ManifestDifference]:
    """Compare the results `names` with the manifest; every byte of them is read."""
    differences: list[ManifestDifference] = []
    for name in names:
        artifact, path = manifest.artifacts[name], folder.root / name
        of_files = list(_compare_files(name, artifact.files, path, hasher))
        differences += of_files
        if not of_files and hasher.of(path) != artifact.sha256:
            differences.append(ManifestDifference(DifferenceKind.MANIFEST_HASHES, name))
    return differences


def _compare_notes(manifest: Manifest, context: Context) -> Iterator[ManifestDifference]:
    for name, note in manifest.notes.items():
        yield from _compare_files(name, {"": note}, context.run.root / name, context.hasher)


def _compare_files(
    name: str, expected: dict[str, FileHash], path: Path, hasher: Hasher
) -> Iterator[ManifestDifference]:
    if not path.exists():
        yield ManifestDifference(DifferenceKind.MISSING, name)
        return
    actual = hash_files(path, hasher)
    for part in sorted({*actual, *expected}):
        shown = f"{name}/{part}" if part else name
        was, now = expected.get(part), actual.get(part)
        if was is None:
            yield ManifestDifference(DifferenceKind.UNEXPECTED_FILE, shown)
        elif now is None:
            yield ManifestDifference(DifferenceKind.MISSING, shown)
        elif was.size != now.size:
            yield ManifestDifference(DifferenceKind.SIZE, shown, str(was.size), str(now.size))
        elif was.sha256 != now.sha256:
            yield ManifestDifference(DifferenceKind.CONTENT, shown, was.sha256, now.sha256)


def _compare_config(manifest: Manifest, folder: RunFolder) -> Iterator[ManifestDifference]:
    """Compare the saved config, except for paths: what they name is compared by hashes."""
    saved = configs.load_file(folder.config)
    for name in sorted({*saved, *manifest.config} - {*PATH_OPTIONS}):
        if saved.get(name) != manifest.config.get(name):
            yield ManifestDifference(
                DifferenceKind.OPTION, name, repr(manifest.config.get(name)), repr(saved.get(name))
            )


def _compare_records(manifest: Manifest, context: Context) -> Iterator[ManifestDifference]:
    for stage, expected in manifest.stages.items():
        record = read_record(context.run, stage)
        file = context.run.relative(context.run.record(stage))
        if record is None:
            yield ManifestDifference(DifferenceKind.RECORD_MISSING, file)
            continue
        actual = entry_of(record)
        for field in fields(StageEntry):
            if getattr(actual, field.name) != getattr(expected, field.name):
                yield ManifestDifference(DifferenceKind.RECORD, file, field.name)
        outputs = {
            name: FileHash(each.size, each.sha256) for name, each in manifest.artifacts.items() if each.stage == stage
        }
        for name in sorted({*outputs, *record.outputs}):
            if outputs.get(name) != record.outputs.get(name):
                yield ManifestDifference(DifferenceKind.RECORD, file, name)


def _compare_inputs(manifest: Manifest, context: Context) -> Iterator[ManifestDifference]:
    """Check that every stage read what the earlier stages made, according to the manifest."""
    outputs = {context.run.root / name: artifact.sha256 for name, artifact in manifest.artifacts.items()}
    for stage in stages_of(context):
        if stage.NAME in manifest.stages:
            recorded = manifest.stages[stage.NAME].inputs
            for label, path in stage.inputs(context).items():
                if path in outputs and label in recorded and recorded[label] != outputs[path]:
                    yield ManifestDifference(DifferenceKind.STAGE_INPUT, stage.NAME, label)


def _compare_sources(manifest: Manifest, context: Context) -> tuple[list[ManifestDifference], list[str]]:
    """Compare data, base and exported model; also return which of them are not on this machine."""
    differences, missing = [], []
    sources = [(Path(file.path), f"the data {file.path}", file.sha256) for file in manifest.data.files]
    sources.append((context.base, f"the base model {manifest.base.name}", manifest.base.sha256))
    if (template := manifest.config.get("chat_template")) is not None and prepare.NAME in manifest.stages:
        digest = manifest.stages[prepare.NAME].inputs.get(prepare.TEMPLATE_INPUT, "")
        sources.append((Path(str(template)), f"the chat template {template}", digest))
    if (start := manifest.config.get("start_from")) is not None and train.NAME in manifest.stages:
        digest = manifest.stages[train.NAME].inputs.get(train.START_INPUT, "")
        sources.append((Path(str(start)), f"the adapter {start}", digest))
    if manifest.source is not None:
        sources.append((Path(manifest.source.path), manifest.source.path, manifest.source.sha256))
    for path, shown, digest in sources:
        if not path.exists():
            missing.append(shown)
        elif digest and context.hasher.of(path) != digest:
            differences.append(ManifestDifference(DifferenceKind.SOURCE, shown))
    return differences, missing

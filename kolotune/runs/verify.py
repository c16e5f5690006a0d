"""Is a run folder what its manifest says? Every byte is read; each difference gets one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation import config as configs
from kolotune.foundation.files import Hasher
from kolotune.pipeline import run
from kolotune.run_folder import manifest as manifests
from kolotune.run_folder import records
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import PLACES, Manifest
from kolotune.run_folder.records import Context


@dataclass(frozen=True)
class Findings:
    """What came of a check.

    Attributes:
        differences: one sentence each; empty when all is as it was made.
        absent: what could not be read: of what the run was made from what is not on this machine, and what was cleaned.
        files, bytes: that were read of the run's results.
    """

    differences: list[str]
    absent: list[str]
    files: int
    bytes: int


def verify(folder: RunFolder) -> Findings:
    """Holds a run folder against its manifest.

    Checked are the results (names, sizes and hashes of all files), the records, the saved config, that every stage
    was made of what the one before it made, and the data and the base model where they are on this machine.

    Raises:
        RunFolderError: it is no run folder.
        ManifestError: it has no manifest that can be read.
    """
    folder.require()
    manifest = manifests.read(folder.manifest)
    context = run.context_of(folder)
    hasher = Hasher()  # without a cache: what is on the disk now
    gone = records.cleaned(folder)
    there = {name: each for name, each in manifest.artifacts.items() if gone.get(name) != each["sha256"]}
    differences = [
        *_of_files(manifest, there, folder, hasher),
        *_of_config(manifest, folder),
        *_of_records(manifest, context),
        *_of_chain(manifest, context),
    ]
    more, absent = _of_sources(manifest, context, hasher)
    absent += [f"{name}, which was cleaned" for name in manifest.artifacts if name not in there]
    sizes = [file["size"] for artifact in there.values() for file in artifact["files"].values()]
    sizes += [note["size"] for note in manifest.notes.values()]
    return Findings(differences + more, absent, len(sizes), sum(sizes))


def differences_of(manifest: Manifest, folder: RunFolder, names: Iterable[str], hasher: Hasher) -> list[str]:
    """What is otherwise than the manifest says about the results `names`, whose bytes are read."""
    return [each for name in names for each in _of_artifact(name, manifest.artifacts[name], folder.root / name, hasher)]


def _of_files(
    manifest: Manifest, there: Mapping[str, Mapping[str, Any]], folder: RunFolder, hasher: Hasher
) -> Iterator[str]:
    yield from differences_of(manifest, folder, there, hasher)
    for name, note in manifest.notes.items():
        yield from _of_artifact(name, {**note, "files": {"": note}}, folder.root / name, hasher)


def _of_artifact(name: str, wanted: Mapping[str, Any], path: Path, hasher: Hasher) -> Iterator[str]:
    if not path.exists():
        yield f"{name} is missing"
        return
    found = manifests.files_in(path, hasher)
    same = True
    for part in sorted({*found, *wanted["files"]}):
        shown = f"{name}/{part}" if part else name
        was, now = wanted["files"].get(part), found.get(part)
        same = same and was == now
        if was is None:
            yield f"{shown} was not made by the run"
        elif now is None:
            yield f"{shown} is missing"
        elif was["size"] != now["size"]:
            yield f"{shown} has {now['size']} bytes, not {was['size']}"
        elif was["sha256"] != now["sha256"]:
            yield f"{shown} has other bytes than those that were made (sha256 {_short(now)}, not {_short(was)})"
    if same and hasher.of(path) != wanted["sha256"]:
        yield f"{name}: the manifest's hash of the whole does not belong to those of its files"


def _short(file: Mapping[str, Any]) -> str:
    return f"{file['sha256'][:12]}…"


def _of_config(manifest: Manifest, folder: RunFolder) -> Iterator[str]:
    """The saved config, but for what names places: those are held against hashes."""
    saved = configs.load_file(folder.config)
    for name in sorted({*saved, *manifest.config} - {*PLACES}):
        if saved.get(name) != manifest.config.get(name):
            yield f"{folder.config.name}: {name} is {saved.get(name)!r}, not {manifest.config.get(name)!r}"


def _of_records(manifest: Manifest, context: Context) -> Iterator[str]:
    for name, wanted in manifest.stages.items():
        record = records.read(context.run, name)
        file = context.run.relative(context.run.record(name))
        if record is None:
            yield f"{file} is missing or can't be read"
            continue
        found = manifests.entry(record)
        for part in sorted({*found, *wanted}):
            if found.get(part) != wanted.get(part):
                yield f"{file}: its {part} are not those of the manifest"
        made = {each: artifact for each, artifact in manifest.artifacts.items() if artifact["stage"] == name}
        for each in sorted({*made, *record.outputs}):
            was, now = made.get(each, {}), record.outputs.get(each, {})
            if (was.get("sha256"), was.get("size")) != (now.get("sha256"), now.get("size")):
                yield f"{file}: {each} is not what the manifest says"


def _of_chain(manifest: Manifest, context: Context) -> Iterator[str]:
    """Every stage read what the manifest says that another one made."""
    made = {context.run.root / name: artifact["sha256"] for name, artifact in manifest.artifacts.items()}
    for stage in run.stages_of(context):
        inputs = manifest.stages.get(stage.NAME, {}).get("inputs", {})
        for label, path in stage.inputs(context).items():
            if path in made and label in inputs and inputs[label] != made[path]:
                yield f"{stage.NAME} was made of another {label.removeprefix('the ')} than the manifest has"


def _of_sources(manifest: Manifest, context: Context, hasher: Hasher) -> tuple[list[str], list[str]]:
    """Differences of data, base and what was exported; and which of them are not here."""
    differences, absent = [], []
    named = [(Path(each["path"]), f"the data {each['path']}", each["sha256"]) for each in manifest.data["files"]]
    named.append((context.base, f"the base model {manifest.base['name']}", manifest.base["sha256"]))
    if manifest.source is not None:
        named.append((Path(manifest.source["path"]), manifest.source["path"], manifest.source["sha256"]))
    for path, shown, digest in named:
        if not path.exists():
            absent.append(shown)
        elif digest and hasher.of(path) != digest:
            differences.append(f"{shown} is not the one that the run was made from")
    return differences, absent

"""The manifest of a run: data, base, config, versions, machine, and the size and hash of every file that was made.

It is made from the stages' records when all of them belong together, and says nothing that they don't say, but for
the hashes of single files. `verifying` holds a run folder against it, `rebuilding` repeats a run from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ManifestError
from kolotune.foundation.files import Hasher, files_of, remove, size_of, write_json

from . import records
from .records import Context, Record, Stage

FORMAT = 1
TRAINING, HELD_OUT = "training", "held-out"
# They name places, which may be others on another machine; what is there is held against hashes.
_OF_THE_MACHINE = ("kolotune", "python")  # versions that a record keeps with the machine
PLACES = ("train_data", "eval_data", "base_model", "output_dir")


@dataclass(frozen=True)
class Manifest:
    """What a run is made of.

    Attributes:
        format: of this file.
        data: `files`, each with part, path and sha256, and the `counts` of the chats and tokens.
        base: name and sha256 of the base model.
        source: path and sha256 of what was exported in place of an adapter of the run's own; None: it trained one.
        config: the resolved options, as in the run folder's config file. No secret is among them.
        versions: of kolotune, Python, llama.cpp and the packages that the results depend on.
        machine: where it was trained, or where its first stage ran: see `hardware.machine`.
        stages: for each stage its options, inputs, versions, machine and facts that are single values.
        artifacts: for each result its stage, size and sha256, and the same of every file in it.
        notes: size and sha256 of files that are worth keeping and are another each time.
    """

    format: int
    data: dict[str, Any]
    base: dict[str, str]
    source: dict[str, str] | None
    config: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    stages: dict[str, dict[str, Any]]
    artifacts: dict[str, dict[str, Any]]
    notes: dict[str, dict[str, Any]]


def write(stages: Sequence[Stage], context: Context, hasher: Hasher) -> Manifest | None:
    """Writes the run's manifest, when its stages are done and belong together; removes an old one when they don't.

    Args:
        stages: all stages that the run has.
        context: of the run.
        hasher: knows the hashes of what has just been made.

    Returns:
        The manifest; None when there is none.
    """
    target = context.run.manifest
    done = _belonging_together(stages, context)
    if done is None:
        remove(target)
        return None
    made = _made(done, stages, context, hasher)
    if made != _before(target):
        write_json(target, dataclasses.asdict(made))
    return made


def read(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ManifestError: there is none, or it is no manifest of this format.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ManifestError(
            f"{path}: there is no manifest", "`kolotune run` writes one when every stage of the run is done."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is no manifest: {error}") from None
    if not isinstance(loaded, dict) or loaded.get("format") != FORMAT:
        raise ManifestError(f"{path}: is no manifest of format {FORMAT}", "Use the kolotune that wrote it.")
    try:
        manifest = Manifest(**loaded)
        _check_shape(manifest)
    except (TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"{path}: is no whole manifest: {error}") from None
    return manifest


def _check_shape(manifest: Manifest) -> None:
    """Raises what a reader would stumble over."""
    for each in (manifest.config, manifest.versions, manifest.machine, manifest.notes):
        each.items()
    for file in manifest.data["files"]:
        _ = file["part"] + file["path"] + file["sha256"]
    _ = manifest.data["counts"].items(), manifest.base["name"] + manifest.base["sha256"]
    if manifest.source is not None:
        _ = manifest.source["path"] + manifest.source["sha256"]
    for stage in manifest.stages.values():
        _ = [stage[name].items() for name in ("options", "inputs", "versions", "machine", "facts")]
    for artifact in manifest.artifacts.values():
        _ = artifact["stage"] + artifact["sha256"], artifact["size"] + 0
        _ = [each["sha256"] + "" for each in artifact["files"].values()]


def entry(record: Record) -> dict[str, Any]:
    """What a manifest repeats of a stage's record."""
    facts = {name: value for name, value in record.facts.items() if not isinstance(value, (dict, list))}
    return {
        "options": record.options,
        "inputs": record.inputs,
        "versions": record.versions,
        "machine": record.machine,
        "facts": facts,
        "started": record.started,
        "finished": record.finished,
    }


def files_in(path: Path, hasher: Hasher) -> dict[str, dict[str, Any]]:
    """Size and sha256 of a file ("" is its name), or of every file of a folder by its name in it."""
    return {
        each.relative_to(path).as_posix() if path.is_dir() else "": {"size": size_of(each), "sha256": hasher.of(each)}
        for each in files_of(path)
    }


def _before(target: Path) -> Manifest | None:
    try:
        return read(target)
    except ManifestError:
        return None


def _belonging_together(stages: Sequence[Stage], context: Context) -> dict[str, Record] | None:
    """The stages' records, when each was made with these options and of what the others made; else None."""
    found = {stage.NAME: records.read(context.run, stage.NAME) for stage in stages}
    made = {name: each["sha256"] for record in found.values() if record for name, each in record.outputs.items()}
    places = {context.run.root / name: digest for name, digest in made.items()}
    done: dict[str, Record] = {}
    for stage in stages:
        record = found[stage.NAME]
        if record is None or record.options != _through_json(stage.options(context.config)):
            return None
        if any(
            record.inputs.get(label) != places[path] for label, path in stage.inputs(context).items() if path in places
        ):
            return None
        done[stage.NAME] = record
    return done


def _made(done: dict[str, Record], stages: Sequence[Stage], context: Context, hasher: Hasher) -> Manifest:
    import yaml

    inputs = {
        path: done[stage.NAME].inputs.get(label, "")
        for stage in stages
        for label, path in stage.inputs(context).items()
    }
    parts = ((TRAINING, context.config.train_data), (HELD_OUT, context.config.eval_data))
    source = context.source
    trained = done.get("train") or next(iter(done.values()))
    return Manifest(
        format=FORMAT,
        data={
            "files": [
                {"part": part, "path": str(path), "sha256": inputs[path]}
                for part, paths in parts
                for path in paths
                if path in inputs
            ],
            "counts": entry(done["prepare"])["facts"] if "prepare" in done else {},
        },
        base={"name": context.config.base_model, "sha256": inputs.get(context.base, "")},
        source=None if source is None else {"path": str(source), "sha256": inputs.get(source, "")},
        config=_through_json(yaml.safe_load(configs.dump(context.config))),
        versions=_versions(done.values()),
        machine={name: value for name, value in trained.machine.items() if name not in _OF_THE_MACHINE},
        stages={name: _through_json(entry(record)) for name, record in done.items()},
        artifacts=_artifacts(done, context, hasher),
        notes={
            context.run.relative(path): files_in(path, hasher)[""] for path in (context.run.metrics,) if path.is_file()
        },
    )


def _versions(done: Iterable[Record]) -> dict[str, str]:
    """Every version; where stages ran with several ones, all of them."""
    found: dict[str, dict[str, None]] = {}
    for record in done:
        all_of_it = {
            **{name: record.machine[name] for name in _OF_THE_MACHINE if name in record.machine},
            **({"llama.cpp": str(record.facts["toolchain"])} if "toolchain" in record.facts else {}),
            **record.versions,
        }
        for name, version in all_of_it.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _artifacts(done: dict[str, Record], context: Context, hasher: Hasher) -> dict[str, dict[str, Any]]:
    """The results, file by file. What the old manifest lists for the same hash is not read again."""
    before = _before(context.run.manifest)
    known = before.artifacts if before else {}
    found = {}
    for stage, record in done.items():
        for name, output in record.outputs.items():
            same = name in known and known[name]["sha256"] == output["sha256"]
            path = context.run.root / name
            files = known[name]["files"] if same else files_in(path, hasher) if path.exists() else {}  # it was cleaned
            found[name] = {"stage": stage, "size": output["size"], "sha256": output["sha256"], "files": files}
    return found


def _through_json(value: Any) -> Any:
    """The value as it comes back from the file, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))

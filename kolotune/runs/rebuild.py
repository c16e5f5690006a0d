"""Repeats a run from its manifest, and says whether the same came of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.base_models import catalog
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, DataError, ModelError, ModelNotFoundError
from kolotune.foundation.files import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.pipeline import run
from kolotune.run_folder import manifest as manifests
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import HELD_OUT, TRAINING, Manifest
from kolotune.stages import train
from kolotune.weights.adapter import is_adapter

_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Rebuilt:
    """What came of it.

    Attributes:
        folder: the new run folder.
        same, different: names of results whose hashes are the same, and those whose are not.
        circumstances: (what, then, now) of versions and machine that are not the same.
    """

    folder: RunFolder
    same: list[str]
    different: list[str]
    circumstances: list[tuple[str, str, str]]


def rebuild(path: Path, output_dir: Path, reporter: Reporter) -> Rebuilt:
    """Repeats the run that a manifest describes, with as many threads as it was trained with.

    Args:
        path: the manifest; data that is not where it was is looked for beside it.
        output_dir: the new run folder.
        reporter: told what is being done.

    Raises:
        ManifestError: it is no manifest.
        DataError, ModelError, ArtifactError: data, base or what was exported is not here, or is another.
        KolotuneError: what any run may raise.
    """
    manifest = manifests.read(path)
    hasher = Hasher()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir}: is not empty", "Name a folder that does not exist; nothing is overwritten.")
    config = _config(manifest, path, output_dir, hasher)
    source = _source(manifest, hasher)
    names = [name for name in run.NAMES if name in manifest.stages]
    _repeat_halvings(manifest, RunFolder(output_dir))
    with _threads(manifest):
        folder = run.run(config, reporter, names, source)
    made = manifests.read(folder.manifest)
    results = {name: artifact["sha256"] for name, artifact in made.artifacts.items()}
    same = [name for name, artifact in manifest.artifacts.items() if results.get(name) == artifact["sha256"]]
    different = sorted({*manifest.artifacts, *results} - {*same})
    return Rebuilt(folder, same, different, _circumstances(manifest, made))


def _config(manifest: Manifest, path: Path, output_dir: Path, hasher: Hasher) -> Config:
    _require_base(manifest, hasher)
    data = [(each["part"], _data_file(each, path, hasher)) for each in manifest.data["files"]]
    values = {
        **manifest.config,
        "output_dir": str(output_dir),
        "train_data": [file for part, file in data if part == TRAINING],
        "eval_data": [file for part, file in data if part == HELD_OUT],
    }
    if run.COMPARE not in manifest.stages:  # it was left out, or failed
        values["compare"] = False
    return configs.resolve((values, str(path), path.parent))


def _data_file(wanted: dict[str, Any], manifest: Path, hasher: Hasher) -> Path:
    places = [Path(wanted["path"]), manifest.absolute().parent / Path(wanted["path"]).name]
    there = [place for place in places if place.is_file()]
    for place in there:
        if hasher.of(place) == wanted["sha256"]:
            return place
    if there:
        raise DataError(
            f"{there[0]}: is not the file that was used (sha256 {hasher.of(there[0])}, not {wanted['sha256']})",
            "Bring the file as it was; a run with other chats is another run.",
        )
    raise DataError(f"{places[0]}: the {wanted['part']} data is not here", f"Put it there, or beside {manifest.name}.")


def _require_base(manifest: Manifest, hasher: Hasher) -> None:
    name = manifest.base["name"]
    base = catalog.locate(name)
    if base is None:
        raise ModelNotFoundError(
            f"{name}: the base model is not on this machine", "Bring it here; `kolotune models` shows what is."
        )
    if manifest.base["sha256"] and hasher.of(base) != manifest.base["sha256"]:
        raise ModelError(
            f"{name}: is not the base model that was used (sha256 {hasher.of(base)}, not {manifest.base['sha256']})",
            "Bring the version that was used.",
        )


def _source(manifest: Manifest, hasher: Hasher) -> Path | None:
    if manifest.source is None:
        return None
    path = Path(manifest.source["path"])
    if not path.exists() or hasher.of(path) != manifest.source["sha256"]:
        kind = "adapter" if path.exists() and is_adapter(path) else "model"
        raise ArtifactError(f"{path}: is not the {kind} that was exported", "Bring it as it was.")
    return path


def _repeat_halvings(manifest: Manifest, folder: RunFolder) -> None:
    """From the same steps on, as few chats are computed at once: sums come out with the same last bits."""
    halved = str(manifest.stages.get("train", {}).get("facts", {}).get("halved_from", ""))
    if halved:
        train.remember_halvings(folder, [int(each) for each in halved.split(",")])


@contextlib.contextmanager
def _threads(manifest: Manifest) -> Iterator[None]:
    """The same number of threads cuts sums into the same parts, also where there are more cores."""
    threads = manifest.stages.get("train", {}).get("facts", {}).get("threads")
    before = os.environ.get(_THREADS)
    if threads is None:
        yield
        return
    os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _circumstances(then: Manifest, now: Manifest) -> list[tuple[str, str, str]]:
    before, after = _around(then), _around(now)
    names = sorted({*before, *after})
    pairs = [(name, before.get(name, "-"), after.get(name, "-")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _around(manifest: Manifest) -> dict[str, str]:
    """Versions, machine, and what the training says of itself; but for the threads that a rebuild sets."""
    machine = {name: value for name, value in manifest.machine.items() if name != _THREADS}
    facts = manifest.stages.get("train", {}).get("facts", {})
    trained = {
        f"training {name}": str(facts[name])
        for name in ("device", "threads", "instructions", "kernels")
        if name in facts
    }
    return {**manifest.versions, **machine, **trained}

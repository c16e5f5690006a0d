"""`kolotune rebuild`: repeat a run from its manifest, and compare the results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models import lookup
from kolotune.base_models.new_tokens import new_tokens, with_new_tokens
from kolotune.foundation import config as configs
from kolotune.foundation.chat_paths import hub_source
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, DataError, ModelError, ModelNotFoundError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.gguf import writer_form
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import Manifest, read_manifest
from kolotune.run_folder.memory_backoff import write_memory_backoff
from kolotune.stages import compare, convert, prepare, train
from kolotune.weights.adapter_folder import is_adapter

_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Rebuilt:
    """A repeated run, and how it compares.

    Attributes:
        folder: the new run folder.
        same, different: names of results whose hashes are the same, and of those whose hashes differ. The comparison is
            in neither if an earlier version made it and it came out differently.
        changes: (what, then, now) of versions and machine that differ.
    """

    folder: RunFolder
    same: list[str]
    different: list[str]
    changes: list[tuple[str, str, str]]


def rebuild(path: Path, output_dir: Path, reporter: Reporter) -> Rebuilt:
    """Repeat the run that a manifest describes, with the number of threads that it was trained with.

    Args:
        path: the manifest; data that is not at its recorded path is searched beside it.
        output_dir: the new run folder.
        reporter: where progress is reported.

    Raises:
        ManifestError: the file is not a manifest.
        DataError, ModelError, ArtifactError: data, base or exported model is missing or differs.
        KolotuneError: what any run may raise.
    """
    manifest = read_manifest(path)
    hasher = Hasher()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir}: is not empty", "Name a folder that does not exist; nothing is overwritten.")
    config = _config_of(manifest, path, output_dir, hasher, reporter)
    source = _exported_model(manifest, hasher)
    _restore_batch_sizes(manifest, RunFolder(output_dir))
    with _recorded_environment(manifest):
        folder = run_pipeline(config, reporter, manifest.stages, source)
    repeated = read_manifest(folder.manifest)
    results = {name: artifact.sha256 for name, artifact in repeated.artifacts.items()}
    same = [name for name, artifact in manifest.artifacts.items() if results.get(name) == artifact.sha256]
    different = sorted({*manifest.artifacts, *results} - {*same} - set(_measured_otherwise(manifest, folder)))
    return Rebuilt(folder, same, different, _changes(manifest, repeated))


def _config_of(manifest: Manifest, path: Path, output_dir: Path, hasher: Hasher, reporter: Reporter) -> Config:
    _require_base(manifest, hasher, reporter)
    data = [
        (file.part, _find_file(Path(file.path), file.sha256, f"{file.part} data", path, hasher))
        for file in manifest.data.files
    ]
    values = {
        "target_parameters": ("none",),  # of versions that did not train experts
        **manifest.config,
        "output_dir": str(output_dir),
        "train_data": [file for part, file in data if part == "training"],
        "eval_data": [file for part, file in data if part == "held-out"],
    }
    if (template := manifest.config.get("chat_template")) is not None and prepare.NAME in manifest.stages:
        recorded = manifest.stages[prepare.NAME].inputs.get(prepare.TEMPLATE_INPUT, "")
        values["chat_template"] = _find_file(Path(str(template)), recorded, "chat template", path, hasher)
    if (start := manifest.config.get("start_from")) is not None and train.NAME in manifest.stages:
        recorded = manifest.stages[train.NAME].inputs.get(train.START_INPUT, "")
        _require_start(Path(str(start)), recorded, hasher)
    if compare.NAME not in manifest.stages:  # it was switched off, or failed
        values["compare"] = False
    return configs.resolve((values, str(path), path.parent))


def _find_file(recorded: Path, sha256: str, kind: str, manifest: Path, hasher: Hasher) -> Path:
    candidates = [recorded, manifest.absolute().parent / recorded.name]
    existing = [path for path in candidates if path.is_file()]
    for path in existing:
        if hasher.of(path) == sha256:
            return path
    if existing:
        raise DataError(
            f"{existing[0]}: is not the file that was used (sha256 {hasher.of(existing[0])}, not {sha256})",
            "Restore the original file. To train with another one, use `kolotune run`.",
        )
    source = hub_source(recorded)
    again = f" The hub has it: `kolotune check {source}` gets it again." if source else ""
    raise DataError(f"{candidates[0]}: the {kind} is missing", f"Put it there, or beside {manifest.name}.{again}")


def _require_start(adapter: Path, recorded: str, hasher: Hasher) -> None:
    if not adapter.exists() or hasher.of(adapter) != recorded:
        raise ArtifactError(f"{adapter}: is not the adapter that the training started from", "Restore the original.")


def _require_base(manifest: Manifest, hasher: Hasher, reporter: Reporter) -> None:
    name, recorded = manifest.base.name, manifest.base.sha256
    base = lookup.locate(name)
    if base is None:
        raise ModelNotFoundError(
            f"{name}: the base model is not on this machine",
            "`kolotune models` lists those that are; fetch this one with a run, or copy it here.",
        )
    added = [manifest.config.get(name) for name in ("new_token", "new_special_token")]
    plain, special = (list(map(str, texts)) if isinstance(texts, list) else [] for texts in added)
    base = with_new_tokens(base, new_tokens(plain, special), reporter)
    if recorded and hasher.of(base) != recorded:
        raise ModelError(
            f"{name}: is not the base model that was used (sha256 {hasher.of(base)}, not {recorded})",
            "Restore the version that was used.",
        )


def _exported_model(manifest: Manifest, hasher: Hasher) -> Path | None:
    if manifest.source is None:
        return None
    path = Path(manifest.source.path)
    if not path.exists() or hasher.of(path) != manifest.source.sha256:
        kind = "adapter" if path.exists() and is_adapter(path) else "model"
        raise ArtifactError(f"{path}: is not the {kind} that was exported", "Restore the original.")
    return path


def _restore_batch_sizes(manifest: Manifest, folder: RunFolder) -> None:
    """Halve the micro-batch from the same steps on, so that sums come out with the same last bits."""
    steps = str(manifest.facts_of(train.NAME).get("halved_from", ""))
    if steps:
        write_memory_backoff(folder, [int(step) for step in steps.split(",")])


@contextmanager
def _recorded_environment(manifest: Manifest) -> Iterator[None]:
    """Set what decides bytes and is no option.

    The number of threads decides how sums are split, also on a machine with more cores. Early versions left the
    unquantized GGUF in the converter's form, and recorded none.
    """
    values = {}
    if "threads" in manifest.facts_of(train.NAME):
        values[_THREADS] = str(manifest.facts_of(train.NAME)["threads"])
    if convert.NAME in manifest.stages:
        form = manifest.facts_of(convert.NAME).get(writer_form.FACT, writer_form.Form.CONVERTER)
        values[writer_form.SWITCH] = str(form)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measured_otherwise(manifest: Manifest, folder: RunFolder) -> Iterator[str]:
    """Yield the comparison if an earlier version made it, by less or other packages: its bytes can't be the same."""
    entry = manifest.stages.get(compare.NAME)
    if entry is not None and set(compare.packages()) != set(entry.versions):
        yield folder.relative(folder.comparison)


def _changes(then: Manifest, now: Manifest) -> list[tuple[str, str, str]]:
    before, after = _environment(then), _environment(now)
    names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    return [(name, before.get(name, "-"), after.get(name, "-")) for name in names]


def _environment(manifest: Manifest) -> dict[str, str]:
    """Return versions, machine and how it trained; without the thread setting that a rebuild makes itself."""
    machine = {name: value for name, value in manifest.machine.items() if name != _THREADS}
    facts = manifest.facts_of(train.NAME)
    names = [name for name in ("device", "threads", "instructions", "kernels") if name in facts]
    return {**manifest.versions, **machine, **{f"training {name}": str(facts[name]) for name in names}}

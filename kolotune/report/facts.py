"""What the report shows, gathered from the run folder: records, manifest, metrics, prepared chats, comparison."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models import catalog
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.typed_storage import JsonObject
from kolotune.gguf.budgets import read_mixtures
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import PATH_OPTIONS, Manifest, read_manifest
from kolotune.run_folder.marks import MarkState, read_mark
from kolotune.run_folder.records import read_record
from kolotune.stages import compare
from kolotune.stages.prepare import CHANGED_CHATS, CHANGED_DOCUMENTS, noun_of

from .change_kept import ChangeKept, changes_kept
from .prepared_chats import ChatLengths, read_lengths, read_sample_chat
from .size_curve import SizeCurve, size_curve
from .training_curve import TrainingCurve, read_curve

EN_DASH = "\N{EN DASH}"
"""Shown where there is no value."""
_NOT_SHOWN = frozenset({*PATH_OPTIONS, "compare"})


@dataclass(frozen=True)
class ReportFacts:
    """Everything in the report; None or empty where the run has no such thing.

    Attributes:
        title: the run folder's name.
        manifest: of the run.
        base: the base model's name on the hub, or its folder's name.
        curve: of the training.
        lengths: of the training and the held-out chats.
        left_out: (count, sentence) about chats that were left out or changed.
        bad: locations of bad chats, with what is wrong with them.
        findings: (count, kind) of warnings, such as near-duplicates.
        chat: (text, whether the loss counts it) of one training chat.
        options: (name, value, whether it is the default).
        comparison: the result of `kolotune compare`.
        survival: what is left of the adapter's change in each quantization; empty where that was not measured.
        sizes: what each size of the model costs, where a quantization has a budget.
        finished: when the last stage finished.
    """

    title: str
    manifest: Manifest
    base: str
    curve: TrainingCurve | None
    lengths: list[ChatLengths]
    left_out: list[tuple[int, str]]
    bad: list[str]
    findings: list[tuple[int, str]]
    chat: list[tuple[str, bool]]
    options: list[tuple[str, str, bool]]
    comparison: Comparison | None
    survival: list[ChangeKept]
    sizes: SizeCurve | None
    finished: str

    @property
    def train(self) -> JsonObject:
        """The facts that the training recorded."""
        return self.manifest.facts_of("train")

    @property
    def total_seconds(self) -> float:
        """The time of all stages."""
        times = [
            (datetime.datetime.fromisoformat(stage.started), datetime.datetime.fromisoformat(stage.finished))
            for stage in self.manifest.stages.values()
        ]
        return sum((end - start).total_seconds() for start, end in times)


def gather_facts(folder: RunFolder) -> ReportFacts:
    """Return the facts about a finished run.

    Raises:
        RunFolderError: it is not a run folder.
        ManifestError: it has no manifest, because its stages are not done or no longer belong together.
        ArtifactError: its metrics or its comparison can't be read.
    """
    manifest = read_manifest(folder.require().manifest)
    name = manifest.base.name
    prepared = read_record(folder, "prepare")
    comparison = _read_comparison(folder, manifest)
    facts = prepared.facts if prepared else {}
    findings = facts.get("findings")
    bad = facts.get("bad")
    return ReportFacts(
        title=folder.root.name,
        manifest=manifest,
        base=catalog.hub_id(name) or Path(name).name,
        curve=read_curve(folder.metrics) if "train" in manifest.stages else None,
        lengths=read_lengths(folder) if prepared else [],
        left_out=_left_out(facts),
        bad=[str(problem) for problem in bad] if isinstance(bad, list) else [],
        findings=[(int(count), str(kind)) for kind, count in findings.items() if count]
        if isinstance(findings, dict)
        else [],
        chat=read_sample_chat(folder) if prepared else [],
        options=_options(manifest.config),
        comparison=comparison,
        survival=changes_kept(comparison) if comparison else [],
        sizes=size_curve(read_mixtures(folder), comparison),
        finished=max(stage.finished for stage in manifest.stages.values()),
    )


def _read_comparison(folder: RunFolder, manifest: Manifest) -> Comparison | None:
    """Return the comparison of these results: it is in the manifest, or it failed after everything else was made."""
    mark = read_mark(folder, compare.NAME)
    finished = max(stage.finished for stage in manifest.stages.values())
    failed = mark is not None and mark.state is MarkState.FAILED and mark.time >= finished
    if folder.relative(folder.comparison) in manifest.artifacts or (failed and folder.comparison.is_file()):
        return Comparison.read(folder.comparison)
    return None


def _left_out(facts: JsonObject) -> list[tuple[int, str]]:
    sentences = [
        (count, sentence.format(**facts))
        for name, sentence in (CHANGED_CHATS if noun_of(facts) == "chat" else CHANGED_DOCUMENTS).items()
        if isinstance(count := facts.get(name), int) and count
    ]
    if isinstance(bad := facts.get("bad"), list) and bad:
        sentences.append((len(bad), f"bad {noun_of(facts)}s were left out"))
    return sentences


def _options(config: Mapping[str, object]) -> list[tuple[str, str, bool]]:
    options = []
    for name, option in configs.OPTIONS.items():
        if name in config and name not in _NOT_SHOWN:
            value = config[name]
            default = list(option.default) if isinstance(option.default, tuple) else option.default
            options.append((name.replace("_", "-"), _format_value(value), value == default))
    return options


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or EN_DASH

"""What the page says, gathered from the run folder: records, manifest, metrics, prepared tokens, comparison."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.base_models import catalog
from kolotune.chats.dataset.prepare import HELD_OUT_TOKENS, TRAIN
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import PATH_OPTIONS, Manifest, read_manifest
from kolotune.run_folder.marks import MarkState, read_mark
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.run_folder.records import read_record
from kolotune.stages import compare
from kolotune.stages.prepare import SAID

_SMOOTHED = 25  # a moving mean over at most a so many'th part of the steps
_POINTS = 3000  # more steps than that are thinned out for the pictures
_SHOWN_CHAT = 600  # tokens
NOTHING = "\N{EN DASH}"
_NOT_CHOICES = frozenset({*PATH_OPTIONS, "compare"})


@dataclass(frozen=True)
class Curve:
    """The training, step by step.

    Attributes:
        steps, losses, rates, speeds: of each step that is shown.
        held_out: (step, loss) of each evaluation.
        seconds: from the first to the last line.
        memory_mb: the most that was seen.
    """

    steps: list[int]
    losses: list[float]
    rates: list[float]
    speeds: list[float]
    held_out: list[tuple[int, float]]
    seconds: float
    memory_mb: int

    def smooth(self) -> list[float]:
        """The losses as a mean over the last steps."""
        window = max(1, len(self.losses) // _SMOOTHED)
        return [
            math.fsum(self.losses[max(0, at + 1 - window) : at + 1]) / min(window, at + 1)
            for at in range(len(self.losses))
        ]


@dataclass(frozen=True)
class Lengths:
    """Tokens, and tokens of answers, of each chat of a part; arrays of counts."""

    name: str
    tokens: Any
    answers: Any


@dataclass(frozen=True)
class Facts:
    """Everything on the page; None and empty where the run has no such thing.

    Attributes:
        title: the run folder's name.
        manifest: of the run.
        base: what the base model is called on the hub, or its folder's name.
        curve: of the training.
        lengths: of the training and the held-out chats.
        left_out: (count, sentence) of what was not taken as it was.
        bad: the places of bad chats, and what is wrong with them.
        findings: (count, kind) of what was warned of: near-duplicates and others.
        chat: (text, whether the loss counts it) of one chat as it was trained on.
        options: (option, value, whether it is the default).
        comparison: what `compare` found.
        finished: when the last stage was.
    """

    title: str
    manifest: Manifest
    base: str
    curve: Curve | None
    lengths: list[Lengths]
    left_out: list[tuple[int, str]]
    bad: list[str]
    findings: list[tuple[int, str]]
    chat: list[tuple[str, bool]]
    options: list[tuple[str, str, bool]]
    comparison: Comparison | None
    finished: str

    @property
    def train(self) -> JsonObject:
        """What the training said of itself."""
        return self.manifest.facts_of("train")

    @property
    def total_seconds(self) -> float:
        """How long the stages took together."""
        times = [
            (datetime.datetime.fromisoformat(each.started), datetime.datetime.fromisoformat(each.finished))
            for each in self.manifest.stages.values()
        ]
        return sum((end - start).total_seconds() for start, end in times)


def gather(folder: RunFolder) -> Facts:
    """The facts of a finished run.

    Raises:
        RunFolderError: it is no run folder.
        ManifestError: it has no manifest: its stages are not done, or no longer belong together.
        ArtifactError: its metrics or its comparison can't be read.
    """
    manifest = read_manifest(folder.require().manifest)
    name = manifest.base.name
    prepared = read_record(folder, "prepare")
    facts = prepared.facts if prepared else {}
    found = facts.get("findings")
    found = found if isinstance(found, dict) else {}
    return Facts(
        title=folder.root.name,
        manifest=manifest,
        base=catalog.hub_id(name) or Path(name).name,
        curve=_curve(folder.metrics) if "train" in manifest.stages else None,
        lengths=_lengths(folder) if prepared else [],
        left_out=_left_out(facts),
        bad=[str(each) for each in bad] if isinstance(bad := facts.get("bad"), list) else [],
        findings=[(int(count), str(kind)) for kind, count in found.items() if count],
        chat=_chat(folder) if prepared else [],
        options=_options(manifest),
        comparison=_comparison(folder, manifest),
        finished=max(each.finished for each in manifest.stages.values()),
    )


def _comparison(folder: RunFolder, manifest: Manifest) -> Comparison | None:
    """What was compared, when it was these results: a part of the manifest, or a failure that came after all of it."""
    mark = read_mark(folder, compare.NAME)
    made = max(each.finished for each in manifest.stages.values())
    failed = mark is not None and mark.state is MarkState.FAILED and mark.time >= made
    if folder.relative(folder.comparison) in manifest.artifacts or (failed and folder.comparison.is_file()):
        return Comparison.read(folder.comparison)
    return None


def _left_out(facts: dict[str, Any]) -> list[tuple[int, str]]:
    found = [(int(facts[name]), sentence.format(**facts)) for name, sentence in SAID.items() if facts.get(name)]
    if facts.get("bad"):
        found.append((len(facts["bad"]), "bad chats were left out"))
    return found


def _curve(metrics: Path) -> Curve | None:
    """The curve in the metrics; None when there is none: no step was made."""
    lines = read_metrics(metrics)
    steps = [line for line in lines if line.loss is not None]
    if not steps:
        return None
    thin = steps[:: max(1, len(steps) // _POINTS)]
    shown = thin if thin[-1] is steps[-1] else [*thin, steps[-1]]
    times = [line.time for line in lines if line.time is not None]
    return Curve(
        steps=[line.step for line in shown],
        losses=[line.loss for line in shown if line.loss is not None],
        rates=[line.learning_rate for line in shown],
        speeds=[line.tokens_per_second for line in shown],
        held_out=held_out_losses(lines),
        seconds=max(times) - min(times) if times else 0.0,
        memory_mb=int(max(line.memory_mb for line in steps)),
    )


def _lengths(folder: RunFolder) -> list[Lengths]:
    import numpy as np
    from safetensors import safe_open

    found = []
    for name, file in (("training", folder.prepared / TRAIN), ("held out", folder.prepared / HELD_OUT_TOKENS)):
        if file.is_file():
            with safe_open(file, framework="numpy") as tensors:
                offsets = tensors.get_tensor("offsets")
                if len(offsets) > 1:
                    answers = np.add.reduceat(tensors.get_tensor("labelled"), offsets[:-1], dtype=np.int64)
                    found.append(Lengths(name, np.diff(offsets), answers))
    return found


def _chat(folder: RunFolder) -> list[tuple[str, bool]]:
    """The first chat that is not too long, in parts of which the loss counts all or nothing."""
    import numpy as np
    from safetensors import safe_open
    from tokenizers import Tokenizer

    file, tokens = folder.tokenizer / "tokenizer.json", folder.prepared / TRAIN
    if not file.is_file() or not tokens.is_file():
        return []
    with safe_open(tokens, framework="numpy") as tensors:
        offsets = tensors.get_tensor("offsets")
        fitting = np.flatnonzero(np.diff(offsets) <= _SHOWN_CHAT)
        if not len(fitting):
            return []
        span = slice(int(offsets[fitting[0]]), int(offsets[fitting[0] + 1]))
        ids, flags = tensors.get_slice("ids")[span].tolist(), tensors.get_slice("labelled")[span].tolist()
    tokenizer = Tokenizer.from_file(str(file))
    parts: list[tuple[list[int], bool]] = []
    for token, flag in zip(ids, map(bool, flags), strict=True):
        if not parts or parts[-1][1] != flag:
            parts.append(([], flag))
        parts[-1][0].append(token)
    return [(tokenizer.decode(part, skip_special_tokens=False), flag) for part, flag in parts]


def _options(manifest: Manifest) -> list[tuple[str, str, bool]]:
    found = []
    for field in dataclasses.fields(configs.Config):
        if field.name in manifest.config and field.name not in _NOT_CHOICES:
            value = manifest.config[field.name]
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            found.append((field.name.replace("_", "-"), _in_words(value), value == default))
    return found


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown or NOTHING

"""What a comparison found, as it stands in `.kolotune/comparison.json`.

The names below are that file's schema: `Comparison.as_json` writes them, `Comparison.from_json` reads them, and a
change of meaning raises `VERSION`. Losses are mean negative log-likelihoods in nats over the answers' tokens;
divergences are KL(before || after) in nats, over the same positions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ArtifactError

VERSION = 1


@dataclass(frozen=True)
class Count:
    """How many of how many; ``of`` is 0 where there was nothing to count."""

    good: int
    of: int

    def __str__(self) -> str:
        return f"{self.good}/{self.of}" if self.of else "-"


@dataclass(frozen=True)
class StageCheck:
    """One thing on the road from the adapter to the answer, held against the one before it.

    Attributes:
        name: "adapter on base", "merged", "f16 GGUF", a quantization as "Q4_K_M", or "served Q4_K_M" ("served f16").
        stage: the stage that makes it: prepare, train, merge, convert, quantize or modelfile.
        file: relative to the run folder, with forward slashes; "" where there is no single one.
        size_bytes: of that file or folder; None for what has no weights of its own.
        against: `name` of what it is compared with; "" for the first.
        prompt_ids_equal: prompts whose token ids are those that were trained on.
        top1_agreement: share of answer positions, 0 to 1, at which both find the same token likeliest; None: not
            measured.
        kl_mean, kl_p99: mean and 99th percentile of the divergence at answer positions; None: not measured.
        loss: on the compared chats; None: not measured.
        stops: ends of answers at which the end token is the likeliest, of those where the reference finds so; for
            what is served: answers that end by themselves where the reference's do.
        bounds: bound of each figure that has one, as {"kl_mean": 0.0001}.
        failed: what is wrong, a sentence each; empty: nothing.
    """

    name: str
    stage: str
    file: str = ""
    size_bytes: int | None = None
    against: str = ""
    prompt_ids_equal: Count = Count(0, 0)
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    loss: float | None = None
    stops: Count = Count(0, 0)
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class ComparedAnswer:
    """One prompt, and what base and tuned model answer greedily; None where a model could not be asked.

    Attributes:
        prompt: the last thing the user says.
        expected: the answer in the held-out chat; None for a prompt of the user's own.
    """

    prompt: str
    base: str | None
    tuned: str | None
    expected: str | None = None


@dataclass(frozen=True)
class QuantizationFigures:
    """A quantization, measured on the run's own chats.

    Attributes:
        name: as "Q4_K_M".
        size_bytes: of the GGUF.
        loss, kl_mean, top1_agreement: as in `StageCheck`.
        importance_matrix: whether it was made with one.
        kept: whether the run has it; otherwise it was made to be measured, and removed.
    """

    name: str
    size_bytes: int
    loss: float
    kl_mean: float
    top1_agreement: float
    importance_matrix: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Failure:
    """The first stage that fails its bound.

    Attributes:
        stage: its name.
        what: what was seen, one sentence.
        likely_cause: one sentence.
    """

    stage: str
    what: str
    likely_cause: str


@dataclass(frozen=True)
class Comparison:
    """All that was found.

    Attributes:
        chats, positions: compared chats, and answer tokens in them.
        held_out: False when the run holds nothing out and training chats were taken.
        base_loss: of the base model; None: not measured.
        tuned_loss: of the adapter on its base.
        recorded_base_loss, recorded_tuned_loss: what training itself measured on all held-out chats; None: nothing.
        checked: in the order of the road.
        answers: base against tuned.
        not_kept: names of what would be compared but is not kept in the run folder (`--lean`).
        notes: what was left out or is otherwise than it may seem, a sentence each.
        quantizations: all that were measured, smallest first.
        recommended: name of one of `quantizations`; "" where there are not two to choose from.
        recommended_because: one sentence.
        failure: None when everything passed.
        version: of this schema.
    """

    chats: int
    positions: int
    held_out: bool
    base_loss: float | None
    tuned_loss: float | None
    recorded_base_loss: float | None
    recorded_tuned_loss: float | None
    checked: tuple[StageCheck, ...]
    answers: tuple[ComparedAnswer, ...] = ()
    not_kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantizations: tuple[QuantizationFigures, ...] = ()
    recommended: str = ""
    recommended_because: str = ""
    failure: Failure | None = None
    version: int = VERSION

    @property
    def passed(self) -> bool:
        return self.failure is None

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain values; each `StageCheck` also says whether it ``passed``."""
        found = dataclasses.asdict(self)
        for plain, each in zip(found["checked"], self.checked, strict=True):
            plain["passed"] = each.passed
        found["passed"] = self.passed
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """The comparison that `as_json` gave.

        Raises:
            KeyError, TypeError: it is none.
        """
        given = {name: each for name, each in value.items() if name != "passed"}
        given["checked"] = tuple(_checked(each) for each in given["checked"])
        given["answers"] = tuple(ComparedAnswer(**each) for each in given["answers"])
        given["quantizations"] = tuple(QuantizationFigures(**each) for each in given["quantizations"])
        given["failure"] = None if given["failure"] is None else Failure(**given["failure"])
        for name in ("not_kept", "notes"):
            given[name] = tuple(given[name])
        return cls(**given)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """The comparison in a file that the compare stage wrote.

        Raises:
            ArtifactError: there is none, or none of this version.
        """
        try:
            found = cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f"{path}: is no comparison", "Run `kolotune compare` again.") from None
        if found.version != VERSION:
            raise ArtifactError(f"{path}: was made by another version", "Run `kolotune compare` again.")
        return found


def _checked(value: Mapping[str, Any]) -> StageCheck:
    given = {name: each for name, each in value.items() if name != "passed"}
    for name in ("prompt_ids_equal", "stops"):
        given[name] = Count(**given[name])
    given["failed"] = tuple(given["failed"])
    return StageCheck(**given)

"""The result of a comparison, as `.kolotune/comparison.json` holds it.

The field names below are that file's schema; a change of meaning raises `VERSION`. Losses are mean negative
log-likelihoods in nats over the answers' tokens. Divergences are KL(before || after) in nats at the same positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.typed_storage import JsonObject

from .general_figures import GeneralFigures

VERSION = 1
_RENDERERS = {"jinja": "llama.cpp, from the GGUF's template", "template": "Ollama, from TEMPLATE"}


@dataclass(frozen=True)
class Count:
    """How many are good, of how many; ``of`` is 0 where there was nothing to count."""

    good: int
    of: int

    def __str__(self) -> str:
        return f"{self.good}/{self.of}" if self.of else "-"


@dataclass(frozen=True)
class MatrixSurvival:
    """How much of the adapter's change is left in one matrix of a GGUF.

    Attributes:
        tensor: its name in the GGUF.
        type: of its blocks, such as "Q4_K".
        change_kept: projection of (what is in the file - the base) onto the adapter's change, weighed by the inputs of
            the compared chats: 1 is all of it, 0 is the base.
    """

    tensor: str
    type: str
    change_kept: float


@dataclass(frozen=True)
class StageCheck:
    """One artifact of the pipeline, compared with the one before it.

    Attributes:
        name: "adapter on base", "merged", "f16 GGUF" (or another type, as "f32 GGUF"), a quantization as "Q4_K_M", or
            "served Q4_K_M" ("served f16").
        stage: the stage that makes it: prepare, train, merge, convert, quantize or modelfile.
        file: relative to the run folder, with forward slashes; "" where there is no single one.
        size_bytes: size of that file or folder; None for an artifact without weights.
        against: `name` of the artifact it is compared with; "" for the first.
        prompt_ids_equal: prompts that get the token ids of training.
        top1_agreement: share of answer positions, 0 to 1, where both have the same most likely token; None: not
            measured.
        kl_mean, kl_p99: mean and 99th percentile of the divergence at answer positions; None: not measured.
        loss: on the compared chats; None: not measured.
        gain_kept: share of what training gained that is left, (loss of the base - loss) / (loss of the base - loss of
            the tuned model); None: not measured, or training gained nothing that stands out.
        gain_kept_error: its standard error over the chats; None: one chat.
        stops: ends of answers where the end token is the most likely one, of those where it is in the reference. For
            what is served: answers that end, of those that end in the reference.
        bounds: the bound of each figure that has one, as {"kl_mean": 0.0001}; `gain_kept` has to reach its own.
        failed: a sentence for each defect; empty when there is none.
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
    bounds: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: tuple[str, ...] = ()
    gain_kept: float | None = None
    gain_kept_error: float | None = None

    @property
    def passed(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class PathCheck:
    """How one way to write prompts writes those of a GGUF.

    Attributes:
        name: of the GGUF, as in `StageCheck`.
        path: "jinja" (the GGUF's own template, rendered by llama.cpp's server) or "template" (the Modelfile's TEMPLATE,
            rendered by Ollama).
        is_ollamas: the newest Ollama takes this path, unless its OLLAMA_GO_TEMPLATE says otherwise.
        prompt_ids_equal: prompts of the chats that get the token ids of training.
        traits: for each trait of chats what became of a short chat that has it: "equal", "different",
            "server-refuses", "training-refuses" or "both-refuse".
    """

    name: str
    path: str
    is_ollamas: bool
    prompt_ids_equal: Count
    traits: dict[str, str]

    @property
    def rendered_by(self) -> str:
        """What renders the prompts, for people."""
        return _RENDERERS[self.path]

    @property
    def traits_equal(self) -> Count:
        """Traits that are written as trained, of those that training accepts."""
        trained = [outcome for outcome in self.traits.values() if outcome not in ("training-refuses", "both-refuse")]
        return Count(trained.count("equal"), len(trained))


@dataclass(frozen=True)
class ComparedAnswer:
    """The most likely answers of base and tuned model to one prompt; None where a model gave none.

    Attributes:
        prompt: the user's last message.
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
        loss, kl_mean, top1_agreement, gain_kept, gain_kept_error: see `StageCheck`.
        importance_matrix: it was made with an importance matrix.
        kept: the run has it; otherwise it was made only to be measured, and deleted.
        matrices: how much of the adapter's change is left in each; () where that was not measured.
    """

    name: str
    size_bytes: int
    loss: float
    kl_mean: float
    top1_agreement: float
    importance_matrix: bool = False
    kept: bool = True
    gain_kept: float | None = None
    gain_kept_error: float | None = None
    matrices: tuple[MatrixSurvival, ...] = ()

    @property
    def change_kept(self) -> float | None:
        """The mean of its matrices; None where that was not measured."""
        kept = [matrix.change_kept for matrix in self.matrices]
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True)
class Failure:
    """The first stage that fails its check.

    Attributes:
        stage: its name.
        what: what was measured, one sentence.
        likely_cause: one sentence.
    """

    stage: str
    what: str
    likely_cause: str


@dataclass(frozen=True)
class Comparison:
    """All results of a comparison.

    Attributes:
        chats, positions: number of compared chats, and of answer tokens in them.
        held_out: False when training or sample chats were compared, because the run holds none out.
        base_loss, tuned_loss: of the base model, and of the adapter on it; None: not measured.
        recorded_base_loss, recorded_tuned_loss: measured by training on all held-out chats; None: not measured.
        checked: the checks, in the order of the pipeline.
        answers: answers of base and tuned model.
        not_kept: names of artifacts that could not be compared because the run folder no longer has them (`--lean`).
        notes: a sentence for each thing that was not compared.
        quantizations: all that were measured, smallest first.
        recommended: name of one of `quantizations`; "" where there are fewer than two.
        recommended_because: one sentence.
        failure: None when everything passed.
        paths: how each way to write prompts writes them; () in comparisons of earlier versions.
        version: of this schema.
        samples: sample chats were compared, since the model was trained elsewhere.
        general: what training took from the model on the general set; None: not measured.
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
    paths: tuple[PathCheck, ...] = ()
    version: int = VERSION
    samples: bool = False
    general: GeneralFigures | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None

    def with_type(self, gguf_type: str) -> Comparison:
        """Return the comparison with the unquantized GGUF named by its type: "f16", "bf16" or "f32"."""
        names = {"f16 GGUF": f"{gguf_type} GGUF", "served f16": f"served {gguf_type}"}
        replace = dataclasses.replace
        return replace(
            self,
            checked=tuple(
                replace(check, name=names.get(check.name, check.name), against=names.get(check.against, check.against))
                for check in self.checked
            ),
            not_kept=tuple(names.get(name, name) for name in self.not_kept),
            paths=tuple(replace(path, name=names.get(path.name, path.name)) for path in self.paths),
        )

    def write(self, path: Path) -> None:
        """Write the comparison to a file, including whether it and each check ``passed``."""
        checked = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checked]
        content: JsonObject = {**dataclasses.asdict(self), "checked": checked, "passed": self.passed}
        typed_storage.write(path, content)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Read the comparison in a file that `write` made.

        Raises:
            ArtifactError: the file is missing, is not a comparison, or has a different schema version.
        """
        try:
            comparison = typed_storage.read(cls, path)
        except (OSError, typed_storage.StorageError):
            raise ArtifactError(f"{path}: is not a comparison", "Run `kolotune compare` again.") from None
        if comparison.version != VERSION:
            raise ArtifactError(f"{path}: was made by another version", "Run `kolotune compare` again.")
        return comparison

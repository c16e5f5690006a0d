"""The only place that knows the names of files in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import RunFolderError

# Files in the folder of the prepared chats, which is also a job's data on another machine. `HELD_OUT_TOKENS` is
# missing when no chats are held out.
TRAIN_TOKENS, HELD_OUT_TOKENS, HELD_OUT_CHATS = "train.safetensors", "held_out.safetensors", "held_out.jsonl"
GENERAL_CHATS = "general.jsonl"
"""Chats that the base answered, which are mixed into the training; see `fidelity.general_chats`."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: results at its root, under names that users know; everything else below `.kolotune`."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything that is not a result."""
        return self.root / ".kolotune"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        """Data, base model, config, versions and the hashes of all results; see `manifest`."""
        return self.root / "manifest.json"

    @property
    def report(self) -> Path:
        """One page about the run."""
        return self.root / "report.html"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged_model(self) -> Path:
        return self.root / "merged_model"

    @property
    def gguf(self) -> Path:
        """The unquantized GGUF."""
        return self.root / "Merged.gguf"

    def quantized(self, name: str) -> Path:
        """The GGUF of quantization `name`."""
        return self.root / f"Merged{name}.gguf"

    def modelfile(self, quantization: str = "") -> Path:
        """The Modelfile of the unquantized GGUF, or of a quantization."""
        return self.root / f"Modelfile{quantization}"

    @property
    def importance_matrix(self) -> Path:
        """The importance matrix (imatrix), for quantizations of few bits."""
        return self.state / "importance_matrix.gguf"

    @property
    def tensor_types(self) -> Path:
        """The types that quantizations to a budget give to the tensors; see `gguf.budgets`."""
        return self.state / "tensor_types.json"

    @property
    def sensitivity(self) -> Path:
        """What each type does to each matrix, measured once; see `gguf.sensitivity`."""
        return self.state / "sensitivity.safetensors"

    @property
    def compensated_blocks(self) -> Path:
        """Matrices that an unfinished compensated quantization has finished; see `gguf.compensation_journal`."""
        return self.state / "compensated_blocks"

    @property
    def prepared(self) -> Path:
        """Token ids with loss mask, and the tokenizer with its frozen template."""
        return self.state / "prepared"

    @property
    def tokenizer(self) -> Path:
        return self.prepared / "tokenizer"

    @property
    def exported_tokenizer(self) -> Path:
        """The tokenizer of an adapter made elsewhere, for runs that keep no merged model."""
        return self.state / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def reference(self) -> Path:
        """What the model before a training of preferences says of the answers; see `engines.native.reference_logs`."""
        return self.state / "reference.safetensors"

    @property
    def job(self) -> Path:
        """The job of the training engine; see `engines.job`."""
        return self.state / "train_job.json"

    @property
    def tracked(self) -> Path:
        """The run in a tracker that shows the training, and what it has of it; see `tracking`."""
        return self.state / "tracked.json"

    @property
    def tracking_task(self) -> Path:
        """What the tracker's process was started with."""
        return self.state / "tracking_task.json"

    @property
    def memory_backoff(self) -> Path:
        """Steps at which the micro-batch was halved because memory ran out; see `memory_backoff`."""
        return self.state / "halvings.json"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def source(self) -> Path:
        """The adapter or merged model that is exported in place of an adapter of the run's own; see `source`."""
        return self.state / "source.json"

    @property
    def comparison(self) -> Path:
        """The result of `compare`; see `fidelity.comparison`."""
        return self.state / "comparison.json"

    @property
    def comparing(self) -> Path:
        """Temporary files of a comparison."""
        return self.state / "comparing"

    @property
    def choices(self) -> Path:
        """Options that were chosen automatically; see `pipeline.choices`."""
        return self.state / "choices.json"

    @property
    def lock_holder(self) -> Path:
        return self.state / "lock_holder.json"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def hash_cache(self) -> Path:
        return self.state / "hashes.json"

    @property
    def cleaned(self) -> Path:
        """Outputs that were removed to free space; see `cleaned`."""
        return self.state / "cleaned.json"

    @property
    def brought(self) -> Path:
        """What was copied out of a container, and its state then."""
        return self.state / "brought.json"

    @property
    def installed(self) -> Path:
        """The name under which the run was last put into Ollama."""
        return self.state / "installed.json"

    @property
    def launched(self) -> Path:
        """The job that `launch` submitted to a scheduler or to other machines."""
        return self.state / "launched.json"

    @property
    def launching(self) -> Path:
        """Files of Slurm: the job's script and its logs."""
        return self.state / "launching"

    @property
    def part(self) -> Path:
        """Which launched job this folder belongs to, so that a machine that comes back recognizes it."""
        return self.state / "part.json"

    def of_machine(self, number: int) -> RunFolder:
        """Return the run folder of machine `number` of several, which may share a disk: the first has this one."""
        return RunFolder(self.machines / str(number)) if number else self

    @property
    def machines(self) -> Path:
        return self.state / "machines"

    def record(self, stage: str) -> Path:
        return self.state / f"{stage}.json"

    def log(self, stage: str) -> Path:
        return self.logs / f"{stage}.log"

    def relative(self, path: Path) -> str:
        """Return `path` as records name it: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def require(self) -> RunFolder:
        """Return this folder if it is a run folder.

        Raises:
            RunFolderError: it does not exist or has no saved config.
        """
        if not self.config.is_file():
            reason = f"it has no {self.config.name}" if self.root.is_dir() else "it does not exist"
            raise RunFolderError(f"{self.root}: not a run folder ({reason})")
        return self

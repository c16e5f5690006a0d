"""The only place that knows the names of files in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import RunFolderError


@dataclass(frozen=True)
class RunFolder:
    """One run's folder: results at its root under the names users know, the rest below `.kolotune`."""

    root: Path

    @property
    def state(self) -> Path:
        """Where kolotune keeps what is not a result."""
        return self.root / ".kolotune"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        """Ties data, base, config, versions and the hashes of all that was made."""
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
        """How much each column of a weight matters, for quantizations of few bits."""
        return self.state / "importance_matrix.gguf"

    @property
    def prepared(self) -> Path:
        """Token ids, labels and the tokenizer with its frozen template."""
        return self.state / "prepared"

    @property
    def tokenizer(self) -> Path:
        return self.prepared / "tokenizer"

    @property
    def exported_tokenizer(self) -> Path:
        """The tokenizer of an adapter made elsewhere, when no merged folder has it."""
        return self.state / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def job(self) -> Path:
        """What the engine is asked to do."""
        return self.state / "train_job.json"

    @property
    def halvings(self) -> Path:
        """Steps from which on fewer chats are computed at once, because memory ran out."""
        return self.state / "halvings.json"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def source(self) -> Path:
        """Names what is exported in place of an adapter of the run's own."""
        return self.state / "source.json"

    @property
    def comparison(self) -> Path:
        """What `compare` found; see `fidelity.comparison`."""
        return self.state / "comparison.json"

    @property
    def comparing(self) -> Path:
        """What a comparison needs while it lasts."""
        return self.state / "comparing"

    @property
    def choices(self) -> Path:
        """What was chosen automatically, once."""
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
        """What was removed to free space, and is made again when it is needed."""
        return self.state / "cleaned.json"

    @property
    def brought(self) -> Path:
        """What was brought out of a container, and in which state it was."""
        return self.state / "brought.json"

    @property
    def installed(self) -> Path:
        """The name under which the run was last put into Ollama."""
        return self.state / "installed.json"

    @property
    def launched(self) -> Path:
        """The job that `launch` has handed to a scheduler or to other machines."""
        return self.state / "launched.json"

    @property
    def launching(self) -> Path:
        """What Slurm needs and writes: the job's script and its logs."""
        return self.state / "launching"

    @property
    def part(self) -> Path:
        """Of which launched job this folder is a part, so that a machine that comes back knows it."""
        return self.state / "part.json"

    def of_machine(self, number: int) -> RunFolder:
        """The run folder of one of several machines, which may share a disk: the first has this one."""
        return RunFolder(self.machines / str(number)) if number else self

    @property
    def machines(self) -> Path:
        return self.state / "machines"

    def record(self, stage: str) -> Path:
        return self.state / f"{stage}.json"

    def log(self, stage: str) -> Path:
        return self.logs / f"{stage}.log"

    def relative(self, path: Path) -> str:
        """`path` as it is written in records: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def require(self) -> RunFolder:
        """This folder, if it is a run folder.

        Raises:
            RunFolderError: it does not exist or holds no saved config.
        """
        if not self.config.is_file():
            why = f"there is no {self.config.name} in it" if self.root.is_dir() else "it does not exist"
            raise RunFolderError(f"{self.root}: is no run folder ({why})")
        return self

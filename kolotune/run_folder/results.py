"""The GGUFs that a run offers to chat, serve and Ollama: each proved to be the file that the run made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.quantization_types import NONE, canonical_name

from .cleaned import read_cleaned
from .layout import RunFolder
from .records import Record, read_record


@dataclass(frozen=True)
class Result:
    """One GGUF of a run.

    Attributes:
        quantization: its name, or `quantization_types.NONE`.
        gguf: the file.
        sha256: of its bytes, in hex.
        modelfile: the file that describes it to Ollama.
    """

    quantization: str
    gguf: Path
    sha256: str
    modelfile: Path


@dataclass(frozen=True)
class QuantizedFile:
    """One GGUF in the record of `quantize`.

    Attributes:
        source, sha256: SHA-256 of its source, and of itself.
        importance_matrix: that of its importance matrix; None: without one.
        calibration: that of the tokens by which its rounding errors were compensated; None: they were not.
        choice: that of what its types were chosen by; None: it is no quantization to a budget.
    """

    source: str
    sha256: str
    importance_matrix: str | None = None
    calibration: str | None = None
    choice: str | None = None


@dataclass(frozen=True)
class QuantizeFacts:
    """The facts in the record of `quantize` that others read.

    Attributes:
        made: the GGUFs by quantization.
        importance_matrix: what the importance matrix was made from, and its hash; empty without one.
    """

    made: dict[str, QuantizedFile] = field(default_factory=dict)
    importance_matrix: dict[str, str] = field(default_factory=dict)


def quantize_facts(record: Record | None) -> QuantizeFacts:
    """Return the facts in the record of `quantize`; none without a record."""
    return typed_storage.convert(QuantizeFacts, record.facts) if record else QuantizeFacts()


def saved_config(run: RunFolder) -> Config:
    """Return the options that a run was made with.

    Raises:
        RunFolderError: it is not a run folder.
        ConfigError: its saved config can't be read.
    """
    run.require()
    return configs.resolve((configs.load_file(run.config), str(run.config), run.root))


def choose_quantization(config: Config, requested: str | None) -> str:
    """Return the requested quantization, or the run's first; NONE where it has none."""
    if requested:
        return canonical_name(requested.partition(",")[0].strip())
    return config.quantization[0] if config.quantization else NONE


def open_result(run: RunFolder, requested: str | None) -> Result:
    """Find a GGUF of a run, and check that it is the one that the run made.

    Args:
        run: the run folder.
        requested: a quantization, "none" for the unquantized GGUF; None: the run's first.

    Raises:
        RunFolderError, ArtifactError: there is no such run or file, or the file is not what the run made.
    """
    name = choose_quantization(saved_config(run), requested)
    gguf, sha256 = verified_gguf(run, name)
    modelfile = run.modelfile("" if name == NONE else name)
    if not modelfile.is_file():
        raise ArtifactError(f"{modelfile}: there is no such Modelfile", "Run `kolotune run` first.")
    return Result(name, gguf, sha256, modelfile)


def verified_gguf(run: RunFolder, name: str) -> tuple[Path, str]:
    """Return the run's GGUF of quantization `name` and its SHA-256.

    Raises:
        ArtifactError: it is missing, or not the file that the run made.
    """
    path, stage = (run.gguf, "convert") if name == NONE else (run.quantized(name), "quantize")
    record = read_record(run, stage)
    if run.relative(path) in read_cleaned(run):
        raise ArtifactError(f"{path}: was cleaned", f"`kolotune {stage} {run.root}` makes it again.")
    if not path.is_file() or record is None:
        existing = ", ".join(sorted(each.name for each in run.root.glob("*.gguf"))) or "none"
        raise ArtifactError(
            f"{path}: this run has no such GGUF (it has: {existing})", "Make it with `kolotune run`, or choose another."
        )
    made = quantize_facts(record).made.get(name) or record.outputs.get(path.name)
    sha256 = Hasher(run.hash_cache).of(path)
    if made is None or made.sha256 != sha256:
        raise ArtifactError(f"{path}: is not the file that the run made")
    return path, sha256

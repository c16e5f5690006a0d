"""What a run offers to those that use it: a GGUF that is the one it made, and the Modelfile beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.files import Hasher
from kolotune.foundation.quantization_types import NONE

from . import records
from .layout import RunFolder


@dataclass(frozen=True)
class Result:
    """One GGUF of a run.

    Attributes:
        quantization: its name, or `quantizations.NONE`.
        gguf: the file.
        sha256: of its bytes, in hex.
        modelfile: the file that describes it to Ollama.
    """

    quantization: str
    gguf: Path
    sha256: str
    modelfile: Path


def saved_config(run: RunFolder) -> Config:
    """The options that a run was made with.

    Raises:
        RunFolderError: it is no run folder.
    """
    run.require()
    return configs.resolve((configs.load_file(run.config), str(run.config), run.root))


def chosen_quantization(config: Config, wanted: str | None) -> str:
    """The quantization that is meant: the wanted one, else the run's first; NONE where it has none."""
    if wanted:
        return str(configs.normalized("quantization", wanted, Path())[0])
    return config.quantization[0] if config.quantization else NONE


def open_result(run: RunFolder, wanted: str | None) -> Result:
    """The wanted GGUF of a run, if it is the one that the run made.

    Args:
        run: the run folder.
        wanted: a quantization, "none" for the unquantized; None: the run's first.

    Raises:
        RunFolderError, ArtifactError: there is no such run or no such file, or it isn't what was made.
    """
    name = chosen_quantization(saved_config(run), wanted)
    gguf, sha256 = own_gguf(run, name)
    modelfile = run.modelfile("" if name == NONE else name)
    if not modelfile.is_file():
        raise ArtifactError(f"{modelfile}: there is no such Modelfile", "Run `kolotune run` first.")
    return Result(name, gguf, sha256, modelfile)


def own_gguf(run: RunFolder, name: str) -> tuple[Path, str]:
    """The run's GGUF of quantization `name` and its SHA-256, if it is the one that the run made.

    Raises:
        ArtifactError: it is missing or another.
    """
    path, stage = (run.gguf, "convert") if name == NONE else (run.quantized(name), "quantize")
    record = records.read(run, stage)
    if run.relative(path) in records.cleaned(run):
        raise ArtifactError(f"{path}: was cleaned", f"`kolotune {stage} {run.root}` makes it again.")
    if not path.is_file() or record is None:
        there = ", ".join(sorted(each.name for each in run.root.glob("*.gguf"))) or "none"
        raise ArtifactError(
            f"{path}: there is no such GGUF in this run (there is: {there})", "Run `kolotune run` first."
        )
    facts = record.facts.get("made", {}).get(name) or record.outputs.get(path.name) or {}
    sha256 = Hasher(run.hash_cache).of(path)
    if facts.get("sha256") != sha256:
        raise ArtifactError(f"{path}: is not the file that the run made")
    return path, sha256

"""The importance matrix that a run's quantizations are made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.quantization_types import is_made_with_matrix
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import TRAIN_TOKENS
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local

QUANTIZE = "quantize"
"""The stage whose record holds the facts of the run's matrix."""


def with_matrix(context: Context, names: Iterable[str]) -> list[str]:
    """Return those quantizations that are made with a matrix; none when there are no training chats."""
    if context.source is not None:
        return []
    return [name for name in names if is_made_with_matrix(name, context.config.importance_matrix)]


def make_matrix(
    source: Path, prepared: Path, target: Path, log: Path, reporter: Reporter, hasher: Hasher | None = None
) -> None:
    """Let an unquantized GGUF read prepared training chats, and write the matrix of its inputs.

    Raises:
        ArtifactError: the chats are missing, or can't be computed.
    """
    tokens = prepared / TRAIN_TOKENS
    if not tokens.is_file():
        raise ArtifactError(
            f"{tokens}: is missing; an importance matrix is computed from the training chats",
            "Run `kolotune prepare` again, or choose a quantization that needs no matrix.",
        )
    reporter.doing("importance matrix: the model reads training chats")
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = hasher or Hasher()
    with hasher.replacing(target) as partial:
        arguments = (str(source), str(tokens), str(partial))
        module = "kolotune.gguf.matrix_computation"
        code = child_process.run(module, *arguments, log=log, otherwise=ArtifactError)
        if code != 0 or not partial.is_file():
            raise ArtifactError(f"the importance matrix failed: {local.last_lines(log)}", f"The log is {log}.")
        hasher.flush(partial)


def find_matrix(
    context: Context, source: Path, target: Path, log: Path, reporter: Reporter, names: Sequence[str]
) -> Path | None:
    """Return a matrix for these quantizations of a GGUF: the run's if it fits GGUF and chats, or a new one at `target`.

    Returns:
        None when `names` is empty.

    Raises:
        ArtifactError: as `make_matrix`.
    """
    if not names:
        return None
    record = read_record(context.run, QUANTIZE)
    matrix, hasher = context.run.importance_matrix, context.hasher
    known = record.facts.get("importance_matrix") if record else None
    if matrix.is_file() and known == matrix_facts(context, source, hasher.of(matrix)):
        return matrix
    make_matrix(source, context.run.prepared, target, log, reporter, hasher)
    return target


def matrix_facts(context: Context, source: Path, digest: str) -> dict[str, str]:
    """Return what a record says of a matrix: hashes of its GGUF and chats, and its own."""
    return {"source": context.hasher.of(source), "chats": context.hasher.of(context.run.prepared), "sha256": digest}

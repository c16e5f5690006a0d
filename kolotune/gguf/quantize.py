"""Quantizing a GGUF, with an importance matrix from the training chats where the quantization is made with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kolotune import llamacpp
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.foundation.files import hash_and_flush, replacing
from kolotune.foundation.quantization_types import FILE_TYPES, WHOLE_BLOCKS_ONLY, made_with_matrix
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import TRAIN_TOKENS
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.weights.tensors import weight_files

from . import header

QUANTIZE = "quantize"
"""The stage whose record knows the run's matrix."""


def with_matrix(context: Context, names: Iterable[str]) -> list[str]:
    """Those of the quantizations that are made with an importance matrix; none where there are no chats for one."""
    if context.source is not None:
        return []
    return [name for name in names if made_with_matrix(name, context.config.importance_matrix)]


def make_matrix(source: Path, prepared: Path, target: Path, log: Path, reporter: Reporter) -> None:
    """Has an unquantized GGUF read prepared training chats, and writes what its weights were given.

    Raises:
        ArtifactError: the chats are not there, or can't be computed.
    """
    tokens = prepared / TRAIN_TOKENS
    if not tokens.is_file():
        raise ArtifactError(
            f"{tokens}: an importance matrix is computed from the training chats, and they are not there",
            "Run `kolotune prepare` again, or choose a quantization that needs none.",
        )
    reporter.doing("importance matrix: the model reads training chats")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        argv = local.python("kolotune.gguf.importance_matrix", str(source), str(tokens), str(partial))
        if local.run(argv, log=log, ends_with_parent=True) != 0 or not partial.is_file():
            raise ArtifactError(f"the importance matrix failed: {local.last_lines(log)}", f"The log is {log}.")
        hash_and_flush(partial)


def matrix_for(
    context: Context, source: Path, target: Path, log: Path, reporter: Reporter, names: Sequence[str]
) -> Path | None:
    """A matrix for those quantizations of a GGUF: the run's, if it is of this one and these chats, or one at `target`.

    Returns:
        None where `names` is empty.

    Raises:
        ArtifactError: as `make_matrix`.
    """
    if not names:
        return None
    record = read_record(context.run, QUANTIZE)
    kept, hasher = context.run.importance_matrix, context.hasher
    if kept.is_file() and record and record.facts.get("importance_matrix") == made_of(context, source, hasher.of(kept)):
        return kept
    make_matrix(source, context.run.prepared, target, log, reporter)
    return target


def made_of(context: Context, source: Path, digest: str) -> dict[str, str]:
    """What a record says of a matrix: hashes of the GGUF and the chats that it comes of, and its own."""
    return {"source": context.hasher.of(source), "chats": context.hasher.of(context.run.prepared), "sha256": digest}


def check_blocks(model: Path, names: Iterable[str]) -> None:
    """Whether the rows of a model fit the quantizations that need whole blocks.

    Raises:
        ConfigError: they do not.
    """
    for name in names:
        block = WHOLE_BLOCKS_ONLY.get(name, 1)
        unfit = [f"{each} has {row}" for each, row in _rows(model) if row % block]
        if unfit:
            raise ConfigError(
                f"quantization {name}: needs rows of a multiple of {block} weights, and {unfit[0]} in this model",
                "Choose another; Q2_K is the smallest that fits every model.",
            )


def _rows(model: Path) -> Iterator[tuple[str, int]]:
    """The names of a model folder's matrices and the length of their rows."""
    from safetensors import safe_open

    for path in weight_files(model):
        with safe_open(path, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 - no mapping
                shape = handle.get_slice(name).get_shape()
                if len(shape) > 1:
                    yield name, shape[-1]


def quantize_file(
    source: Path, target: Path, name: str, log: Path, reporter: Reporter, matrix: Path | None = None
) -> None:
    """Quantizes one GGUF and reads the result back before it gets its name.

    Args:
        source: an unquantized GGUF.
        target: the GGUF to make.
        name: of the quantization.
        log: where the quantizer's output goes.
        reporter: told what is being done.
        matrix: the importance matrix; None: without one.

    Raises:
        ToolchainError: the quantizer failed.
        ArtifactError: what it wrote is not whole or has other tensors.
    """
    toolchain = llamacpp.ensure(reporter)
    with replacing(target) as partial:
        files = [str(source.absolute()), str(partial.absolute())]
        given = [] if matrix is None else [str(matrix.absolute())]
        if toolchain.quantizer is not None:
            code = local.run(
                [str(toolchain.quantizer), *(("--imatrix", *given) if given else ()), *files, name], log=log
            )
        else:
            argv = local.python("kolotune.gguf.quantizer", *files, name, *given)
            code = local.run(argv, log=log, ends_with_parent=True)
        if code != 0 or not partial.is_file():
            raise ToolchainError(f"quantizing to {name} failed: {local.last_lines(log)}", f"The log is {log}.")
        summary = header.read(partial)
        original = header.read(source)
        if {key: value[0] for key, value in summary.tensors.items()} != {
            key: value[0] for key, value in original.tensors.items()
        }:
            raise ArtifactError(f"{target}: its tensors are not those of {source.name}")
        if int(summary.fields.get("general.file_type", -1)) != FILE_TYPES[name]:
            raise ArtifactError(f"{target}: is not of type {name}")
        hash_and_flush(partial)

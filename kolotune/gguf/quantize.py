"""Quantize a GGUF."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kolotune import llamacpp
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.quantization_types import FILE_TYPES, WHOLE_BLOCKS_ONLY
from kolotune.foundation.reporter import Reporter
from kolotune.runners import child_process, local
from kolotune.weights.safetensors_header import read_header
from kolotune.weights.weight_files import weight_files

from . import header
from .run_compensation import Compensation


def check_blocks(model: Path, names: Iterable[str]) -> None:
    """Check that a model's matrices have whole blocks, for the quantizations that need them.

    Raises:
        ConfigError: a matrix does not.
    """
    blocks = {name: WHOLE_BLOCKS_ONLY[name] for name in names if name in WHOLE_BLOCKS_ONLY}
    files = weight_files(model) if blocks else []
    entries = [entry for path in files for entry in read_header(path).entries if len(entry.shape) > 1]
    for name, block in blocks.items():
        unfit = next((entry for entry in entries if entry.shape[-1] % block), None)
        if unfit is not None:
            raise ConfigError(
                f"quantization {name}: needs a multiple of {block} columns, and {unfit.name} has {unfit.shape[-1]}",
                "Choose another quantization; Q2_K is the smallest that fits every model.",
            )


def quantize_file(
    source: Path,
    target: Path,
    name: str,
    log: Path,
    reporter: Reporter,
    matrix: Path | None = None,
    hasher: Hasher | None = None,
    compensation: Compensation | None = None,
) -> None:
    """Quantize one GGUF, and check the result before it gets its name.

    Args:
        source: an unquantized GGUF.
        target: the GGUF to write.
        name: of the quantization.
        log: receives the quantizer's output.
        reporter: shows progress.
        matrix: the importance matrix; None: without one.
        hasher: learns the hash of the GGUF.
        compensation: fills the blocks again, with error feedback; None: they stay as ggml makes them.

    Raises:
        ToolchainError: the quantizer failed.
        ArtifactError: the result is not whole or has other tensors.
    """
    toolchain, hasher = llamacpp.ensure(reporter), hasher or Hasher()
    with hasher.replacing(target) as partial:
        digests: list[str] = []
        files = [str(source.absolute()), str(partial.absolute())]
        matrix_file = [] if matrix is None else [str(matrix.absolute())]
        if toolchain.quantizer is not None:
            options = ["--imatrix", *matrix_file] if matrix_file else []
            code = local.run([str(toolchain.quantizer), *options, *files, name], log=log)
        else:
            code = child_process.run(
                "kolotune.gguf.quantizer", *files, name, *matrix_file, log=log, otherwise=ToolchainError,
                on_event=lambda _, fields: digests.append(str(fields["sha256"])),
            )  # fmt: skip
        if code != 0 or not partial.is_file():
            raise ToolchainError(f"quantizing to {name} failed: {local.last_lines(log)}", f"The log is {log}.")
        summary = header.read(partial)
        shapes = {tensor: info.shape for tensor, info in summary.tensors.items()}
        if shapes != {tensor: info.shape for tensor, info in header.read(source).tensors.items()}:
            raise ArtifactError(f"{target}: its tensors are not those of {source.name}")
        if summary.integer("general.file_type", -1) != FILE_TYPES[name]:
            raise ArtifactError(f"{target}: not of type {name}")
        if compensation is not None:
            compensation.apply(source, partial, log, reporter)
        if digests and compensation is None:
            hasher.note(partial, digests[-1])
        else:
            hasher.flush(partial)

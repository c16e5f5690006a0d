"""Quantize a GGUF."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from kolotune import llamacpp
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.quantization_types import FILE_TYPES, WHOLE_BLOCKS_ONLY
from kolotune.foundation.reporter import Reporter
from kolotune.runners import child_process, local
from kolotune.weights.safetensors_header import read_header
from kolotune.weights.weight_files import weight_files

from . import header, type_choices
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
    types: Mapping[str, str] | None = None,
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
        types: of the tensors, for a quantization to a budget; None: those that llama.cpp gives them.

    Raises:
        ToolchainError: the quantizer failed.
        ArtifactError: the result is not whole or has other tensors.
    """
    toolchain, hasher = llamacpp.ensure(reporter), hasher or Hasher()
    file_type = name if types is None else type_choices.file_type(types, header.read(source))
    with hasher.replacing(target) as partial:
        digests: list[str] = []
        files = [str(source.absolute()), str(partial.absolute())]
        matrix_file = [] if matrix is None else [str(matrix.absolute())]
        if toolchain.quantizer is not None and types is None:
            options = ["--imatrix", *matrix_file] if matrix_file else []
            code = local.run([str(toolchain.quantizer), *options, *files, file_type], log=log)
        else:
            code = _run_quantizer([*files, file_type, *matrix_file], types, log, digests)
        if code != 0 or not partial.is_file():
            raise ToolchainError(f"quantizing to {name} failed: {local.last_lines(log)}", f"The log is {log}.")
        summary = header.read(partial)
        shapes = {tensor: info.shape for tensor, info in summary.tensors.items()}
        if shapes != {tensor: info.shape for tensor, info in header.read(source).tensors.items()}:
            raise ArtifactError(f"{target}: its tensors are not those of {source.name}")
        if summary.integer("general.file_type", -1) != FILE_TYPES[file_type]:
            raise ArtifactError(f"{target}: not of type {name}")
        if compensation is not None:
            compensation.apply(source, partial, log, reporter)
        if digests and compensation is None:
            hasher.note(partial, digests[-1])
        else:
            hasher.flush(partial)


def _run_quantizer(arguments: list[str], types: Mapping[str, str] | None, log: Path, digests: list[str]) -> int:
    """Quantize in a process of its own; return its exit code, and add the hash of what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        if types is not None:
            file = Path(folder, "types.json")
            typed_storage.write(file, dict(types))
            arguments = [*arguments, "--types", str(file)]
        return child_process.run(
            "kolotune.gguf.quantizer", *arguments, log=log, otherwise=ToolchainError,
            on_event=lambda _, fields: digests.append(str(fields["sha256"])),
        )  # fmt: skip

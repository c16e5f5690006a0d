"""quantize: unquantized GGUF → one GGUF for each quantization.

Of a lean run the unquantized GGUF is made here too, from base and adapter, and goes when all quantizations are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import exporting, llamacpp, records
from ..config import Config, as_record
from ..errors import ArtifactError, ConfigError, ToolchainError
from ..files import hash_and_flush, remove, replacing
from ..lean import kept
from ..llamacpp import gguf_file
from ..quantizations import FILE_TYPES, WHOLE_BLOCKS_ONLY
from ..records import Context
from ..reporter import Reporter
from ..runners import local
from ..weights import weight_files

NAME = "quantize"
DOING = "quantizing"


def options(config: Config) -> dict[str, Any]:
    """See `records.Stage`."""
    return as_record(config, ("quantization",) if kept(config).unquantized else ("quantization", "lean", "merge_dtype"))


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    if kept(context.config).unquantized:
        return {"the unquantized GGUF": context.run.gguf}
    return exporting.inputs_of(context)


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    made = [context.run.quantized(name) for name in kept(context.config).quantized]
    return made if kept(context.config).unquantized else [*made, *exporting.small_outputs(context)]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("llama-cpp-python",)


def preflight(context: Context, reporter: Reporter) -> None:
    """The library must be there, and the model's rows fit the quantizations; names were checked with the config.

    Raises:
        ConfigError: a quantization needs whole blocks, and this model's rows are none.
    """
    wanted = kept(context.config).quantized
    if wanted:
        llamacpp.ensure(reporter)
    if not kept(context.config).unquantized:
        exporting.prove_expected(context, reporter)
    for name in wanted:
        block = WHOLE_BLOCKS_ONLY.get(name, 1)
        unfit = [f"{each} has {row}" for each, row in _rows(context.base) if row % block]
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


def run(context: Context, reporter: Reporter) -> dict[str, Any]:
    """Makes what is missing. What an earlier run made of the same GGUF is kept; of another GGUF, removed.

    Raises:
        ToolchainError: the quantizer failed.
        ArtifactError: what it wrote is not whole.
    """
    folder, wanted, hasher = context.run, kept(context.config).quantized, context.hasher
    before = records.read(folder, NAME)
    made: dict[str, dict[str, str]] = dict(before.facts.get("made", {})) if before else {}
    with _unquantized(context, reporter) as facts:
        source = hasher.of(folder.gguf)
        for name, fact in list(made.items()):
            path = folder.quantized(name)
            if fact["source"] != source or hasher.of(path) != fact["sha256"]:
                if path.exists() and name not in wanted:
                    reporter.note(f"{path.name} was made of another training and is removed")
                remove(path)
                remove(folder.modelfile(name))
                del made[name]
        for name in wanted:
            if name not in made:
                reporter.doing(f"quantizing to {name}")
                quantize_file(folder.gguf, folder.quantized(name), name, folder.log(NAME), reporter)
                made[name] = {"source": source, "sha256": hasher.of(folder.quantized(name))}
    return {"made": made, **facts}


@contextmanager
def _unquantized(context: Context, reporter: Reporter) -> Iterator[dict[str, Any]]:
    """The unquantized GGUF as long as the block lasts, and what is known of it when it is not kept."""
    gguf = context.run.gguf
    if kept(context.config).unquantized:
        if not gguf.is_file():
            raise ArtifactError(f"{gguf}: there is no GGUF to quantize", "Run `kolotune convert` first.")
        yield {}
        return
    reporter.doing("converting to GGUF, for as long as it is quantized")
    facts = exporting.make_gguf(context, gguf, context.run.log(NAME), reporter)
    try:
        yield {"unquantized": {**facts, "sha256": context.hasher.of(gguf)}}
    finally:
        remove(gguf)


def quantize_file(source: Path, target: Path, name: str, log: Path, reporter: Reporter) -> None:
    """Quantizes one GGUF and reads the result back before it gets its name.

    Raises:
        ToolchainError: the quantizer failed.
        ArtifactError: what it wrote is not whole or has other tensors.
    """
    toolchain = llamacpp.ensure(reporter)
    with replacing(target) as partial:
        files = [str(source.absolute()), str(partial.absolute())]
        if toolchain.quantizer is not None:
            code = local.run([str(toolchain.quantizer), *files, name], log=log)
        else:
            argv = local.python("kolotune.llamacpp.quantizer", *files, name)
            code = local.run(argv, log=log, ends_with_us=True)
        if code != 0 or not partial.is_file():
            raise ToolchainError(f"quantizing to {name} failed: {local.last_lines(log)}", f"The log is {log}.")
        summary = gguf_file.read(partial)
        original = gguf_file.read(source)
        if {key: value[0] for key, value in summary.tensors.items()} != {
            key: value[0] for key, value in original.tensors.items()
        }:
            raise ArtifactError(f"{target}: its tensors are not those of {source.name}")
        if int(summary.fields.get("general.file_type", -1)) != FILE_TYPES[name]:
            raise ArtifactError(f"{target}: is not of type {name}")
        hash_and_flush(partial)

"""quantize: unquantized GGUF → one GGUF for each quantization.

Of a lean run the unquantized GGUF is made here too, from base and adapter, and goes when all quantizations are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kolotune import llamacpp
from kolotune.foundation.config import Config, as_record
from kolotune.foundation.errors import ArtifactError, ConfigError
from kolotune.foundation.files import remove
from kolotune.foundation.quantization_types import NEEDS_IMPORTANCE_MATRIX, made_with_matrix
from kolotune.foundation.reporter import Reporter
from kolotune.gguf import convert, quantize
from kolotune.run_folder import records
from kolotune.run_folder.records import Context
from kolotune.run_folder.retention import kept

NAME = quantize.QUANTIZE
DOING = "quantizing"


def options(config: Config) -> dict[str, Any]:
    """See `records.Stage`; what the matrix is for is there when it is for anything."""
    names = ("quantization",) if kept(config).unquantized else ("quantization", "lean", "merge_dtype")
    weighted = [name for name in kept(config).quantized if made_with_matrix(name, config.importance_matrix)]
    return as_record(config, names) | ({"importance_matrix": weighted} if weighted else {})


def inputs(context: Context) -> dict[str, Path]:
    """See `records.Stage`."""
    whole = kept(context.config).unquantized
    found = {"the unquantized GGUF": context.run.gguf} if whole else convert.inputs_of(context)
    return found | ({"the prepared chats": context.run.prepared} if _weighted(context) else {})


def _weighted(context: Context) -> list[str]:
    return quantize.with_matrix(context, kept(context.config).quantized)


def outputs(context: Context) -> list[Path]:
    """See `records.Stage`."""
    made = [context.run.quantized(name) for name in kept(context.config).quantized]
    made += [context.run.importance_matrix] if _weighted(context) else []
    return made if kept(context.config).unquantized else [*made, *convert.small_outputs(context)]


def packages() -> Sequence[str]:
    """See `records.Stage`."""
    return ("llama-cpp-python",)


def preflight(context: Context, reporter: Reporter) -> None:
    """The library must be there, and the model's rows fit the quantizations; names were checked with the config.

    Raises:
        ConfigError: a quantization needs whole blocks, and this model's rows are none; or it needs an importance
            matrix, and what is exported was not trained here.
    """
    wanted = kept(context.config).quantized
    needy = [name for name in wanted if name in NEEDS_IMPORTANCE_MATRIX]
    if needy and needy[0] not in _weighted(context):
        raise ConfigError(
            f"quantization {needy[0]}: needs an importance matrix, which is computed from the training chats, and what "
            "is exported here was trained elsewhere",
            "Choose another; Q2_K and IQ3_S are next in size.",
        )
    if wanted:
        llamacpp.ensure(reporter)
    if not kept(context.config).unquantized:
        convert.prove_expected(context, reporter)
    quantize.check_blocks(context.base, wanted)


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
        matrix = _matrix(context, before.facts.get("importance_matrix", {}) if before else {}, reporter)
        weighted = {name: matrix["sha256"] for name in _weighted(context)}
        for name, fact in list(made.items()):
            path = folder.quantized(name)
            otherwise = name in wanted and fact.get("importance_matrix") != weighted.get(name)
            if otherwise or fact["source"] != source or hasher.of(path) != fact["sha256"]:
                if path.exists() and name not in wanted:
                    reporter.note(f"{path.name} was made of another training and is removed")
                remove(path)
                # Where the same comes of it again, its Modelfile stays.
                if otherwise or fact["source"] != source or name not in wanted:
                    remove(folder.modelfile(name))
                del made[name]
        for name in wanted:
            if name not in made:
                reporter.doing(f"quantizing to {name}")
                by = folder.importance_matrix if name in weighted else None
                quantize.quantize_file(folder.gguf, folder.quantized(name), name, folder.log(NAME), reporter, by)
                made[name] = {"source": source, "sha256": hasher.of(folder.quantized(name))}
                made[name] |= {"importance_matrix": weighted[name]} if name in weighted else {}
    return {"made": made, **({"importance_matrix": matrix} if matrix else {}), **facts}


def _matrix(context: Context, before: Mapping[str, str], reporter: Reporter) -> dict[str, str]:
    """What the importance matrix is made of, and its hash; that of an earlier run is kept when it still is that.

    Returns:
        Nothing where no quantization is made with one.
    """
    path, hasher = context.run.importance_matrix, context.hasher
    if not _weighted(context):
        remove(path)
        return {}
    log = context.run.log(NAME)
    if {**before} != quantize.made_of(context, context.run.gguf, hasher.of(path)):
        quantize.make_matrix(context.run.gguf, context.run.prepared, path, log, reporter)
    return quantize.made_of(context, context.run.gguf, hasher.of(path))


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
    facts = convert.make_gguf(context, gguf, context.run.log(NAME), reporter)
    try:
        yield {"unquantized": {**facts, "sha256": context.hasher.of(gguf)}}
    finally:
        remove(gguf)

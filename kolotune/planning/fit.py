"""What a run will take: steps, memory, disk; and what to change where it can't fit.

Shapes and headers tell it, no weight is read; llama.cpp itself says how large a quantization gets.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune import llamacpp
from kolotune.base_models import catalog
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.engines import estimates
from kolotune.engines.estimates import Adapter, Memory, ModelShape, Row, Written
from kolotune.engines.native import families
from kolotune.engines.training_length import TrainingLength, automatic_batch_size
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError, SpaceError
from kolotune.foundation.files import size_of, write_text
from kolotune.foundation.formatting import format_size
from kolotune.gguf import conversion_plan, convert
from kolotune.gguf.quantize import with_matrix
from kolotune.gguf.quantized_sizes import Sizes, sizes_in
from kolotune.llamacpp.evaluation import BATCH
from kolotune.run_folder.records import Context
from kolotune.run_folder.retention import kept
from kolotune.runners import local
from kolotune.stages import train

_SIZES = "quantized.jsonl"
_LOOKED_AT = 300  # steps of the first epoch that are looked at for the largest row
_SMALLEST_ROW = Row(tokens=8, chats=1, longest=8, prefix=0, labels=1, padded=False)
_METRICS_LINE = 200
_SHORTEST_WORTH = 256  # a shorter --max-seq-length is no advice
_LOWEST_RANK = 4


@dataclass(frozen=True)
class Work:
    """What is trained on.

    Attributes:
        chats, tokens, labelled: of the training part; held_out_tokens of the other.
        batch_size: chats of a batch.
        steps_in_epoch, steps: optimizer steps.
        warmup: steps in which the rate rises.
        largest: the row that takes most memory.
    """

    chats: int
    tokens: int
    labelled: int
    held_out_tokens: int
    batch_size: int
    steps_in_epoch: int
    steps: int
    warmup: int
    largest: Row


@dataclass(frozen=True)
class Exported:
    """Sizes of what is made of the adapter: the merged folder, the unquantized GGUF, each quantization.

    `told` says whether llama.cpp told the sizes; otherwise those of quantizations are upper bounds.
    """

    merged: int
    gguf: int
    quantized: dict[str, Sizes]
    told: bool


@dataclass(frozen=True)
class Needs:
    """What a run takes.

    Attributes:
        memory: of each stage, all processes together; None: it is not known, and `unknown` says why.
        disk: what each stage writes.
        peak, end: bytes on the disk beyond what is there.
        free_memory, free_disk: bytes.
        recomputes: whether activations are computed again on the way back, to save memory.
        unknown: what is not known, in sentences.
    """

    memory: dict[str, Memory | None]
    disk: dict[str, Written]
    peak: int
    end: int
    free_memory: int
    free_disk: int
    recomputes: bool = False
    unknown: list[str] = field(default_factory=list)

    @property
    def most(self) -> Memory:
        """The largest of what is known."""
        known = [each for each in self.memory.values() if each is not None]
        return max(known, key=lambda each: each.resident, default=Memory(0, 0))


def work_of(prepared: Path, config: Config) -> Work:
    """Counts what a prepared folder gives to do."""
    from kolotune.engines.prepared_tokens import PreparedTokens

    tokens = PreparedTokens.load(prepared / "train.safetensors")
    held_out = prepared / "held_out.safetensors"
    batch = config.batch_size or automatic_batch_size(prepared / "train.safetensors")
    length = TrainingLength.of(len(tokens), batch, config.gradient_accumulation, config.epochs, config.warmup_steps)
    return Work(
        chats=len(tokens),
        tokens=len(tokens.ids),
        labelled=int(tokens.labelled.sum()),
        held_out_tokens=len(PreparedTokens.load(held_out).ids) if held_out.is_file() else 0,
        batch_size=batch,
        steps_in_epoch=length.steps_in_epoch,
        steps=length.steps,
        warmup=length.warmup_steps,
        largest=_largest_row(tokens, config, batch),
    )


def _largest_row(tokens: Any, config: Config, batch: int) -> Row:
    """The row that keeps most for the way back, of those of the first steps and of the longest chat."""
    from kolotune.engines.native import packing
    from kolotune.engines.native.kernels import build
    from kolotune.engines.prepared_tokens import epoch_steps, longest_first

    compiled = config.compile != "off" and not build.why_not()

    def rows() -> Iterator[Row]:
        steps = epoch_steps(len(tokens), 0, config.seed, batch * config.gradient_accumulation)
        looked_at = [step for _, step in zip(range(_LOOKED_AT), steps, strict=False)]
        for step in [*looked_at, longest_first(tokens)[:1]]:
            for group in packing.grouped(tokens, step):
                packed = packing.pack(tokens, group, not config.lora_dropout)
                lengths = [*([packed.prefix] if packed.prefix else []), *packed.lengths]
                padded = not compiled and max(lengths) <= packing.LONG
                yield Row(len(packed.ids), len(lengths), max(lengths), packed.prefix, packed.labels, padded)

    return max(rows(), key=lambda row: (row.tokens, row.chats * row.longest**2 * row.padded))


def exported(context: Context, log: Path) -> Exported:
    """How large the exports get; llama.cpp is asked, with a GGUF whose weights are a hole in the disk.

    Raises:
        ToolchainError, ModelError: as the conversion itself.
    """
    shape, kind = convert.expected(context)
    merged = sum(shard.size for shard in shape.shards) + sum(_text_size(each) for each in shape.files.values())
    toolchain = llamacpp.toolchain.find()
    verdict = conversion_plan.draw(shape, kind, toolchain, log) if toolchain is not None else conversion_plan.Verdict()
    wanted = kept(context.config).quantized
    if verdict.outline is None:
        weights = sum(entry.size for shard in shape.shards for entry in shard.entries)
        bound = int(weights * 8.5 / (32 if kind == "f32" else 16))
        return Exported(merged, merged, {name: Sizes(bound, 0.0) for name in wanted}, told=False)
    size = conversion_plan.size_of(verdict.outline)
    if toolchain is None or not wanted:
        return Exported(merged, size, {}, told=True)
    found = _quantized(verdict.outline, wanted, conversion_plan.place_of(shape, kind, toolchain) / _SIZES, log)
    rest = {name: Sizes(size, 0.0) for name in wanted if name not in found}
    return Exported(merged, size, {**found, **rest}, told=not rest)


def _quantized(drawn: conversion_plan.Outline, wanted: Collection[str], kept_in: Path, log: Path) -> dict[str, Sizes]:
    """Asks llama.cpp once for each quantization; what it said is kept beside the outline."""
    try:
        lines = kept_in.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    missing = [name for name in wanted if name not in sizes_in(lines)]
    if missing:
        with tempfile.TemporaryDirectory(dir=kept_in.parent.parent) as folder:
            file = Path(folder, "hollow.gguf")
            conversion_plan.hollow(drawn, file)
            argv = local.python("kolotune.gguf.quantized_sizes", str(file), *missing)
            local.run(argv, log=log, on_line=_listening(lines), ends_with_parent=True)
        told = [line for line in lines if sizes_in([line])]
        write_text(kept_in, "".join(f"{line}\n" for line in told))
    found = sizes_in(lines)
    return {name: found[name] for name in wanted if name in found}


def _listening(lines: list[str]) -> Callable[[str], bool]:
    def listen(line: str) -> bool:
        lines.append(line)
        return bool(sizes_in([line]))

    return listen


def _text_size(content: Path | str) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content.encode())


def written(context: Context, shape: ModelShape, sizes: Exported, work: Work | None) -> dict[str, Written]:
    """What each stage writes into the run folder."""
    config, run = context.config, context.run
    adapter = Adapter.of(shape, config.lora_rank, config.target_modules)
    width = estimates.FP32 if config.engine == "native" else estimates.WIDTHS[config.dtype]
    checkpoint = adapter.checkpoint(config.early_stopping > 0, width)
    if work is None:
        checkpoints = min(config.epochs, 3)
    else:
        checkpoints = estimates.checkpoints_written(work.steps_in_epoch, config.epochs, config.checkpoint_steps)
    stays = min(checkpoints, 2) * checkpoint
    metrics = _METRICS_LINE * (work.steps if work else 0)
    found = {
        "prepare": Written(_prepared_size(context, work), replaced=_size(run.prepared)),
        "train": Written(
            stays + adapter.file + metrics,
            passes=max(0, checkpoint - adapter.file) if checkpoints > 2 else 0,
            replaced=_size(run.adapter) + (0 if config.use_checkpoint else _size(run.checkpoints)),
        ),
        "merge": Written(sizes.merged, replaced=_size(run.merged_model)),
        "convert": Written(sizes.gguf, replaced=_size(run.gguf)),
    }
    quantized = sum(each.size for each in sizes.quantized.values())
    before = sum(_size(run.quantized(name)) for name in sizes.quantized)
    keeps = kept(config).unquantized
    if with_matrix(context, sizes.quantized):
        quantized += shape.importance
        before += _size(run.importance_matrix)
    found["quantize"] = Written(quantized, 0 if keeps else sizes.gguf, before)
    if set(config.compare_quantization) - set(config.quantization):
        # One at a time, none larger than what it is made of.
        found["compare"] = Written(0, passes=sizes.gguf * (1 if keeps else 2))
    return found


def _prepared_size(context: Context, work: Work | None) -> int:
    """Tokens, offsets and the tokenizer; before the chats are read, as many bytes as they have."""
    tokenizer = sum(_size(context.base / name) for name in TOKENIZER_FILES)
    if work is None:
        return tokenizer + sum(_size(path) for path in context.config.train_data)
    return tokenizer + 5 * (work.tokens + work.held_out_tokens) + 8 * work.chats


def _size(path: Path) -> int:
    return size_of(path) if path.exists() else 0


def memory(
    context: Context, shape: ModelShape, work: Work | None, free: int, unknown: list[str]
) -> tuple[dict[str, Memory | None], bool]:
    """What each stage holds in memory, and whether activations are computed again."""
    main = estimates.MAIN
    training, recomputes = training_memory(context, shape, work.largest if work else _SMALLEST_ROW, free, unknown)
    merging = Memory(main.own, main.mapped + shape.stored)
    quantizing = estimates.of_quantizing(shape)
    if with_matrix(context, kept(context.config).quantized):
        longest = work.largest.longest if work else context.config.max_seq_length
        reading = estimates.of_importance(shape, longest, BATCH)
        quantizing = max(quantizing, reading, key=lambda each: each.resident)
    return {
        "prepare": main,
        "train": _both(main, training) if training is not None else None,
        "merge": merging,
        "convert": merging,
        "quantize": _both(main, quantizing),
    }, recomputes


def _both(one: Memory, other: Memory) -> Memory:
    return Memory(one.own + other.own, one.mapped + other.mapped)


def training_memory(
    context: Context, shape: ModelShape, row: Row, free: int, unknown: list[str]
) -> tuple[Memory | None, bool]:
    """What the engine's processes hold, and whether they compute activations again; None: not known."""
    config = context.config
    reason = _why_not_known(context, row)
    if reason:
        unknown.append(f"memory at train: {reason}")
        return None, False
    adapter = Adapter.of(shape, config.lora_rank, config.target_modules)
    width = estimates.WIDTHS[config.dtype]
    kept_all = shape.layers * estimates.kept_by_layer(shape, adapter, row, width)
    without = estimates.of_training(shape, adapter, _SMALLEST_ROW, width, recompute=False).own
    recompute = kept_all > max(0, free // config.nproc - without) // 2
    best = config.early_stopping > 0
    if train.is_sharded(config, context.base):
        recompute = True
        largest = max((each.outputs * each.inputs for each in shape.linears), default=0)
        parts = config.nproc * config.nnodes
        each = estimates.of_plain_training(
            shape, adapter, row, width, recompute=True, parts=parts, at_once=largest, keeps_best=best
        )
    else:
        each = estimates.of_training(shape, adapter, row, width, recompute=recompute, keeps_best=best)
    return Memory(each.own * config.nproc, each.mapped * config.nproc), recompute


def _why_not_known(context: Context, row: Row) -> str:
    config = context.config
    if config.engine != "native":
        return f"{config.engine} is no engine of ours"
    if config.load_in_4bit:
        return "it depends on bitsandbytes (--load-in-4bit)"
    if hardware.best_device() != "cpu":
        return f"it trains on {hardware.best_device()}"
    if train.is_sharded(config, context.base):
        return ""
    reason = families.why_not(context.base, row.longest)
    return f"transformers computes this model ({reason})" if reason else ""


def needs(context: Context, names: Collection[str], log: Path, work: Work | None = None) -> Needs:
    """What the stages of those names take.

    Args:
        context: what they work with; a folder that may not be there yet.
        names: of the stages that have work.
        log: where llama.cpp's output goes.
        work: what is trained on; None: it is not known yet, and the least is taken.

    Raises:
        ToolchainError, ModelError: as the conversion itself.
    """
    shape = estimates.read_shape(context.base)
    free = hardware.free_memory()
    unknown: list[str] = []
    by_stage, recomputes = memory(context, shape, work, free, unknown)
    converts = bool({"convert", "quantize", "merge"} & set(names))
    sizes = exported(context, log) if converts else Exported(0, 0, {}, told=True)
    if not sizes.told:
        unknown.append("sizes of quantizations: llama.cpp did not tell them; those shown are upper bounds")
    disk = {name: each for name, each in written(context, shape, sizes, work).items() if name in names}
    peak, end = estimates.peak_of(disk.values())
    return Needs(
        {name: each for name, each in by_stage.items() if name in names},
        disk,
        peak,
        end,
        free,
        shutil.disk_usage(_existing(context.run.root)).free,
        recomputes and "train" in names,
        unknown if "train" in names else [],
    )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def problems(found: Needs, context: Context, work: Work | None, names: Collection[str], log: Path) -> list[SpaceError]:
    """Why the run can't fit, each with what to change."""
    told = []
    if found.peak > found.free_disk:
        root, free = context.config.output_dir, format_size(found.free_disk)
        told.append(
            SpaceError(
                f"{root}: the run makes about {format_size(found.peak)}, but only {free} are free",
                _disk_advice(found, context, work, names, log),
            )
        )
    for name, each in found.memory.items():
        if each is not None and each.own > found.free_memory:
            told.append(
                SpaceError(
                    f"{name} takes about {format_size(each.own)} of memory, but only "
                    f"{format_size(found.free_memory)} are free",
                    _memory_advice(found, context, work) if name == "train" else "Free some memory.",
                )
            )
    return told


def require_room(context: Context, names: Collection[str], log: Path, work: Work | None = None) -> Needs:
    """What the stages take, if there is room for it.

    Raises:
        SpaceError: there is not; with what to change.
    """
    found = needs(context, names, log, work)
    told = problems(found, context, work, names, log)
    if told:
        raise SpaceError("\n".join(each.cause for each in told), " ".join(each.hint for each in told))
    return found


def _disk_advice(found: Needs, context: Context, work: Work | None, names: Collection[str], log: Path) -> str:
    config = context.config
    quantized = list(kept(config).quantized)
    changes: list[tuple[str, dict[str, Any]]] = []
    if config.merge_dtype == "fp32":
        changes.append(("--merge-dtype f16", {"merge_dtype": "f16"}))
    changes.append(("--lean", {"lean": True}))
    if len(quantized) > 1:
        changes.append((f"--quantization {quantized[0]}", {"quantization": (quantized[0],)}))
        changes.append((f"--lean --quantization {quantized[0]}", {"quantization": (quantized[0],), "lean": True}))
    for advice, change in changes:
        other = dataclasses.replace(context, config=dataclasses.replace(config, **change))
        left = set(names) - ({"merge", "convert"} if other.config.lean and quantized else set())
        try:
            peak = needs(other, left, log, work).peak
        except KolotuneError:
            continue
        if other.config != config and peak <= found.free_disk:
            return f"Give {advice}: then it makes {format_size(peak)}."
    missing = format_size(found.peak - found.free_disk)
    return f"Free {missing}, or choose another disk with --output-dir."


def _memory_advice(found: Needs, context: Context, work: Work | None) -> str:
    """The first change of one option, or of several, with which the training fits."""
    shape = estimates.read_shape(context.base)
    main, row = estimates.MAIN.own, work.largest if work else _SMALLEST_ROW
    for words, config, length in _smaller(context.config, row):
        smaller = dataclasses.replace(row, tokens=min(row.tokens, length), longest=min(row.longest, length))
        other = dataclasses.replace(context, config=config)
        training, _ = training_memory(other, shape, smaller, found.free_memory, [])
        if training is not None and main + training.own <= found.free_memory:
            return f"Give {words}: then it takes {format_size(main + training.own)}."
    width = 2 if hardware.best_dtype() == "bf16" else 4
    room = found.free_memory - main - estimates.ENGINE.own
    fitting = [each.name for each in catalog.KNOWN if each.parameters * width * 1.3 < room]
    if fitting:
        return f"Give --base-model {fitting[-1]}, the largest known one that fits, or free some memory."
    return "Free some memory, or train on a larger machine."


def _smaller(config: Config, row: Row) -> Iterator[tuple[str, Config, int]]:
    """Changes that take less memory, the least harmful first: words, config, longest chat."""
    bases = [("", config)]
    if config.nproc > 1:
        bases = [("--nproc 1", dataclasses.replace(config, nproc=1))]
        yield bases[0][0], bases[0][1], row.longest
    if config.dtype == "fp32" and hardware.best_dtype() == "bf16":
        words, wide = bases[-1]
        bases.append((f"{words} --dtype bf16".strip(), dataclasses.replace(wide, dtype="bf16")))
        yield bases[-1][0], bases[-1][1], row.longest
    for words, base in bases:
        rank = config.lora_rank // 2
        while rank >= _LOWEST_RANK:
            yield f"{words} --lora-rank {rank}".strip(), dataclasses.replace(base, lora_rank=rank), row.longest
            rank //= 2
        length = 1 << (max(row.longest - 1, 1).bit_length() - 1)
        while length >= _SHORTEST_WORTH:
            changed = dataclasses.replace(base, max_seq_length=length)
            yield f"{words} --max-seq-length {length}".strip(), changed, length
            length //= 2


def in_words(work: Work, config: Config) -> str:
    """What is trained on, as a sentence."""
    share = 100 * work.labelled / max(1, work.tokens)
    each = f" of {config.gradient_accumulation} batches" if config.gradient_accumulation > 1 else ""
    return (
        f"{work.steps} steps{each} in {config.epochs} epochs: {work.chats} chats, {work.tokens} tokens, "
        f"{share:.0f}% of them answers, in batches of {work.batch_size}; warmup: {work.warmup} steps"
    )


def with_main(engine: Memory) -> Memory:
    """The memory of an engine's process and of the one that started it."""
    return _both(estimates.MAIN, engine)

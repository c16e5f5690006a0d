"""How long a run takes: some real steps of its training, and what its other stages do, tried on a few megabytes."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kolotune.engines import estimates
from kolotune.engines.estimates import Memory, Written
from kolotune.engines.job import event_of
from kolotune.engines.native.environment import ENVIRONMENT
from kolotune.foundation import errors
from kolotune.foundation.errors import KolotuneError, TrainingError
from kolotune.foundation.files import Stream, hash_file, replacing
from kolotune.gguf.importance_matrix import tokens_read
from kolotune.gguf.quantize import with_matrix
from kolotune.run_folder.records import Context
from kolotune.runners import local
from kolotune.stages import train
from kolotune.weights.merge import MergedModel

from .fit import Exported, Work

_TRIED_BYTES = 64_000_000
# Starting an engine's process or a quantizer's once more, and what it writes beside results; measured on 2 cores.
_QUANTIZER_START = 1.5
# Of a trained token's time: llama.cpp reading one in f16 for an importance matrix. A guess, on the safe side.
_READING = 1.0


@dataclass(frozen=True)
class Measured:
    """What the steps told; see `engines.native.calibration`. Seconds and bytes."""

    start: float
    first: float
    per_token: float
    per_held_out_token: float
    checkpoint: float
    device: str
    memory: Memory
    hashing: float


def measure_steps(context: Context) -> Measured:
    """Has the native engine do some steps in `context.run`, a folder that is thrown away.

    Raises:
        TrainingError: they failed.
    """
    started = time.perf_counter()
    job = train.make_job(context)
    hashing = time.perf_counter() - started
    # By one process: others do the same at the same time, and what they send each other is known without (traffic.py).
    dataclasses.replace(job, resume=False, nproc=1, nnodes=1, rdzv=None).write(context.run.job)
    found: dict[str, Any] = {}

    def listen(line: str) -> bool:
        event = event_of(line)
        found.update(event or {})
        return event is not None

    log = context.run.log("plan")
    argv = local.python("kolotune.engines.native.calibration", str(context.run.job))
    code = local.run(argv, log=log, env=ENVIRONMENT, on_line=listen, ends_with_parent=True)
    if found.get("event") == "error":
        raised: type[KolotuneError] = getattr(errors, str(found["kind"]), TrainingError)
        raise raised(str(found["cause"]), str(found["hint"]))
    if code != 0 or found.get("event") != "measured":
        raise TrainingError(
            f"the measured steps ended with code {code}: {local.last_lines(log)}",
            "Most likely memory ran out; `kolotune plan --no-measure` says what is needed.",
        )
    mapped = int(found["mapped"])
    return Measured(
        start=float(found["start"]),
        first=float(found["first"]),
        per_token=float(found["per_token"]),
        per_held_out_token=float(found["per_held_out_token"]),
        checkpoint=float(found["checkpoint"]),
        device=str(found["device"]),
        memory=Memory(int(found["memory"]) - mapped, mapped),
        hashing=hashing,
    )


@dataclass(frozen=True)
class Rates:
    """Seconds a byte: of merging or converting, which read, compute, write and hash; and of hashing alone."""

    merging: float
    hashing: float


def measure_rates(context: Context) -> Rates:
    """Tries them on the first weights of the base, in `context.run`."""
    model = MergedModel(None, context.base, context.config.merge_dtype)
    file = context.run.root / "tried"

    def blocks() -> Iterator[Any]:
        for entry in model.entries:
            yield from model.blocks(entry)

    size = 0
    started = time.perf_counter()
    with replacing(file) as partial, Stream(partial) as stream:
        for block in blocks():
            stream.write(block)
            size += block.nbytes
            if size >= _TRIED_BYTES:
                break
    merging = (time.perf_counter() - started) / max(1, size)
    started = time.perf_counter()
    hash_file(file)
    hashing = (time.perf_counter() - started) / max(1, size)
    file.unlink()
    return Rates(merging, hashing)


def seconds(
    context: Context, work: Work, sizes: Exported, disk: Mapping[str, Written], steps: Measured, rates: Rates
) -> dict[str, float]:
    """Seconds of each stage that `disk` names, but of prepare, which was done and timed."""
    config = context.config
    found = {}
    if "train" in disk:
        evaluations = (config.epochs + 1) * work.held_out_tokens * steps.per_held_out_token
        tokens = work.tokens * config.epochs
        mean = work.tokens / max(1, work.steps_in_epoch)
        checkpoints = estimates.checkpoints_written(work.steps_in_epoch, config.epochs, config.checkpoint_steps)
        warming_up = max(0.0, steps.first - steps.per_token * mean) if tokens else 0.0
        found["train"] = (
            steps.hashing + steps.start + warming_up + tokens * steps.per_token + evaluations
            + checkpoints * steps.checkpoint
        )  # fmt: skip
    if "merge" in disk:
        found["merge"] = sizes.merged * rates.merging
    if "convert" in disk:
        found["convert"] = sizes.gguf * rates.merging
    if "quantize" in disk:
        passing = disk["quantize"].passes * rates.merging
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        each = [
            _QUANTIZER_START + size.seconds / cores + sizes.gguf * rates.hashing / 2 + size.size * rates.merging
            for size in sizes.quantized.values()
        ]
        found["quantize"] = passing + sum(each)
        if with_matrix(context, sizes.quantized):
            found["quantize"] += _READING * steps.per_token * tokens_read(work.tokens, work.chats)
    return found

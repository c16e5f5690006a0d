"""kolotune's own engine, as `engines.engine.Engine` describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, TrainingError
from kolotune.foundation.objectives import OBJECTIVES
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import child_process, local
from kolotune.weights.model_shape import DTYPE_BYTES, AdapterShape, ModelShape, read_shape
from kolotune.weights.stored_blocks import TYPES, has_blocks, read_matrices

from .. import events
from ..engine import CalibrationGap, Engine, EnvironmentStatus, ExpertChoice
from ..events import Calibration
from ..job import TrainJob
from ..memory import SMALLEST_BATCH, BatchShape, Memory, MemoryGap, TrainingMemory
from ..process_environment import ENVIRONMENT
from . import memory, supported_models
from .kernels import build
from .lora_variants import check_variant, has_experts

if TYPE_CHECKING:
    from ..prepared_tokens import PreparedTokens

_BASE_SHARE = 0.6  # of the memory that the base may fill; adapters, activations and the optimizer need the rest
_SEARCHED_STEPS = 300  # of the first epoch, for the largest batch


class NativeEngine:
    """The decoder with hand-written backward passes, or transformers where that can't compute a model."""

    name = "native"
    module = "kolotune.engines.native"
    has_compiled_step = True
    weighs_labels = True
    knows_shard_traffic = True
    process_memory: Memory = memory.PROCESS

    def required_packages(self, config: Config, base: Path) -> tuple[str, ...]:
        # The decoder has 4 bits of its own.
        by_transformers = config.load_in_4bit and supported_models.reason_unsupported(base, config.max_seq_length)
        return ("torch", "transformers", *(("bitsandbytes",) if by_transformers else ()))

    def check(self, config: Config, base: Path) -> None:
        """Refuse adapters on the experts of a model that has none, and variants that the steps have not.

        Raises:
            ConfigError: it has none, or a variant of LoRA can't be trained on this base.
        """
        if config.target_parameters not in (("auto",), ("none",)) and not read_shape(base).experts:
            raise ConfigError("target-parameters: the base model has no experts", "Leave out --target-parameters.")
        if config.load_in_4bit and has_blocks(base):
            self._check_blocks(config, base)
        check_variant(config, base, is_sharded=self.is_sharded(config, base))
        if OBJECTIVES[config.objective].has_preferences:
            self._check_preferences(config, base)

    def _check_blocks(self, config: Config, base: Path) -> None:
        """Refuse to keep a base in the blocks of the GGUF that it was made from where transformers computes it."""
        unknown = sorted({matrix.type for matrix in read_matrices(base)} - TYPES)
        reason = f"blocks of type {unknown[0]} are unknown to it" if unknown else ""
        if not reason:
            unsupported = supported_models.reason_unsupported(base, config.max_seq_length)
            reason = "it is sharded" if self.is_sharded(config, base) else unsupported
        if reason:
            raise ConfigError(
                f"load-in-4bit: only the packed step computes with the blocks of a GGUF: {reason}",
                "Leave out --load-in-4bit: the folder has the same weights in fp32.",
            )

    def _check_preferences(self, config: Config, base: Path) -> None:
        """Refuse what only transformers would compute: it has no step for preferences."""
        other = "choose another base model"
        if self.is_sharded(config, base):
            reason = "transformers computes sharded bases"
            other = "give each process the whole base: --sharding off, and --load-in-4bit where memory is short"
        else:
            reason = supported_models.reason_unsupported(base, 0)
        if reason:
            raise ConfigError(
                f"objective {config.objective}: preferences are trained by the packed step only: {reason}",
                f"Train on the preferred answers with --objective sft, or {other}.",
            )

    def install(self, report: Callable[[str], None]) -> None:
        """Do nothing: the engine runs in kolotune's own environment."""

    def environment_status(self) -> EnvironmentStatus | None:
        return None

    def record_options(self, options: JsonObject) -> JsonObject:
        return options

    def can_compile(self, dtype: str) -> bool:
        return build.can_compile(dtype)

    def is_sharded(self, config: Config, base: Path) -> bool:
        """Return whether to shard: as configured, or where a copy in each process would not fit."""
        several = config.nproc * config.nnodes > 1
        if config.sharding != "auto" or config.load_in_4bit or not several:
            return config.sharding == "on"
        size = read_shape(base).weight_count * DTYPE_BYTES[config.dtype]
        return size * config.nproc > hardware.memory_for_processes(config.nproc) * _BASE_SHARE

    def choose_experts(self, config: Config, base: Path) -> ExpertChoice | None:
        """Choose to train them with all-linear, where they fit into memory; several machines choose the same."""
        shape = read_shape(base)
        if not shape.experts:
            return None
        options = (shape, config.lora_rank, config.target_modules)
        without, adapter = AdapterShape.of(*options), AdapterShape.of(*options, ["all-experts"])
        if list(config.target_modules) != ["all-linear"] or config.load_in_4bit or not has_experts(config):
            return ExpertChoice(False, without.share_of(shape))
        needed = (
            config.nproc
            * memory.transformers_training(
                shape,
                adapter,
                SMALLEST_BATCH,
                DTYPE_BYTES[config.dtype],
                recompute=True,
                keeps_best=config.early_stopping > 0,
            ).own
        )
        free = hardware.memory_for_processes(config.nproc)
        if config.nnodes > 1 or needed <= free:
            return ExpertChoice(True, adapter.share_of(shape))
        return ExpertChoice(False, without.share_of(shape), needed, free)

    def checkpoint_dtype(self, config: Config) -> str:
        return "fp32"

    def largest_batch(self, tokens: PreparedTokens, config: Config, batch_size: int) -> BatchShape:
        """Return the batch that keeps most for the backward pass, among the first steps and the longest chat."""
        from ..prepared_tokens import epoch_steps, longest_first
        from . import sequence_packing

        share = not (config.lora_dropout or config.neftune_noise_alpha)
        device = hardware.best_device()
        unpadded = device != "cpu" or (config.compile != "off" and not build.reason_unavailable())
        budget = sequence_packing.token_budget(device)

        def batches() -> Iterator[BatchShape]:
            steps = epoch_steps(len(tokens), 0, config.seed, batch_size * config.gradient_accumulation)
            for step in [*islice(steps, _SEARCHED_STEPS), longest_first(tokens)[:1]]:
                for group in sequence_packing.group_by_length(tokens, step, share, budget):
                    packed = sequence_packing.pack(tokens, group, share)
                    yield packed.batch_shape(unpadded)

        return max(batches(), key=lambda batch: (batch.tokens, batch.chats * batch.longest**2 * batch.padded))

    def training_memory(
        self, config: Config, base: Path, shape: ModelShape, batch: BatchShape, free: int
    ) -> TrainingMemory:
        device, sharded = hardware.best_device(), self.is_sharded(config, base)
        reason = "" if sharded else supported_models.reason_unsupported(base, batch.longest)
        reason = reason or ("modules are trained whole" if config.modules_to_save else "")
        if config.load_in_4bit and reason:
            return TrainingMemory(None, gap=MemoryGap.FOUR_BIT)
        if device != "cpu" and (sharded or reason):
            return TrainingMemory(None, gap=MemoryGap.DEVICE, detail=device)
        adapter = AdapterShape.of_options(shape, config)
        dtype_bytes, keeps_best = DTYPE_BYTES[config.dtype], config.early_stopping > 0
        if device == "cuda":
            return _memory_on_gpus(config, shape, adapter, batch)
        if sharded:
            recompute = True
            process = memory.transformers_training(
                shape,
                adapter,
                batch,
                dtype_bytes,
                recompute=True,
                shards=config.nproc * config.nnodes,
                gathered=max((linear.weight_count for linear in shape.linears), default=0),
                keeps_best=keeps_best,
            )
        elif reason:
            return TrainingMemory(None, gap=MemoryGap.TRANSFORMERS, detail=reason)
        else:
            activations = shape.layers * memory.layer_activation_bytes(shape, adapter, batch, dtype_bytes)
            widens = config.dtype == "fp32" and config.compile != "off" and build.multiplies()
            stored = {"in_4bit": config.load_in_4bit, "widens": widens}
            without = memory.packed_training(shape, adapter, SMALLEST_BATCH, dtype_bytes, recompute=False, **stored).own
            recompute = activations > max(0, free // config.nproc - without) // 2
            process = memory.packed_training(
                shape,
                adapter,
                batch,
                dtype_bytes,
                recompute=recompute,
                keeps_best=keeps_best,
                **stored,
            )
        return TrainingMemory(Memory(process.own * config.nproc, process.mapped * config.nproc), recompute)

    def calibration_gap(self, config: Config, base: Path) -> CalibrationGap | None:
        return CalibrationGap.SHARDED if self.is_sharded(config, base) else None

    def calibrate(self, job: TrainJob, job_file: Path, log: Path) -> Calibration:
        job.write(job_file)
        measured: list[Calibration] = []

        def on_event(name: str, fields: JsonObject) -> None:
            event = events.parse_event(name, fields)
            if isinstance(event, Calibration):
                measured.append(event)

        code = child_process.run(
            f"{self.module}.calibration",
            str(job_file),
            log=log,
            otherwise=TrainingError,
            on_event=on_event,
            env=ENVIRONMENT,
        )
        if code != 0 or not measured:
            raise TrainingError(
                f"the measured steps ended with code {code}: {local.last_lines(log)}",
                "Most likely memory ran out. `kolotune plan --no-measure` says how much is needed.",
            )
        return measured[0]


def _memory_on_gpus(config: Config, shape: ModelShape, adapter: AdapterShape, batch: BatchShape) -> TrainingMemory:
    """Return the memory of a training with one GPU for each process."""
    size = hardware.memory_for_processes(1)
    gpu, recompute = memory.packed_on_gpu(
        shape, adapter, batch, DTYPE_BYTES[config.dtype], size, in_4bit=config.load_in_4bit
    )
    process = memory.gpu_process(shape, adapter, DTYPE_BYTES[config.dtype], in_4bit=config.load_in_4bit)
    own = process.own + gpu.offloaded
    return TrainingMemory(Memory(own * config.nproc, process.mapped * config.nproc), recompute, gpu=gpu)


ENGINE: Engine = NativeEngine()

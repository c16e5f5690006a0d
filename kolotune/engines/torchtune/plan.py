"""What torchtune is asked to do: its config for a job, and what it can't do, said before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError

from ..job import TrainJob
from .architecture import CONFIGS, Llama

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD = "lm_head"
_ALL_LINEAR = ("all-linear",)
_INSTEAD = "or train with --engine native."
# torchao packs 64 weights to a scale and 256 scales to a block.
_NF4_BLOCK = 64 * 256


@dataclass(frozen=True)
class Targets:
    """Which layers get an adapter, in torchtune's words."""

    attention: list[str]
    mlp: bool
    output: bool


def check(settings: Config | TrainJob, shape: Llama) -> None:
    """Refuses what torchtune can't do.

    Raises:
        ConfigError: an option is of no use under torchtune.
    """
    if settings.scheduler_type != "cosine":
        raise ConfigError(
            f"scheduler-type {settings.scheduler_type}: torchtune 0.6.1 has the cosine schedule only",
            f"Leave --scheduler-type out, {_INSTEAD}",
        )
    if settings.early_stopping:
        raise ConfigError(
            "early-stopping: torchtune trains all epochs and keeps the last", f"Leave --early-stopping out, {_INSTEAD}"
        )
    targets(settings.target_modules, shape)
    if four_bit(settings, shape):
        _check_four_bit(shape, settings.nproc * settings.nnodes)


def _check_four_bit(shape: Llama, processes: int) -> None:
    odd = [name for name, size in shape.linear_sizes().items() if size % _NF4_BLOCK]
    if odd:
        raise ConfigError(
            f"load-in-4bit: torchtune packs {_NF4_BLOCK} weights at a time, and {'; '.join(odd)} are no multiple",
            f"Leave --load-in-4bit out, {_INSTEAD}",
        )
    rows = (shape.embed_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_dim)
    whole = all(size % (_NF4_BLOCK * processes) == 0 for size in shape.linear_sizes().values())
    if not whole or any(each % processes for each in rows):
        raise ConfigError(
            f"nproc: torchtune keeps this base in 4 bits, in blocks of {_NF4_BLOCK} weights, and these can't be parted "
            f"over {processes} processes",
            f"Take another number of processes (a power of two), {_INSTEAD}",
        )


def four_bit(settings: Config | TrainJob, shape: Llama) -> bool:
    """Whether the base is kept in 4 bits: on request, and always where torchtune's own config says so."""
    return settings.load_in_4bit or shape in CONFIGS


def targets(names: list[str] | tuple[str, ...], shape: Llama) -> Targets:
    """The layers `names` (PEFT's names) in torchtune's words.

    Raises:
        ConfigError: torchtune can't put an adapter there.
    """
    wanted = {*_ATTENTION, *_MLP} if tuple(names) == _ALL_LINEAR else set(names)
    unknown = sorted(wanted - {*_ATTENTION, *_MLP, _HEAD})
    if unknown:
        raise ConfigError(
            f"target-modules: torchtune's Llamas have no layer {', '.join(unknown)}",
            f"Its layers are: {', '.join([*_ATTENTION, *_MLP, _HEAD])}.",
        )
    attention = [theirs for ours, theirs in _ATTENTION.items() if ours in wanted]
    if not attention:
        raise ConfigError(
            "target-modules: torchtune wants an adapter on one of q_proj, k_proj, v_proj, o_proj at least",
            f"Add one, {_INSTEAD}",
        )
    mlp = wanted & set(_MLP)
    if mlp and mlp != set(_MLP):
        raise ConfigError(
            f"target-modules: torchtune adapts {', '.join(_MLP)} together or not at all, not only {', '.join(mlp)}",
            f"Name all three or none, {_INSTEAD}",
        )
    if _HEAD in wanted and shape.tied:
        raise ConfigError(
            f"target-modules: this model's {_HEAD} is its embedding, which torchtune gives no adapter",
            f"Leave {_HEAD} out.",
        )
    return Targets(attention, bool(mlp), _HEAD in wanted)


def config_name(shape: Llama) -> str | None:
    """torchtune's own config for a model of this shape; None: it has none."""
    return CONFIGS.get(shape)


def config_of(job: TrainJob, shape: Llama, warmup_steps: int) -> dict[str, Any]:
    """torchtune's config for `job`; where torchtune has one of its own, the values that are put into it.

    How many batches a step has in a process follows from where memory ran out, on any machine: the recipe sees to it.
    No text of the user's is in it: in it, `_component_` imports what it names and `${…}` reads the environment.
    """
    return {
        "output_dir": ".",
        "model": _model(job, shape),
        "tokenizer": {"_component_": "kolotune_recipe.chats.PadId"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "model_type": "LLAMA3_2" if shape.tied else "LLAMA3",
        },
        "dataset": {"_component_": "kolotune_recipe.chats.Chats", "packed": False},
        "metric_logger": {"_component_": "kolotune_recipe.events.MetricLogger"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "lr": job.learning_rate,
            "weight_decay": job.weight_decay,
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": warmup_steps,
        },
        "epochs": job.epochs,
        "max_steps_per_epoch": None,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation,
        "clip_grad_norm": job.max_grad_norm or None,
        "seed": job.seed,
        "shuffle": True,
        "dtype": job.dtype,
        "compile": False,
        "resume_from_checkpoint": False,  # the recipe goes on from checkpoints of ours
        "save_adapter_weights_only": True,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "enable_activation_checkpointing": True,
        "enable_activation_offloading": False,
    }


def _model(job: TrainJob, shape: Llama) -> dict[str, Any]:
    chosen = targets(job.target_modules, shape)
    lora: dict[str, Any] = {
        "lora_attn_modules": chosen.attention,
        "apply_lora_to_mlp": chosen.mlp,
        "apply_lora_to_output": chosen.output,
        "lora_rank": job.lora_rank,
        "lora_alpha": job.lora_alpha,
        "lora_dropout": job.lora_dropout,
    }
    if config_name(shape) is not None:
        return lora
    builder = "llama3_2.lora_llama3_2" if shape.tied else "llama3_1.lora_llama3_1"
    return {
        "_component_": f"torchtune.models.{builder}",
        "vocab_size": shape.vocab_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "embed_dim": shape.embed_dim,
        "intermediate_dim": shape.intermediate_dim,
        "max_seq_len": shape.max_seq_len,
        "norm_eps": shape.norm_eps,
        "rope_base": shape.rope_base,
        "scale_factor": shape.rope_scale,
        "quantize_base": job.load_in_4bit,
        **lora,
    }

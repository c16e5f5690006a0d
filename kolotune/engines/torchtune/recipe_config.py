"""torchtune's config for a job, and the check that torchtune can do what is configured."""

from __future__ import annotations

from dataclasses import dataclass

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.typed_storage import JsonObject

from ..job import TrainJob
from .architecture import CONFIGS, Llama

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD = "lm_head"
_ALL_LINEAR = ("all-linear",)
_OTHERWISE = "or train with --engine native."
# torchao packs 64 weights per scale and 256 scales per block.
_NF4_BLOCK = 64 * 256


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers that get an adapter, in torchtune's terms: attention layers by name, the whole MLP, the head."""

    attention: list[str]
    mlp: bool
    output: bool


def check(settings: Config | TrainJob, shape: Llama) -> None:
    """Refuse what torchtune can't do.

    Raises:
        ConfigError: an option can't be used with torchtune.
    """
    if settings.scheduler_type != "cosine":
        raise ConfigError(
            f"scheduler-type {settings.scheduler_type}: torchtune 0.6.1 only has the cosine schedule",
            f"Leave --scheduler-type out, {_OTHERWISE}",
        )
    if settings.target_parameters not in ([], ("auto",), ("none",)):
        raise ConfigError(
            "target-parameters: torchtune's models have no experts", f"Leave --target-parameters out, {_OTHERWISE}"
        )
    _check_variants(settings)
    if settings.early_stopping:
        raise ConfigError(
            "early-stopping: torchtune trains all epochs and keeps the last",
            f"Leave --early-stopping out, {_OTHERWISE}",
        )
    adapted_layers(settings.target_modules, shape)
    if four_bit(settings, shape):
        _check_four_bit(shape, settings.nproc * settings.nnodes)


def _check_variants(settings: Config | TrainJob) -> None:
    """Refuse the variants of LoRA that torchtune has not, or that kolotune does not train with it."""
    if settings.use_rslora:
        raise ConfigError(
            "use-rslora: torchtune 0.6.1 scales adapters by alpha / rank only",
            f"Leave --use-rslora out, {_OTHERWISE} Multiplying --lora-alpha by the root of --lora-rank gives the same "
            "scale.",
        )
    if settings.use_dora:
        raise ConfigError(
            "use-dora: kolotune trains plain LoRA with torchtune's recipes", f"Leave --use-dora out, {_OTHERWISE}"
        )
    if settings.init_lora_weights != "default":
        raise ConfigError(
            f"init-lora-weights {settings.init_lora_weights}: torchtune 0.6.1 starts adapters as nothing only",
            f"Leave --init-lora-weights out, {_OTHERWISE}",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(settings, name):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"{flag}: torchtune 0.6.1 has one rank and one alpha for all layers",
                f"Leave --{flag} out, {_OTHERWISE}",
            )
    if settings.lora_plus_ratio != 1:
        raise ConfigError(
            "lora-plus-ratio: torchtune 0.6.1 trains all matrices with one learning rate",
            f"Leave --lora-plus-ratio out, {_OTHERWISE}",
        )
    if settings.neftune_noise_alpha:
        raise ConfigError(
            "neftune-noise-alpha: torchtune 0.6.1 has no noise on embeddings",
            f"Leave --neftune-noise-alpha out, {_OTHERWISE}",
        )


def _check_four_bit(shape: Llama, processes: int) -> None:
    odd = [name for name, size in shape.linear_sizes().items() if size % _NF4_BLOCK]
    if odd:
        raise ConfigError(
            f"load-in-4bit: torchtune packs {_NF4_BLOCK} weights at a time, and {'; '.join(odd)} are not multiples",
            f"Leave --load-in-4bit out, {_OTHERWISE}",
        )
    rows = (shape.embed_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_dim)
    whole = all(size % (_NF4_BLOCK * processes) == 0 for size in shape.linear_sizes().values())
    if not whole or any(each % processes for each in rows):
        raise ConfigError(
            f"nproc: torchtune keeps this base in 4 bits, in blocks of {_NF4_BLOCK} weights, which can't be sharded "
            f"over {processes} processes",
            f"Give a different number of processes (a power of two), {_OTHERWISE}",
        )


def four_bit(settings: Config | TrainJob, shape: Llama) -> bool:
    """Return whether the base is kept in 4 bits: on request, and wherever torchtune's own config says so."""
    return settings.load_in_4bit or shape in CONFIGS


def adapted_layers(names: list[str] | tuple[str, ...], shape: Llama) -> AdaptedLayers:
    """Translate names of layers, as in PEFT, to torchtune's terms.

    Raises:
        ConfigError: torchtune can't put an adapter there.
    """
    chosen = {*_ATTENTION, *_MLP} if tuple(names) == _ALL_LINEAR else set(names)
    unknown = sorted(chosen - {*_ATTENTION, *_MLP, _HEAD})
    if unknown:
        raise ConfigError(
            f"target-modules: torchtune's Llamas have no layer {', '.join(unknown)}",
            f"Its layers are: {', '.join([*_ATTENTION, *_MLP, _HEAD])}.",
        )
    attention = [theirs for ours, theirs in _ATTENTION.items() if ours in chosen]
    if not attention:
        raise ConfigError(
            "target-modules: torchtune needs an adapter on at least one of q_proj, k_proj, v_proj, o_proj",
            f"Add one, {_OTHERWISE}",
        )
    mlp = chosen & set(_MLP)
    if mlp and mlp != set(_MLP):
        raise ConfigError(
            f"target-modules: torchtune adapts {', '.join(_MLP)} together or not at all, not {', '.join(mlp)} alone",
            f"Name all three or none, {_OTHERWISE}",
        )
    if _HEAD in chosen and shape.tied:
        raise ConfigError(
            f"target-modules: this model's {_HEAD} is its embedding, which gets no adapter in torchtune",
            f"Leave {_HEAD} out.",
        )
    return AdaptedLayers(attention, bool(mlp), _HEAD in chosen)


def config_name(shape: Llama) -> str | None:
    """Return the name of torchtune's own config for a model of this shape; None when it has none."""
    return CONFIGS.get(shape)


def make_config(job: TrainJob, shape: Llama, warmup_steps: int) -> JsonObject:
    """Return torchtune's config for `job`, or what replaces parts of torchtune's own config for the model.

    The recipe sets the number of batches per step, which depends on where memory ran out on any machine. The config
    holds no text of the user's: torchtune imports what ``_component_`` names, and ``${…}`` reads the environment.
    """
    return {
        "output_dir": ".",
        "model": _model(job, shape),
        "tokenizer": {"_component_": "kolotune_recipe.data.PadId"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "model_type": "LLAMA3_2" if shape.tied else "LLAMA3",
        },
        "dataset": {"_component_": "kolotune_recipe.data.TokenizedChats", "packed": False},
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
        "resume_from_checkpoint": False,  # the recipe has its own checkpoints
        "save_adapter_weights_only": True,
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "enable_activation_checkpointing": True,
        "enable_activation_offloading": False,
    }


def _model(job: TrainJob, shape: Llama) -> JsonObject:
    chosen = adapted_layers(job.target_modules, shape)
    lora: JsonObject = {
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

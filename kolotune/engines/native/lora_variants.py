"""Which variants of LoRA the native engine can train on which bases."""

from __future__ import annotations

from pathlib import Path

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.name_patterns import fits, read_patterns
from kolotune.foundation.objectives import OBJECTIVES
from kolotune.weights.model_shape import AdapterShape, ModelShape, read_shape, saved_module
from kolotune.weights.stored_blocks import has_blocks

from . import supported_models

_NO_EXPERTS = (("auto",), ("none",))


def check_variant(config: Config, base: Path, *, is_sharded: bool) -> None:
    """Refuse a variant of LoRA that can't be trained as configured.

    Args:
        config: the options.
        base: the base model's folder.
        is_sharded: whether the base is sharded over the processes.

    Raises:
        ConfigError: it can't; the message says why.
    """
    needs = {
        "use-dora": "DoRA needs the lengths of a layer's weights" if config.use_dora else "",
        "init-lora-weights": f"{config.init_lora_weights} starts from a layer's weights" if _has_start(config) else "",
    }
    for option, need in needs.items():
        if need:
            _check_whole_weights(option, need, config, base, is_sharded)
            if config.target_parameters not in _NO_EXPERTS:
                raise ConfigError(
                    f"{option}: the adapters of experts are plain LoRA, as in PEFT",
                    f"Leave out --target-parameters, or --{option}.",
                )
    _check_patterns(config, base)
    _check_saved_modules(config, base, is_sharded)
    if config.new_token or config.new_special_token:
        reason = "a sharded base" if is_sharded else supported_models.reason_unsupported(base, 0)
        if reason:
            raise ConfigError(
                f"new-token: rows of new tokens are trained by the packed step only: {reason}",
                "Leave out --new-token, or choose another base model.",
            )
    if _has_start(config):
        if config.load_in_4bit and has_blocks(base):
            raise ConfigError(
                f"init-lora-weights {config.init_lora_weights}: load-in-4bit keeps the blocks of the GGUF that the "
                "base was made from, which can't lose what adapters start as",
                "Leave out --load-in-4bit or --init-lora-weights.",
            )
        _check_rank(config, read_shape(base))


def has_experts(config: Config) -> bool:
    """Return whether experts can get adapters of the configured variant."""
    return not (config.use_dora or _has_start(config))


def _has_start(config: Config) -> bool:
    return config.init_lora_weights != "default"


def _check_rank(config: Config, shape: ModelShape) -> None:
    """Refuse a rank for which some weight has not as many singular values or columns."""
    adapter = AdapterShape.of_options(shape, config)
    for linear in shape.linears:
        rank, short = adapter.rank_of(linear.name), min(linear.inputs, linear.outputs)
        if linear.name in adapter.adapted and short < rank:
            raise ConfigError(
                f"lora-rank {rank}: {linear.name} has only {short} rows or columns to start from",
                f"Give a rank of {short} at most (--rank-pattern for some layers), or leave out --init-lora-weights.",
            )


def _check_patterns(config: Config, base: Path) -> None:
    """Refuse patterns that no adapter has: they would change nothing."""
    if not config.rank_pattern and not config.alpha_pattern:
        return
    adapted = AdapterShape.of_options(read_shape(base), config).adapted
    for option, entries in (("rank-pattern", config.rank_pattern), ("alpha-pattern", config.alpha_pattern)):
        for pattern in read_patterns(entries):
            if not any(fits(pattern, name) for name in adapted):
                leaves = sorted({name.rpartition(".")[2] for name in adapted})
                raise ConfigError(
                    f"{option} {pattern}: no layer with an adapter has this name",
                    f"Names of layers end with {', '.join(leaves)}.",
                )


def _check_saved_modules(config: Config, base: Path, is_sharded: bool) -> None:
    """Refuse modules that can't be trained whole, or not as configured."""
    if not config.modules_to_save:
        return
    reasons = {
        "a base that is sharded has them on no process": is_sharded,
        "load-in-4bit keeps their weights in no dtype that can be trained": config.load_in_4bit,
        "new tokens are trained by the packed step, which keeps modules frozen": config.new_token
        or config.new_special_token,
        "preferences are trained by the packed step, which keeps modules frozen": OBJECTIVES[
            config.objective
        ].has_preferences,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ConfigError(f"modules-to-save: {reason}", "Leave out one of the two.")
    shape = read_shape(base)
    adapted = {name.rpartition(".")[2] for name in AdapterShape.of_options(shape, config).adapted}
    modules = {saved_module(entry.name) for entry in shape.entries} | ({"lm_head"} if shape.tied else set())
    for name in config.modules_to_save:
        if name not in modules or name in adapted:
            raise ConfigError(
                f"modules-to-save {name}: {'it gets an adapter' if name in adapted else 'the base has no such module'}",
                f"Modules without an adapter: {', '.join(sorted(modules - adapted))}.",
            )


def _check_whole_weights(option: str, need: str, config: Config, base: Path, is_sharded: bool) -> None:
    """Refuse a variant where no process has a layer's weights in memory as floating-point numbers."""
    if is_sharded:
        raise ConfigError(
            f"{option}: {need}, which no process has of a base that is sharded",
            f"Give each process the whole base (--sharding off), or leave out --{option}.",
        )
    reason = supported_models.reason_unsupported(base, 0) if config.load_in_4bit else ""
    if reason:
        raise ConfigError(
            f"{option}: {need}, which bitsandbytes keeps in 4 bits here, as transformers computes the model: {reason}",
            f"Leave out --load-in-4bit or --{option}.",
        )

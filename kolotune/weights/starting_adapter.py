"""The adapter that a training starts from: what it decides about the new one, and whether it can be trained further.

The new adapter has its form: the same rank, alpha, scale and layers. So only adapters whose form the training step has,
too, are taken: LoRA or DoRA on matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ConfigError

from .adapter_config import AdapterConfig, read_adapter_config
from .safetensors_header import read_header
from .weight_files import check_file

WEIGHTS = "adapter_model.safetensors"
_LORA = "lora_A.weight"


@dataclass(frozen=True)
class StartingAdapter:
    """What an adapter decides about a training that starts from it.

    Attributes:
        rank, alpha: of all layers but those that a pattern names.
        rank_patterns, alpha_patterns: exceptions.
        rank_stabilised: whether alpha is divided by the root of the rank.
        has_magnitudes: whether each output's weights have a trained length (DoRA).
        target_modules: names of the linear layers that it changes, sorted.
        target_parameters: names of experts' weights that it changes.
        base_name: the base model's name; "" when the adapter does not say.
    """

    rank: int
    alpha: float
    rank_patterns: Mapping[str, float]
    alpha_patterns: Mapping[str, float]
    rank_stabilised: bool
    has_magnitudes: bool
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    base_name: str


def read_starting_adapter(folder: Path) -> StartingAdapter:
    """Read what an adapter decides; its weights are not read.

    Raises:
        ModelError, ArtifactError: there is no adapter, or it is damaged.
        ConfigError: its form is another than the training's.
    """
    config = read_adapter_config(folder)
    if reason := _other_form(config):
        raise ConfigError(
            f"start-from {folder}: {reason}, which can't be trained further here",
            "Merge it (`kolotune merge`), and train a new adapter on the merged model.",
        )
    check_file(folder / WEIGHTS)
    names = [entry.name for entry in read_header(folder / WEIGHTS).entries]
    parameters = {name.rpartition(".")[2] for name in config.target_parameters}
    layers = {name.removesuffix(f".{_LORA}").split(".")[-1] for name in names if name.endswith(_LORA)}
    return StartingAdapter(
        config.rank,
        float(config.rank if config.alpha is None else config.alpha),
        config.rank_patterns,
        config.alpha_patterns,
        config.rank_stabilised,
        config.has_magnitudes,
        tuple(sorted(layers - {"base_layer", "experts"} - parameters)),
        config.target_parameters,
        config.base_name,
    )


def _other_form(config: AdapterConfig) -> str:
    """Return what the training step has not; "" where it has everything."""
    forms = (
        (bool(config.saved_modules), "some modules were trained whole"),
        (any(config.token_indices.values()), "rows of its embeddings were trained"),
        (config.initial is not None, "it started from the base's own weights (PiSSA, OLoRA)"),
    )
    return next((reason for has, reason in forms if has), "")

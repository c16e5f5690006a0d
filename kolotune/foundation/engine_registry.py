"""The training engines: their names, and what `Config` needs to know of each before its package is imported.

Adding or removing an engine means editing this file; `engines.engine.get_engine` loads the package. The table is
part of `foundation` because options are resolved here, and imports point one way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

EngineName: TypeAlias = Literal["native", "torchtune"]


@dataclass(frozen=True)
class EngineEntry:
    """One engine.

    Attributes:
        summary: what ``--help`` says of it.
        defaults: defaults of `Config` that differ under this engine, by option.
        always_shards: several processes always shard the base model, so ``sharding: off`` is not possible.
        image_files: files of the package that make its environment while a container image is built. They are copied
            for a build step of that engine's name, so that no other change repeats the step.
    """

    summary: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    always_shards: bool = False
    image_files: tuple[str, ...] = ()


ENGINES: Mapping[str, EngineEntry] = {
    "native": EngineEntry("kolotune's own"),
    "torchtune": EngineEntry(
        "in a separate environment, made on first use",
        defaults={  # those of the scripts that kolotune replaces
            "learning_rate": 1e-4,
            "warmup_steps": 100,
            "batch_size": 1,
            "max_grad_norm": 0.0,
            "lora_alpha": 16.0,
            "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "checkpoint_steps": 0,
        },
        always_shards=True,
        image_files=(
            "engines/__init__.py",
            "engines/torchtune/__init__.py",
            "engines/torchtune/environment.py",
            "engines/torchtune/requirements.txt",
        ),
    ),
}

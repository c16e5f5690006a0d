"""Runs a task: the config for torchtune, the checkpoint to resume from, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from . import checkpoint, checkpoint_files
from .checkpoint import RecipeState
from .common_recipe import RECIPES
from .data import batches_of_step
from .events import DisagreementError
from .process_group import RecipeProcessGroup

_COMPONENT = "_component_"


def run(task: dict[str, Any]) -> None:
    """Train as the task says. Paths come from the task and never pass through torchtune's config.

    Raises:
        NotFiniteError: the loss or a gradient is not finite.
        DisagreementError: the machines that train together were started with different settings.
    """
    config = make_config(task)
    group = RecipeProcessGroup(config.device)
    differing = group.differing({**task["identity"], "epochs": config.epochs})
    if differing:
        raise DisagreementError(", ".join(differing))
    resumed = _newest_checkpoint(task, group)
    known = resumed.halvings if resumed else []
    newer = group.longest(task["halvings"])[len(known) :]  # memory may have run out on one machine only
    task["halvings"] = [*known, *(max(step, resumed.step if resumed else 0) for step in newer)]
    accumulation = int(config.gradient_accumulation_steps)
    config.gradient_accumulation_steps = batches_of_step(config.batch_size, accumulation, task["halvings"], group.size)
    if group.writes:
        OmegaConf.save(config, "torchtune.yaml")
    recipe = _recipe_class(group.size)(config, {**task, "accumulation": accumulation}, group, resumed)
    recipe.setup(config)
    recipe.train()
    recipe.cleanup()


def make_config(task: dict[str, Any]) -> DictConfig:
    """Return torchtune's config for a task: one of torchtune's own with our values, or one that is all ours.

    Our section replaces torchtune's if it names a component; otherwise it is merged into torchtune's.
    """
    ours = OmegaConf.create(task["config"])
    if task["config_name"] is None:
        config = ours
    else:
        config = OmegaConf.load(RECIPES / "configs" / f"{task['config_name']}.yaml")
        for name in ours:
            if OmegaConf.is_dict(ours[name]) and _COMPONENT not in ours[name]:
                config[name] = OmegaConf.merge(config[name], ours[name])
            else:
                config[name] = ours[name]
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    return config


def _recipe_class(processes: int) -> Any:
    if processes == 1:
        from .single_process_recipe import SingleProcessRecipe

        return SingleProcessRecipe
    from .distributed_recipe import DistributedRecipe

    return DistributedRecipe


def _newest_checkpoint(task: dict[str, Any], group: RecipeProcessGroup) -> RecipeState | None:
    """Load the newest whole checkpoint that any machine has; None for a training from scratch."""
    newest = checkpoint_files.newest(Path(task["checkpoints"])) if group.writes else None

    def load() -> RecipeState:
        assert newest is not None
        return checkpoint.load(newest[0])

    return group.newest(newest[1]["epoch"] if newest else None, load)

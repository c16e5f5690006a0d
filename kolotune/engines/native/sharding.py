"""Sharding a base model over processes: each holds its rows of every matrix.

PyTorch's FSDP2 gathers a layer's weights when it is computed, in the forward and in the backward pass. The adapters are
whole in each process. No process ever holds the whole base: its rows come from the mapped files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kolotune.foundation.errors import TrainingError
from kolotune.weights.composite_models import model_class
from kolotune.weights.weight_files import weight_files

_ROWS = 8192  # rows of a matrix that are in memory twice while they are read or multiplied


def without_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Create the model of a folder: parameters have shapes but no memory, buffers have values.

    Raises:
        TrainingError: transformers can't create it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = model_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"the base model can't be created: {str(error).splitlines()[0]}") from error
    _tie(model)
    return model.requires_grad_(False)


def _tie(model: nn.Module) -> None:
    """Tie embedding and head where the model does; replacing parameters unties them."""
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def shard(model: nn.Module, folder: Path, adapters: Iterable[nn.Parameter], device: str) -> None:
    """Shard the layers' weights over all processes, and load this process's shards.

    Weights outside of the layers stay whole: an embedding that is also the head is used at both ends of a step, so it
    would be gathered all the time.

    Args:
        model: see `without_weights`, with adapters.
        folder: of the weights.
        adapters: the trained parameters.
        device: "cpu" or "cuda".

    Raises:
        TrainingError: a weight is missing in the files, or has a different shape.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    trained = {id(weight) for weight in adapters}
    layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    sharded = {id(weight) for weight in layers.parameters()} - trained
    whole = {weight for weight in model.parameters() if id(weight) not in sharded}
    # On a GPU a layer is gathered in one message, while the previous one is computed. On a CPU memory is short: each
    # matrix is gathered alone, as it is in memory twice meanwhile, and nothing is prefetched.
    units = [*layers] if device == "cuda" else [*_matrices(layers), *layers]
    for module in (*units, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    if device != "cuda":
        fetched: list[Any] = units
        for unit in fetched:
            unit.set_modules_to_backward_prefetch([unit])
    _give_memory(model, device)
    _fill(model, folder, trained)
    _head_in_blocks(model)


def _matrices(layers: nn.Module) -> list[nn.Module]:
    return [each for each in layers.modules() if isinstance(each, nn.Linear)]


def _head_in_blocks(model: nn.Module) -> None:
    """Compute the head in blocks: a matrix product on a CPU copies its matrix, and this is the largest."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if type(head) is not nn.Linear or head.bias is not None:
        return

    def forward(hidden: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(hidden, rows) for rows in head.weight.split(_ROWS)], dim=-1)

    head.forward = forward


def _give_memory(model: nn.Module, device: str) -> None:
    """Allocate memory for tensors that have none; the others keep their values."""
    values = {name: each.detach().clone() for name, each in _tensors(model) if not each.is_meta}
    model.to_empty(device=device)
    _tie(model)
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name in values:
                tensor.copy_(values[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _fill(model: nn.Module, folder: Path, trained: set[int]) -> None:
    from safetensors import safe_open

    wanted = {_base_name(name): each for name, each in model.named_parameters() if id(each) not in trained}
    rank, size = dist.get_rank(), dist.get_world_size()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                parameter: Any = wanted.pop(name, None)
                if parameter is None:
                    continue
                rows = file.get_slice(name)
                if rows.get_shape() != list(parameter.shape):
                    raise TrainingError(f"{path.name}: {name} has the shape {rows.get_shape()}, not {parameter.shape}")
                is_sharded = hasattr(parameter, "to_local")
                own: Tensor = parameter.to_local() if is_sharded else parameter.data
                at = rank * -(-parameter.shape[0] // size) if is_sharded else 0
                for start in range(0, len(own), _ROWS):
                    end = min(start + _ROWS, len(own))
                    own[start:end].copy_(rows[at + start : at + end])
    if wanted:
        raise TrainingError(
            f"{folder.name}: the files don't have {sorted(wanted)[0]}, as transformers calls it",
            "Train this model with --sharding off.",
        )


def _base_name(name: str) -> str:
    """Return a weight's name in the files: in a layer with an adapter it has an additional ``base``."""
    return name.replace(".base.", ".")

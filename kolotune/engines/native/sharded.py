"""A base model whose weights are parted over the processes: each holds its rows of every matrix.

PyTorch's FSDP2 brings a layer's weights together when it is computed, forwards and backwards. The adapters stay whole
in each process, as everywhere. No process ever holds the whole base: its rows come from the mapped files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kolotune.foundation.errors import TrainingError
from kolotune.weights.weight_files import weight_files

_ROWS = 8192  # of a matrix, that are in memory twice while they are read or multiplied


def without_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder; its parameters have shapes and no memory, its buffers are there.

    Raises:
        TrainingError: transformers can't make it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"the base model can't be made: {str(error).splitlines()[0]}") from error
    _tie(model)
    return model.requires_grad_(False)


def _tie(model: nn.Module) -> None:
    """One weight for embedding and head, where the model has it so; two appear when parameters are made anew."""
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def part(model: nn.Module, folder: Path, adapters: Iterable[nn.Parameter], device: str) -> None:
    """Parts the weights of the layers over all processes and fills in this one's.

    What stands outside of the layers stays whole: the embedding, when it is the head too, is used at both ends of a
    step, so that every process would have it together all the time.

    Args:
        model: see `without_weights`, with adapters.
        folder: that the weights are in.
        adapters: the parameters that are trained.
        device: "cpu" or "cuda".

    Raises:
        TrainingError: the files lack a weight, or have it in another shape.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    trained = {id(each) for each in adapters}
    layers = max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len)
    parted = {id(each) for each in layers.parameters()} - trained
    whole = {each for each in model.parameters() if id(each) not in parted}
    # On a GPU a layer comes in one message, while another one is computed. A CPU's memory is what is short: there each
    # matrix comes by itself, is in memory twice while it comes, and nothing is fetched ahead of its time.
    units = [*layers] if device == "cuda" else [*_matrices(layers), *layers]
    for module in (*units, model):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    if device != "cuda":
        fetched: list[Any] = units
        for each in fetched:
            each.set_modules_to_backward_prefetch([each])
    _give_memory(model, device)
    _fill(model, folder, trained)
    _head_in_blocks(model)


def _matrices(layers: nn.Module) -> list[nn.Module]:
    return [each for each in layers.modules() if isinstance(each, nn.Linear)]


def _head_in_blocks(model: nn.Module) -> None:
    """The head some thousand words at a time: a CPU's product has its matrix twice, and this is the largest."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if type(head) is not nn.Linear or head.bias is not None:
        return

    def forward(hidden: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(hidden, rows) for rows in head.weight.split(_ROWS)], dim=-1)

    head.forward = forward


def _give_memory(model: nn.Module, device: str) -> None:
    """Memory for what has none; what has some keeps its values."""
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
                parted = hasattr(parameter, "to_local")
                own: Tensor = parameter.to_local() if parted else parameter.data
                at = rank * -(-parameter.shape[0] // size) if parted else 0
                for start in range(0, len(own), _ROWS):
                    end = min(start + _ROWS, len(own))
                    own[start:end].copy_(rows[at + start : at + end])
    if wanted:
        raise TrainingError(
            f"{folder.name}: the files don't have {sorted(wanted)[0]}, as transformers calls it",
            "Train this model with --sharding off.",
        )


def _base_name(name: str) -> str:
    """The name that a weight has in the files: an adapter beside a layer puts ``base`` into it."""
    return name.replace(".base.", ".")

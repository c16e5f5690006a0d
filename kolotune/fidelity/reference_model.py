"""A model in fp32 and what it finds likely: whole where it fits into memory, else one decoder layer at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from kolotune.foundation.errors import ArtifactError, SpaceError
from kolotune.foundation.formatting import format_size
from kolotune.weights import adapter as adapters
from kolotune.weights.tensors import MappedTensors, TensorFiles, weight_files

from .tasks import ComparedChat

_BYTES = 4
_GROUP_TOKENS = 4096
_SPARE = 1.2  # beside the weights: activations, logits, the libraries


def needed(folder: Path) -> int:
    """Bytes that a model's weights take in fp32."""
    return sum(math.prod(each.shape) for each in MappedTensors(weight_files(folder)).entries.values()) * _BYTES


def fits(folder: Path) -> bool:
    """Whether a model fits into the memory that is free."""
    import psutil

    return needed(folder) * _SPARE < psutil.virtual_memory().available


class _Model:
    """What both ways have in common: the modules, and an adapter that is put onto their weights.

    Attributes:
        model: of transformers.
    """

    model: Any

    def _oriented(self, name: str, delta: adapters.Delta) -> adapters.Delta:
        """GPT-2 keeps its weights as [in, out]: what the module is tells it, not what the adapter's config says."""
        path = name.removesuffix(".weight")
        known = dict(self.model.named_modules())
        module = known.get(path) or known.get(f"model.{path}") or known.get(path.removeprefix("model."))
        if isinstance(module, nn.Linear):
            return dataclasses.replace(delta, transposed=False)
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            return dataclasses.replace(delta, transposed=True)
        return delta

    @torch.no_grad()
    def _put(self, adapter: adapters.Adapter, name: str, weight: Tensor, key: str) -> None:
        """Changes a weight in place as the adapter's entry `key` says; nothing when it has none of that name."""
        if key in adapter.replaced:
            weight.copy_(torch.from_numpy(np.ascontiguousarray(adapter.replaced[key])))
        if key in adapter.deltas:
            delta = self._oriented(name, adapter.deltas[key])
            if delta.shape != tuple(weight.shape):
                raise ArtifactError(f"the adapter adds {delta.shape} to {name}, which is {tuple(weight.shape)}")
            weight.add_(torch.from_numpy(delta.rows(slice(None))))


class WholeModel(_Model):
    """A model that is in memory as a whole.

    Args:
        folder: in the hub's format.

    Raises:
        ArtifactError: the folder's weights are not all that its config asks for.
    """

    def __init__(self, folder: Path) -> None:
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{folder.name}: can't be loaded: {str(error).splitlines()[0]}") from error
        self.model = loaded[0].eval()
        missing = sorted(map(str, loaded[1]["missing_keys"]))
        if missing:
            raise ArtifactError(f"{folder.name}: its weights lack {missing[0]}, which its config asks for")

    def add(self, folder: Path) -> None:
        """Puts an adapter onto the weights, in fp32: ``W + scale * B A``.

        Raises:
            ArtifactError, ModelError: it can't be read, or is not for this model.
        """
        adapter = adapters.read(folder)
        head, words = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is words.weight and _changes_one(adapter):
            head.weight = nn.Parameter(head.weight.detach().clone())
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key in {**adapter.replaced, **adapter.deltas}:
            name = _known(key, parameters)
            self._put(adapter, name, parameters[name], key)

    @torch.no_grad()
    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[np.ndarray]:
        """For each chat, what is likely after each of its positions, fp32 ``[positions, words]``."""
        for chat in chats:
            positions = torch.tensor(chat.positions)
            logits: Tensor = self.model(input_ids=torch.tensor([chat.ids]), logits_to_keep=positions).logits[0]
            yield torch.log_softmax(logits.float(), dim=-1).numpy()

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """Greedy answers to prompts, with the end token where they come to it."""
        if not prompts:
            return []
        size = max(map(len, prompts))
        ids = torch.tensor([[end] * (size - len(each)) + list(each) for each in prompts])
        seen = torch.tensor([[0] * (size - len(each)) + [1] * len(each) for each in prompts])
        # The model's own settings may sample, or punish repetition: what counts here is the likeliest token.
        settings: Any = transformers.GenerationConfig
        self.model.generation_config = settings()
        made = self.model.generate(
            input_ids=ids,
            attention_mask=seen,
            generation_config=settings(do_sample=False, max_new_tokens=longest, eos_token_id=end, pad_token_id=end),
        )
        return [_until(end, row[size:].tolist()) for row in made]


class LayeredModel(_Model):
    """A model of which one decoder layer at a time is in memory, beside embedding and head.

    Args:
        folder: in the hub's format, its tensors under the names that transformers has for them.

    Raises:
        SpaceError: the model is built otherwise, so that it would have to be in memory as a whole.
    """

    def __init__(self, folder: Path) -> None:
        from accelerate import init_empty_weights

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        factory: Any = transformers.AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            built: Any = factory.from_config(config, dtype=torch.float32)
        self.model = built.eval()
        self._files = TensorFiles(weight_files(folder))
        self._adapter: adapters.Adapter | None = None
        paths = {id(module): path for path, module in self.model.named_modules()}
        self._words = f"{paths[id(self.model.get_input_embeddings())]}.weight"
        self._head = f"{paths[id(self.model.get_output_embeddings())]}.weight"
        lists = [each for each in self.model.modules() if isinstance(each, nn.ModuleList)]
        layers = next((each for each in lists if len(each) == config.num_hidden_layers), None)
        names = [name for name, _ in self.model.named_parameters() if name != self._head]
        if layers is None or any(self._stored(name) is None for name in names):
            raise SpaceError(
                f"{folder.name}: comparing computes in fp32, which takes {format_size(needed(folder) * _SPARE)}; "
                "less memory is free, and this model can't be read layer by layer",
                "Free some memory, or leave the comparison out with --no-compare.",
            )
        self._inside = f"{paths[id(layers)]}."
        for layer in layers:
            layer.register_forward_pre_hook(self._load)
            layer.register_forward_hook(self._unload)
        self._paths = paths

    def add(self, folder: Path) -> None:
        """Puts an adapter onto the weights whenever they are read; see `WholeModel.add`."""
        self._adapter = adapters.read(folder)
        names = {name: None for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for key in {**self._adapter.replaced, **self._adapter.deltas}:
            _known(key, names)

    @torch.no_grad()
    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[np.ndarray]:
        """See `WholeModel.log_probabilities`; each layer is read once for every few thousand tokens."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        self._load_what_stays()
        decoder = self.model.get_decoder()
        hidden: dict[int, Tensor] = {}
        for group in _groups(chats):
            longest = max(len(chats[each].ids) for each in group)
            ids = torch.tensor([chats[each].ids + [0] * (longest - len(chats[each].ids)) for each in group])
            rows = decoder(input_ids=ids, use_cache=False).last_hidden_state
            hidden |= {each: row[: len(chats[each].ids)].clone() for each, row in zip(group, rows, strict=True)}
        for number, chat in enumerate(chats):
            done = Output(last_hidden_state=hidden.pop(number)[None])
            decoder.forward = lambda *_, done=done, **__: done  # the model goes on from here to its logits
            try:
                positions = torch.tensor(chat.positions)
                logits = self.model(input_ids=torch.tensor([chat.ids]), logits_to_keep=positions).logits[0]
            finally:
                del decoder.forward
            yield torch.log_softmax(logits.float(), dim=-1).numpy()

    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """No answers: each of their tokens would read the whole model."""
        del end, longest
        return [None] * len(prompts)

    def _stored(self, name: str) -> str | None:
        return next((each for each in _spellings(name) if each in self._files), None)

    def _weight(self, name: str, stored: str | None = None) -> nn.Parameter:
        """A weight in fp32, with the adapter on it."""
        read = self._files.read(stored or self._stored(name) or name)
        weight = read.float() if read.dtype != torch.float32 else read.clone()
        if self._adapter is not None:
            for key in _spellings(name):
                self._put(self._adapter, name, weight, key)
        return nn.Parameter(weight, requires_grad=False)

    def _set(self, name: str, weight: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = weight

    def _load(self, layer: nn.Module, _: Any) -> None:
        path = self._paths[id(layer)]
        for name, _parameter in list(layer.named_parameters()):
            self._set(f"{path}.{name}", self._weight(f"{path}.{name}"))

    def _unload(self, layer: nn.Module, _: Any, __: Any) -> None:
        path = self._paths[id(layer)]
        for name, parameter in list(layer.named_parameters()):
            empty = torch.empty_like(parameter, device="meta")
            self._set(f"{path}.{name}", nn.Parameter(empty, requires_grad=False))

    def _load_what_stays(self) -> None:
        for name, _ in list(self.model.named_parameters()):
            if not name.startswith(self._inside) and name != self._head:
                self._set(name, self._weight(name))
        tied = self._stored(self._head) is None
        if tied and not (self._adapter is not None and _changes_one(self._adapter)):
            self._set(self._head, self.model.get_input_embeddings().weight)
        else:
            self._set(self._head, self._weight(self._head, self._stored(self._words) if tied else None))


def model_in(folder: Path) -> WholeModel | LayeredModel:
    """The model in a folder, whole where it fits into the free memory, else layer by layer.

    Raises:
        ArtifactError, SpaceError: see there.
    """
    return WholeModel(folder) if fits(folder) else LayeredModel(folder)


def _groups(chats: Sequence[ComparedChat]) -> Iterator[list[int]]:
    """Chats of about the same length, as many as make a few thousand tokens together with their padding."""
    group: list[int] = []
    for each in sorted(range(len(chats)), key=lambda number: len(chats[number].ids)):
        if group and (len(group) + 1) * len(chats[each].ids) > _GROUP_TOKENS:
            yield group
            group = []
        group.append(each)
    yield group


def _changes_one(adapter: adapters.Adapter) -> bool:
    """Whether the adapter is on one of embedding and head, and not meant for both."""
    changed = {*adapter.deltas, *adapter.replaced}
    on_one = any(name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")) for name in changed)
    return on_one and not adapter.config.get("ensure_weight_tying")


def _until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _spellings(name: str) -> tuple[str, ...]:
    """The names that a weight may have, each once: some models are saved without the outer module's name."""
    return tuple(dict.fromkeys((name, name.removeprefix("model."), f"model.{name}")))


def _known(name: str, parameters: Collection[str]) -> str:
    """The parameter that an adapter means.

    Raises:
        ArtifactError: there is none.
    """
    found = next((each for each in _spellings(name) if each in parameters), None)
    if found is None:
        raise ArtifactError(f"the adapter changes {name}, which the base model does not have")
    return found

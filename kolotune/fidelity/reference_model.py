"""A model in fp32 and its predictions: loaded whole where it fits into memory, else one decoder layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from kolotune.engines import few_rows
from kolotune.engines.exact_model import Watch
from kolotune.foundation.errors import ArtifactError, SpaceError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.free_memory import release_mapped
from kolotune.weights.adapter import LoraAdapter, read_adapter
from kolotune.weights.composite_models import language_module, model_class
from kolotune.weights.lora_delta import Delta
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.torch_tensors import TensorFiles
from kolotune.weights.weight_files import weight_files

from .chat_groups import group_chats, padded, shared_beginning
from .log_probabilities import losses_of
from .memory_needed import MEMORY_FACTOR, fits_into_memory, fp32_bytes
from .missing_weights import MissingWeightsError
from .packed_reference import have_equal_settings
from .tasks import ComparedChat

_library: Any = transformers  # most of its functions are not typed
_WHOLE_TOKENS, _LAYERED_TOKENS = 512, 4096  # of chats that are read together
_POSITIONS_AT_ONCE = 32
_PADDING = 1.1  # tokens, padding included, for each of the chats' own


class _AdaptedModel:
    """A model of transformers, with an adapter that is added to its weights.

    Attributes:
        model: the model.
        repeats: how many chats the tokens that are being read belong to.
    """

    model: Any
    repeats = 1
    _is_token: Tensor | None = None  # of the chats that are read together, [chats, longest]
    _hooks: Sequence[Any] = ()

    def close(self) -> None:
        """Free the memory."""
        del self.model

    def watch(self, watches: Mapping[str, Watch]) -> None:
        """See `MeasuredModel.watch`."""
        for hook in self._hooks:
            hook.remove()
        modules = {path: self._module(path) for path in watches}
        self._hooks = [
            module.register_forward_hook(self._shown_to(watches[path]))
            for path, module in modules.items()
            if isinstance(module, nn.Linear)
        ]

    def _shown_to(self, watch: Watch) -> Any:
        def show(module: nn.Linear, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            kept = self.real_inputs(inputs[0])
            computed = outputs[kept].reshape(-1, outputs.shape[-1])
            if module.bias is not None:
                computed = computed - module.bias
            watch(inputs[0][kept].reshape(-1, inputs[0].shape[-1]), computed, self.repeats)

        return show

    def real_inputs(self, inputs: Tensor) -> Tensor | slice:
        """Return which inputs of a module, ``[..., in]``, belong to tokens of chats: others are padding."""
        if self._is_token is not None and inputs.shape[:-1] == self._is_token.shape:
            return self._is_token
        return slice(None)

    def _oriented(self, name: str, delta: Delta) -> Delta:
        """The delta in the orientation of its module: GPT-2 keeps weights as [in, out], whatever the adapter says."""
        module = self._module(name.removesuffix(".weight"))
        if isinstance(module, nn.Linear):
            return dataclasses.replace(delta, transposed=False)
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            return dataclasses.replace(delta, transposed=True)
        return delta

    def _module(self, path: str) -> nn.Module | None:
        modules = dict(self.model.named_modules())
        return modules.get(path) or modules.get(f"model.{path}") or modules.get(path.removeprefix("model."))

    @torch.no_grad()
    def _add_to(self, weight: Tensor, adapter: LoraAdapter, name: str, key: str) -> None:
        """Change a weight in place by the adapter's entry `key`, if it has one."""
        if key in adapter.replaced:
            weight.copy_(torch.from_numpy(np.ascontiguousarray(adapter.replaced[key])))
        if key in adapter.added:
            weight.add_(torch.from_numpy(adapter.added[key]))
        if key in adapter.experts:
            experts = adapter.experts[key]
            update = torch.from_numpy(np.ascontiguousarray(experts.b)) @ torch.from_numpy(experts.a) * experts.scale
            is_transposed = getattr(self._module(name.rpartition(".")[0]), "is_transposed", False)
            if is_transposed or update.shape != weight.shape:
                update = update.transpose(1, 2)
            weight.add_(update)
        if key in adapter.deltas:
            delta = self._oriented(name, adapter.deltas[key])
            if delta.initial is not None:  # what the adapter started as was taken out of the weight
                whole = weight.numpy().copy()
                delta = delta.completed(lambda: [(slice(None), whole)])
            if delta.shape != tuple(weight.shape):
                raise ArtifactError(f"the adapter adds {delta.shape} to {name}, which is {tuple(weight.shape)}")
            weight.add_(torch.from_numpy(delta.rows(slice(None))))
            if delta.magnitude is not None:
                magnitude = torch.from_numpy(delta.magnitude).unsqueeze(0 if delta.transposed else 1)
                weight.mul_(magnitude / torch.linalg.norm(weight, dim=0 if delta.transposed else 1, keepdim=True))
        if key in adapter.token_rows:
            tokens = adapter.token_rows[key]
            weight[torch.from_numpy(tokens.indices)] = torch.from_numpy(np.ascontiguousarray(tokens.values))


class WholeModel(_AdaptedModel):
    """A model that is loaded whole.

    Args:
        folder: in the hub's format.

    Raises:
        MissingWeightsError: the folder lacks weights that its config requires.
        ArtifactError: it can't be loaded.
    """

    def __init__(self, folder: Path) -> None:
        try:
            config = _library.AutoConfig.from_pretrained(folder, local_files_only=True)
            model, missing = _filled(folder, config), []
            if model is None:
                model, loading = model_class(config).from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
                missing = sorted(map(str, loading["missing_keys"]))
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ArtifactError(f"{folder.name}: can't be loaded: {str(error).splitlines()[0]}") from error
        self.model = few_rows.speed_up(model.eval())
        if missing:
            raise MissingWeightsError(f"{folder.name}: its weights lack {missing[0]}, which its config requires")
        self._folder = folder

    @torch.no_grad()
    def read(self, folder: Path) -> bool:
        """See `MeasuredModel.read`."""
        entries = MappedTensors(weight_files(folder)).entries
        parameters = dict(self.model.named_parameters())
        names = {name: next((each for each in _spellings(name) if each in entries), None) for name in parameters}
        if not have_equal_settings(self._folder, folder) or len(entries) != len(parameters):
            return False
        if any(each is None or entries[each].shape != parameters[name].shape for name, each in names.items()):
            return False
        files = TensorFiles(weight_files(folder))
        for name, stored in names.items():
            assert stored is not None
            tensor = files.read(stored)
            parameters[name].copy_(tensor)
            release_mapped(tensor.data_ptr(), tensor.nbytes)
        return True

    def add(self, folder: Path) -> None:
        """Add an adapter to the weights, in fp32: ``W + scale * B A``.

        Raises:
            ArtifactError, ModelError: it can't be read, or is for a different model.
        """
        adapter = read_adapter(folder)
        rows = max([0, *(_rows_needed(adapter, key) for key in adapter.changed)])
        if rows > len(self.model.get_input_embeddings().weight):
            self.model.resize_token_embeddings(rows, mean_resizing=False)
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is embedding.weight and _unties(adapter):
            head.weight = nn.Parameter(head.weight.detach().clone())
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key in adapter.changed:
            name = _parameter_of(key, parameters)
            self._add_to(parameters[name], adapter, name, key)

    @torch.no_grad()
    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each chat's index with its predictions at its positions, fp32 ``[positions, vocabulary]``.

        Chats of like length are read together: what is behind a token does not change what is predicted at it. What
        all of them begin with is read once.
        """
        head = self.model.get_output_embeddings()
        for group in group_chats(chats, _WHOLE_TOKENS, _PADDING):
            begin, cache = self._read_beginning(chats, group)
            ids, self._is_token = padded(chats, group, begin)
            rows = torch.tensor([row for row, number in enumerate(group) for _ in chats[number].positions])
            at = torch.tensor([position - begin for number in group for position in chats[number].positions])
            hook = head.register_forward_pre_hook(lambda _, inputs, at=(rows, at): (inputs[0][at][None],))
            try:
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
                logits: Tensor = output.logits[0]
            finally:
                hook.remove()
                self._is_token = None
            start = 0
            for number in group:
                end = start + len(chats[number].positions)
                yield number, _log_softmax(logits[start:end]).numpy()
                start = end
            del output, logits  # before the next ones are computed

    def losses(self, chats: Sequence[ComparedChat]) -> list[float]:
        """See `MeasuredModel.losses`."""
        return losses_of(chats, self.log_probabilities(chats))

    def _read_beginning(self, chats: Sequence[ComparedChat], group: Sequence[int]) -> tuple[int, Any]:
        """Read what all chats of a group begin with; return its length, and keys and values for each chat, or None."""
        ids = shared_beginning(chats, group)
        if not ids or not self._has_plain_cache():
            return 0, None
        self.repeats = len(group)
        try:
            cache = self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
        finally:
            self.repeats = 1
        cache.batch_repeat_interleave(len(group))
        return len(ids), cache

    def _has_plain_cache(self) -> bool:
        """Whether the model keeps the keys and values of all tokens, and no window or state in place of them."""
        layers = transformers.DynamicCache(config=self.model.config).layers
        return bool(layers) and all(type(layer) is transformers.cache_utils.DynamicLayer for layer in layers)

    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """Return the ids of greedy answers; an answer that ends has the end token last."""
        return list(self._generate(prompts, end, longest, do_sample=False))

    def sampled_answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int, seed: int) -> list[list[int]]:
        """Return the ids of answers whose tokens are sampled from the model's distribution, by a seed."""
        torch.manual_seed(seed)
        return self._generate(prompts, end, longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], end: int, longest: int, **how: float) -> list[list[int]]:
        if not prompts:
            return []
        size, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[end] * (size - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        attention_mask = torch.tensor(
            [[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        # The model's own settings may sample in another way or penalize repetition.
        self.model.generation_config = _library.GenerationConfig()
        settings = _library.GenerationConfig(max_new_tokens=longest, eos_token_id=end, pad_token_id=end, **how)
        generated = self.model.generate(input_ids=ids, attention_mask=attention_mask, generation_config=settings)
        return [_until(end, row[size:].tolist()) for row in generated]


class LayeredModel(_AdaptedModel):
    """A model of which one decoder layer at a time is in memory, besides embedding and head.

    Args:
        folder: in the hub's format, with the tensor names that transformers uses.

    Raises:
        SpaceError: the model has another structure, so it can only be loaded whole.
    """

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = _without_weights(config)
        self.model = model.eval()
        self._files = TensorFiles(weight_files(folder))
        self._adapter: LoraAdapter | None = None
        paths = {id(module): path for path, module in self.model.named_modules()}
        self._embedding = f"{paths[id(self.model.get_input_embeddings())]}.weight"
        self._head = f"{paths[id(self.model.get_output_embeddings())]}.weight"
        lists = [module for module in language_module(model)[1].modules() if isinstance(module, nn.ModuleList)]
        count = config.get_text_config().num_hidden_layers
        layers = next((modules for modules in lists if len(modules) == count), None)
        names = [name for name, _ in self.model.named_parameters() if name != self._head]
        if layers is None or any(self._stored_name(name) is None for name in names):
            raise SpaceError(
                f"{folder.name}: comparing computes in fp32, which takes "
                f"{format_size(fp32_bytes(folder) * MEMORY_FACTOR)}; less memory is free, and this model can't be "
                "read layer by layer",
                "Free some memory, or skip the comparison with --no-compare.",
            )
        self._layers_path = f"{paths[id(layers)]}."
        for layer in layers:
            layer.register_forward_pre_hook(self._load)
            layer.register_forward_hook(self._unload)
        self._paths = paths

    def add(self, folder: Path) -> None:
        """Add an adapter to the weights whenever they are read; see `WholeModel.add`."""
        self._adapter = read_adapter(folder)
        names = {name: None for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for key in self._adapter.changed:
            _parameter_of(key, names)

    @torch.no_grad()
    def log_probabilities(self, chats: Sequence[ComparedChat]) -> Iterator[tuple[int, np.ndarray]]:
        """See `WholeModel.log_probabilities`; each layer is read once for every few thousand tokens."""
        self._load_outside_layers()
        decoder = self.model.get_decoder()
        if decoder is self.model:  # Llama 4's does not find it
            decoder = self.model.get_submodule(self._layers_path.removesuffix(".").rpartition(".")[0])
        hidden: dict[int, Tensor] = {}
        for group in group_chats(chats, _LAYERED_TOKENS):
            ids, self._is_token = padded(chats, group)
            read = decoder(input_ids=ids, use_cache=False)
            kind = type(read)  # of a model with experts it has more fields, which the model asks for
            for number, state in zip(group, read.last_hidden_state, strict=True):
                hidden[number] = state[: len(chats[number].ids)].clone()
        self._is_token = None
        for number, chat in enumerate(chats):
            output = kind(last_hidden_state=hidden.pop(number)[None])
            decoder.forward = lambda *_, output=output, **__: output  # the model continues from here to its logits
            try:
                positions = torch.tensor(chat.positions)
                logits = self.model(input_ids=torch.tensor([chat.ids]), logits_to_keep=positions).logits[0]
            finally:
                del decoder.forward
            yield number, torch.log_softmax(logits.float(), dim=-1).numpy()

    def read(self, folder: Path) -> bool:
        """Take over no weights: they are read when they are needed."""
        del folder
        return False

    def losses(self, chats: Sequence[ComparedChat]) -> list[float]:
        """See `MeasuredModel.losses`."""
        return losses_of(chats, self.log_probabilities(chats))

    def answers(self, prompts: Sequence[Sequence[int]], end: int, longest: int) -> list[list[int] | None]:
        """Return no answers: every token of one would read the whole model."""
        del end, longest
        return [None] * len(prompts)

    def _stored_name(self, name: str) -> str | None:
        return next((spelling for spelling in _spellings(name) if spelling in self._files), None)

    def _weight(self, name: str, stored: str | None = None) -> nn.Parameter:
        """A weight in fp32, with the adapter added."""
        read = self._files.read(stored or self._stored_name(name) or name)
        weight = read.float() if read.dtype != torch.float32 else read.clone()
        if self._adapter is not None:
            missing = max(_rows_needed(self._adapter, key) for key in _spellings(name)) - len(weight)
            if missing > 0:
                weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
            for key in _spellings(name):
                self._add_to(weight, self._adapter, name, key)
        return nn.Parameter(weight, requires_grad=False)

    def _set(self, name: str, weight: nn.Parameter) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = weight

    def _load(self, layer: nn.Module, _: object) -> None:
        path = self._paths[id(layer)]
        for name, _parameter in list(layer.named_parameters()):
            self._set(f"{path}.{name}", self._weight(f"{path}.{name}"))

    def _unload(self, layer: nn.Module, _: object, __: object) -> None:
        path = self._paths[id(layer)]
        for name, parameter in list(layer.named_parameters()):
            empty = torch.empty_like(parameter, device="meta")
            self._set(f"{path}.{name}", nn.Parameter(empty, requires_grad=False))

    def _load_outside_layers(self) -> None:
        for name, _ in list(self.model.named_parameters()):
            if not name.startswith(self._layers_path) and name != self._head:
                self._set(name, self._weight(name))
        tied = self._stored_name(self._head) is None
        if tied and not (self._adapter is not None and _unties(self._adapter)):
            self._set(self._head, self.model.get_input_embeddings().weight)
        else:
            self._set(self._head, self._weight(self._head, self._stored_name(self._embedding) if tied else None))


def _filled(folder: Path, config: Any) -> Any:
    """Load a model weight by weight, so that its files are not in memory beside it.

    Returns:
        None where transformers does more than that: the files have other names, other shapes, or other tensors.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None
    model = _without_weights(config)
    entries, files = MappedTensors(weight_files(folder)).entries, TensorFiles(weight_files(folder))
    owners = {
        f"{path}.{leaf}" if path else leaf: (module, leaf, parameter.shape)
        for path, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    head = next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), None)
    # The text's part of a composite config may not have the setting; then it is that of the whole.
    settings = (config.get_text_config(), config)
    ties = next((part.tie_word_embeddings for part in settings if hasattr(part, "tie_word_embeddings")), False)
    is_tied = bool(ties) and f"{head}.weight" not in entries
    if is_tied:
        owners.pop(f"{head}.weight", None)
    if set(owners) != set(entries) or any(shape != entries[name].shape for name, (*_, shape) in owners.items()):
        return None
    for name, (module, leaf, _) in owners.items():
        module._parameters[leaf] = nn.Parameter(files.copy(name, torch.float32), requires_grad=False)
    if is_tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _log_softmax(logits: Tensor) -> Tensor:
    """Return the log-probabilities of ``logits [positions, vocabulary]``, fp32, in their memory if they are that."""
    result = logits.float()
    for rows in torch.split(result, _POSITIONS_AT_ONCE):
        rows.copy_(torch.log_softmax(rows, dim=-1))
    return result


def _without_weights(config: Any) -> Any:
    """Return a model of transformers whose weights have shapes only."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return model_class(config).from_config(config, dtype=torch.float32)


def open_model(folder: Path) -> WholeModel | LayeredModel:
    """Open the model in a folder: whole where it fits into free memory, else layer by layer.

    Raises:
        ArtifactError, SpaceError: see `WholeModel` and `LayeredModel`.
    """
    return WholeModel(folder) if fits_into_memory(folder) else LayeredModel(folder)


def _rows_needed(adapter: LoraAdapter, key: str) -> int:
    """Return how many rows an embedding or head must have for an adapter with new tokens; 0 for other weights."""
    if key in adapter.token_rows:
        return int(adapter.token_rows[key].indices.max(initial=-1)) + 1
    is_vocabulary = key.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight"))
    return len(adapter.replaced[key]) if is_vocabulary and key in adapter.replaced else 0


def _unties(adapter: LoraAdapter) -> bool:
    """Whether the adapter changes only one of embedding and head, so that they no longer share their weights."""
    changed = {*adapter.deltas, *adapter.replaced}
    changes_one = any(name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight")) for name in changed)
    return changes_one and not adapter.config.ties_weights


def _until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _spellings(name: str) -> tuple[str, ...]:
    """The names that a weight may have: some models are saved without the outer module's name."""
    return tuple(dict.fromkeys((name, name.removeprefix("model."), f"model.{name}")))


def _parameter_of(name: str, parameters: Collection[str]) -> str:
    """The name of the parameter that an adapter changes.

    Raises:
        ArtifactError: the model does not have it.
    """
    parameter = next((spelling for spelling in _spellings(name) if spelling in parameters), None)
    if parameter is None:
        raise ArtifactError(f"the adapter changes {name}, which the base model does not have")
    return parameter

"""The two models of a training step: hand-written passes over packed sequences, or transformers with autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kolotune.foundation import hardware
from kolotune.foundation.errors import TrainingError
from kolotune.foundation.installation import install_command
from kolotune.weights.composite_models import is_composite, language_module, model_class
from kolotune.weights.model_config import read_model_config
from kolotune.weights.model_shape import DTYPE_BYTES, AdapterShape, read_shape

from ..job import TrainJob
from ..memory import BatchShape
from ..prepared_tokens import IGNORED, PreparedTokens
from . import expert_lora, llama, lora, saved_modules, sharding, supported_models
from .device_operations import DeviceOperations
from .embedding_noise import PaddedNoise
from .kernels import build
from .kernels.compiled_operations import CompiledOperations
from .lora_settings import LoraSettings
from .memory import layer_activation_bytes, offloads_on_gpu, recomputes_on_gpu, transformers_activation_bytes
from .offloading import HostInputs
from .operations import Operations, PlainOperations
from .padded_batch import pad_batch
from .sequence_packing import PackedSequence, costs, group_by_length, pack, token_budget
from .token_rows import NewTokenRows
from .transfers import sum_dtype, to_device

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Numbers that a layer keeps per token for the backward pass, in multiples of the hidden size (measured on SmolLM2, less
# what is computed again since).
_ACTIVATIONS_KEPT = 15


class TrainingModel(Protocol):
    """A base model with new adapters, and how its gradients are computed."""

    backoffs: int
    """How many times memory ran out; each time halves the number of chats that are computed at once."""

    @property
    def adapters(self) -> Mapping[str, lora.Trained]:
        """Adapters by the full names of their layers, in the model's order; then experts', token rows, and modules
        that are trained whole."""

    @property
    def flat(self) -> lora.FlatAdapters:
        """The adapters' matrices as one flat tensor."""

    @property
    def language_model(self) -> str:
        """The name of the module that is trained, in a composite model; "" where it is the whole model."""

    @property
    def saved_names(self) -> Sequence[str]:
        """The names by which PEFT finds the modules that are trained whole."""

    @property
    def tied_ends(self) -> tuple[str, str] | None:
        """The full names of embedding and head if both are trained whole, as one."""

    @property
    def reason_slow(self) -> str:
        """Why the hand-written passes can't compute this model; "" if they do, or would not be used here anyway."""

    @property
    def kernels(self) -> str:
        """The name of the compiled kernels, which depends on all that their machine code does; "" without kernels."""

    def groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[list[int]]:
        """Split chats into groups that are computed at once: of chats or of sequences, as `backward` takes them."""

    def costs(self, tokens: PreparedTokens, indices: Sequence[int]) -> dict[int, float]:
        """Return the cost of each chat, in tokens, so that processes get equal shares."""

    def backward(self, tokens: PreparedTokens, group: Sequence[int], factor: float) -> Tensor:
        """Add ``factor`` times the gradient of a group's weighted loss to the adapters' gradients; return that sum.

        It is ``[]``, in `transfers.sum_dtype`, and stays on the device: reading it waits for the device.
        """

    def loss(self, tokens: PreparedTokens, group: Sequence[int]) -> Tensor:
        """Return the sum of the cross-entropy of a group's labels, each by its weight, without dropout, ``[]``."""

    def updated(self) -> None:
        """Take over new values of the adapters; called after each change."""

    def reset(self) -> None:
        """Give magnitudes, if there are some, the values with which they change nothing, and take them over."""


def open_model(job: TrainJob, device: str, longest: int) -> TrainingModel:
    """Load the job's base model with new adapters, initialized from the job's seed.

    Args:
        job: the training.
        device: "cpu", "cuda" or "mps".
        longest: tokens of the longest chat.

    Raises:
        TrainingError: the base can't be loaded.
        ConfigError: a target is not a linear layer of the base.
    """
    if job.sharded:
        return TransformersModel(job, device)
    reason = supported_models.reason_unsupported(Path(job.base_model), longest)
    if job.modules_to_save:
        reason = "modules are trained whole (--modules-to-save)"
    return TransformersModel(job, device, reason) if reason else PackedModel(job, device)


class PackedModel:
    """Models of the families that `decoder` computes.

    Args:
        job: the training.
        device: "cpu", "cuda" or "mps".
        operations: what computes them; None for what the device has.
    """

    reason_slow = ""
    language_model = ""
    saved_names: Sequence[str] = ()
    tied_ends: tuple[str, str] | None = None

    def __init__(self, job: TrainJob, device: str = "cpu", operations: Operations | None = None) -> None:
        torch.manual_seed(job.seed)
        self.backoffs, self._size, self._device = 0, job.batch_size, torch.device(device)
        self._dtype, self._in_4bit, dtype = job.dtype, job.load_in_4bit, _DTYPES[job.dtype]
        library = build.ensure(job.dtype) if job.compile and device == "cpu" and operations is None else None
        self.kernels = library.stem if library else ""
        if operations is None:
            operations = _operations(library, dtype) if device == "cpu" else DeviceOperations()
        self._budget = token_budget(device)
        options = (LoraSettings.of(job), job.target_modules, job.target_parameters)
        self.decoder, self.adapters = llama.load(
            Path(job.base_model), operations, dtype, *options, self._device, job.load_in_4bit, job.new_tokens
        )
        names = {id(pair): name for name, pair in self.adapters.items()}
        order = [
            (names[id(pair)], part)
            for layer in self.decoder.layers
            for linear in layer.linears
            for part in (lora.A, lora.B, lora.MAGNITUDE)
            for pair, _, _ in linear.parts
            if part in lora.parts_of(pair)
        ]
        experts = expert_lora.among(self.adapters)
        order += [(name, part) for name in experts for part in (lora.A, lora.B)]
        order += [
            (name, part)
            for name, each in self.adapters.items()
            if isinstance(each, NewTokenRows)
            for part in each.parts
        ]
        for pair in self.adapters.values():
            pair.to(self._device)
        self.flat = lora.FlatAdapters(self.adapters, order)
        self.decoder.join(self.flat)
        self._noise = job.neftune_noise_alpha
        self._shares = not (job.lora_dropout or job.neftune_noise_alpha)
        self._shape = shape = read_shape(Path(job.base_model))
        self._adapter = AdapterShape.of_options(shape, job)
        self._label = shape.vocabulary_size * shape.hidden_size / max(1, shape.layer_weight_count)
        self.reset()
        self._free = hardware.free_on(device)  # asked once: later the step's own memory would count

    def costs(self, tokens: PreparedTokens, indices: Sequence[int]) -> dict[int, float]:
        """Return the cost of each chat; a logit costs as much as the head's share of the layers' weights."""
        return costs(tokens, indices, self._shares, self._label)

    def groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[list[int]]:
        """Group chats by length, within a budget of tokens."""
        if not self.backoffs:
            return group_by_length(tokens, indices, self._shares, self._budget)
        most = max(1, self._size >> self.backoffs)
        groups = group_by_length(tokens, indices, self._shares, self._budget >> self.backoffs)
        return [group[at : at + most] for group in groups for at in range(0, len(group), most)]

    def backward(self, tokens: PreparedTokens, group: Sequence[int], factor: float) -> Tensor:
        packed = pack(tokens, group, self._shares)
        recompute = self._recomputes(packed)
        inputs = HostInputs(self._device) if recompute and self._offloads(packed) else None
        return self.decoder.backward(self._on_device(packed), factor, recompute, self._noise, inputs=inputs)

    def loss(self, tokens: PreparedTokens, group: Sequence[int]) -> Tensor:
        return self.decoder.loss(self._on_device(pack(tokens, group, True)))

    def label_losses(self, tokens: PreparedTokens, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each label of some chats, without dropout, and the number of its sequence.

        Both are ``[labels]`` and on the host.
        """
        packed = pack(tokens, group, True)
        return self.decoder.label_losses(self._on_device(packed)).cpu(), packed.sequences

    def backward_from(
        self, tokens: PreparedTokens, group: Sequence[int], derivative: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Add the gradient of a loss that is no sum over labels to the adapters' gradients.

        Args:
            tokens: all chats.
            group: the chats to compute.
            derivative: gets what `label_losses` returns, with dropout; returns the derivative of the loss with respect
                to each label's cross-entropy.
        """
        packed = pack(tokens, group, self._shares)
        recompute = self._recomputes(packed)
        self.decoder.backward(
            self._on_device(packed),
            1.0,
            recompute,
            self._noise,
            lambda losses: to_device(derivative(losses.cpu(), packed.sequences), self._device),
            HostInputs(self._device) if recompute and self._offloads(packed) else None,
        )

    def updated(self) -> None:
        self.decoder.refresh()

    def reset(self) -> None:
        self.decoder.refresh()
        self.decoder.reset()

    def _on_device(self, packed: PackedSequence) -> PackedSequence:
        return packed.to(self._device, self.decoder.embedding.device)

    def _recomputes(self, packed: PackedSequence) -> bool:
        """Return whether to recompute activations: keeping them takes more than half of the free memory, or did."""
        if self.backoffs:
            return True
        if self._device.type == "cuda":
            batch, width = packed.batch_shape(unpadded=True), DTYPE_BYTES[self._dtype]
            return recomputes_on_gpu(self._shape, self._adapter, batch, width, self._free, in_4bit=self._in_4bit)
        import psutil

        tokens, layers = len(packed.ids), len(self.decoder.layers)
        if self._shape.experts_per_token:
            batch = packed.batch_shape(bool(self.kernels))
            needed = layers * layer_activation_bytes(self._shape, self._adapter, batch, DTYPE_BYTES[self._dtype])
            return needed > psutil.virtual_memory().available // 2
        width = self._shape.hidden_size * DTYPE_BYTES[self._dtype]
        needed = tokens * width * _ACTIVATIONS_KEPT * layers
        needed += tokens * layers * self._adapter.scaled_outputs(self._shape) * DTYPE_BYTES[self._dtype]
        return needed > psutil.virtual_memory().available // 2

    def _offloads(self, packed: PackedSequence) -> bool:
        """Return whether the host keeps the layers' inputs: where activations are recomputed, and they don't fit."""
        if self._device.type != "cuda":
            return False
        batch, width = packed.batch_shape(unpadded=True), DTYPE_BYTES[self._dtype]
        return offloads_on_gpu(self._shape, self._adapter, batch, width, self._free, in_4bit=self._in_4bit)


def _operations(library: Path | None, dtype: torch.dtype) -> Operations:
    return CompiledOperations(library, dtype) if library else PlainOperations()


class TransformersModel:
    """Any causal language model of transformers, with autograd. Its groups are of sequences; nothing is shared."""

    kernels = ""

    def __init__(self, job: TrainJob, device: str, reason_slow: str = "") -> None:
        self.backoffs, self.reason_slow = 0, reason_slow
        self._device, self._size = device, job.batch_size
        folder = Path(job.base_model)
        is_sharded = job.sharded
        self.model = sharding.without_weights(folder, _DTYPES[job.dtype]) if is_sharded else load_model(job, device)
        arguments = inspect.signature(self.model.forward).parameters
        self._keeps_logits = "logits_to_keep" in arguments
        self._says_what_is_text = "token_type_ids" in arguments and is_composite(read_model_config(folder))
        self.language_model = language_module(self.model)[0]
        torch.manual_seed(job.seed)
        settings = LoraSettings.of(job)
        self.adapters: dict[str, lora.Trained] = {
            **lora.add_adapters(self.model, settings, job.target_modules),
            **expert_lora.add_expert_adapters(self.model, settings, job.target_parameters),
            **saved_modules.train_whole(self.model, job.modules_to_save),
        }
        self.saved_names = saved_modules.peft_names(self.model, self.adapters)
        self.tied_ends = saved_modules.tied_ends(self.model) if job.modules_to_save else None
        if is_sharded:
            trained: list[nn.Parameter] = [
                getattr(adapter, part) for adapter in self.adapters.values() for part in lora.parts_of(adapter)
            ]
            sharding.shard(self.model, folder, trained, device)
        self._shape, self._width, self._sharded = read_shape(folder), DTYPE_BYTES[job.dtype], is_sharded
        self._adapter = AdapterShape.of_options(self._shape, job)
        self._noise = PaddedNoise(self.model, job.neftune_noise_alpha)
        order = [(name, part) for name, each in self.adapters.items() for part in lora.parts_of(each)]
        self.flat = lora.FlatAdapters(self.adapters, order)

    def costs(self, tokens: PreparedTokens, indices: Sequence[int]) -> dict[int, float]:
        """Return the length of each chat's sequences; logits and padding do not count."""
        return {index: tokens.unshared_length(index) for index in indices}

    def groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[list[int]]:
        """Group the chats' sequences in the given order, by the size of a micro-batch."""
        size = max(1, self._size >> self.backoffs)
        sequences = [number for index in indices for number in tokens.sequences(index)]
        return [sequences[at : at + size] for at in range(0, len(sequences), size)]

    def backward(self, tokens: PreparedTokens, group: Sequence[int], factor: float) -> Tensor:
        self.model.train()
        self._keep_or_recompute(tokens, group)
        loss = self._loss(tokens, group)
        (loss * factor).backward()  # type: ignore[no-untyped-call]
        return loss.detach().to(sum_dtype(loss.device))

    def _keep_or_recompute(self, tokens: PreparedTokens, group: Sequence[int]) -> None:
        """Choose between keeping and recomputing activations; the result is the same.

        They are recomputed if keeping them takes more than half of the free memory, or if memory is known to be short.
        """
        model: Any = self.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            return
        longest = max(map(tokens.sequence_length, group))
        row = BatchShape(len(group) * longest, len(group), longest, 0, 0, padded=False)
        kept = transformers_activation_bytes(self._shape, self._adapter, row, self._width)
        if self._sharded or self.backoffs or kept > hardware.free_on(self._device) // 2:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    @torch.no_grad()
    def loss(self, tokens: PreparedTokens, group: Sequence[int]) -> Tensor:
        self.model.eval()
        loss = self._loss(tokens, group)
        return loss.to(sum_dtype(loss.device))

    def updated(self) -> None:
        """Do nothing: the layers read the adapters themselves."""

    def reset(self) -> None:
        for adapter in self.adapters.values():
            if isinstance(adapter, lora.LoraLinear):
                adapter.reset()

    def _loss(self, tokens: PreparedTokens, group: Sequence[int]) -> Tensor:
        """Return the weighted, summed cross-entropy, fp32 ``[]``; logits are computed only where a label is next."""
        batch = pad_batch(tokens, group).to(self._device)
        self._noise.lengths = batch.lengths
        kept = {"logits_to_keep": batch.positions} if self._keeps_logits else {}
        if self._says_what_is_text:
            kept["token_type_ids"] = torch.zeros_like(batch.ids)  # Gemma 3 asks for it in training
        logits: Tensor = self.model(input_ids=batch.ids, use_cache=False, **kept).logits
        if not self._keeps_logits:
            logits = logits[:, batch.positions]
        flat, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        if batch.weights is None:
            return nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
        losses = nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="none")
        return (losses * batch.weights.flatten()).sum()


def load_model(job: TrainJob, device: str) -> nn.Module:
    """Load the base model in the job's dtype; `lora.add_adapters` freezes it.

    Raises:
        TrainingError: transformers can't load it, or bitsandbytes is missing.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    dtype = _DTYPES[job.dtype]
    options: dict[str, Any] = {"dtype": dtype}
    if job.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    try:
        config = AutoConfig.from_pretrained(job.base_model, local_files_only=True, trust_remote_code=False)
        model: Any = model_class(config).from_pretrained(
            job.base_model, use_safetensors=True, local_files_only=True, trust_remote_code=False, **options
        )
    except ImportError as error:
        raise TrainingError(
            f"the base model can't be loaded: {error}", f"To install it, {install_command('four-bit')}."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"the base model can't be loaded: {str(error).splitlines()[0]}") from error
    if not job.load_in_4bit:
        model.to(device)
    module: nn.Module = model
    return module

"""A model of transformers without weights, which are given to it one layer at a time from its GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ToolchainError

from .conversion_plan import TensorPlan
from .stored_values import StoredValues

if TYPE_CHECKING:
    from torch import Tensor, nn


class UnloadedModel:
    """A model whose weights take no memory yet, and where its GGUF has them.

    Args:
        config: folder with the model's config.json.
        tensors: how each tensor of the GGUF is made from the model's.

    Attributes:
        decoder: all that comes before the head.
        layers: its layers.
        embedding: the decoder's embedding of tokens.

    Raises:
        ToolchainError: the model is of a kind whose layers can't be computed one by one.
    """

    def __init__(self, config: Path, tensors: Sequence[TensorPlan]) -> None:
        self._model = _empty_model(config)
        self._plans = {plan.source: plan for plan in tensors if plan.source is not None}
        decoder = self._model.get_decoder()
        lists = [module for module in decoder.modules() if type(module).__name__ == "ModuleList"]
        count = self._model.config.get_text_config().num_hidden_layers
        layers = next((modules for modules in lists if len(modules) == count), None)
        if layers is None:
            raise _unknown("it has no list of layers")
        self.decoder, self.layers = decoder, layers
        self.embedding: Any = decoder.get_input_embeddings()
        self._paths = {id(module): path for path, module in self._model.named_modules()}
        for name in self.names_in(self.decoder):
            self.plan_of(name)

    def names_in(self, module: nn.Module) -> list[str]:
        """Return the names of a module's parameters."""
        path = self._paths[id(module)]
        return [f"{path}.{name}" if path else name for name, _ in module.named_parameters()]

    def owner_of(self, name: str) -> nn.Module:
        """Return the module that has a parameter."""
        owner: nn.Module = self._model.get_submodule(name.rpartition(".")[0])
        return owner

    def plan_of(self, name: str) -> TensorPlan:
        """Return where the GGUF has a parameter.

        Raises:
            ToolchainError: it has none of that name.
        """
        spellings = (name, name.removeprefix("model."), f"model.{name}", name.removeprefix("transformer."))
        plan = next((self._plans[each] for each in spellings if each in self._plans), None)
        if plan is None:
            raise _unknown(f"its GGUF is not made from {name}")
        return plan

    @property
    def embedding_name(self) -> str:
        """The name of the embedding's parameter."""
        return f"{self._paths[id(self.embedding)]}.weight"

    @property
    def head_plan(self) -> TensorPlan:
        """Where the GGUF has the head; of a tied one, where it has the embedding."""
        head = self._paths.get(id(self._model.get_output_embeddings()))
        return self._plans.get(f"{head}.weight") or self.plan_of(self.embedding_name)

    def head_weight(self, values: StoredValues) -> Tensor:
        """Return the head's weight in a GGUF, fp32 ``[vocabulary, columns]``."""
        import torch

        return torch.from_numpy(values.whole(self.head_plan.name))

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Return what the model makes of its head's outputs, by the settings of transformers that are about that."""
        config = self._model.config.get_text_config()
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if not cap else (logits / cap).tanh() * cap

    def set(self, name: str, weight: Tensor) -> None:
        """Give a parameter another value."""
        from torch import nn

        self.owner_of(name)._parameters[name.rpartition(".")[2]] = nn.Parameter(weight, requires_grad=False)

    def load(self, name: str, values: StoredValues) -> None:
        """Give a parameter the values of a GGUF, in the model's order of rows."""
        import numpy as np
        import torch

        plan = self.plan_of(name)
        weight = values.whole(plan.name)
        if plan.added:
            weight -= np.float32(plan.added)
        if plan.order is not None:
            ordered = np.empty_like(weight)
            ordered[np.array(plan.order)] = weight
            weight = ordered
        self.set(name, torch.from_numpy(weight))

    def drop(self, module: nn.Module) -> None:
        """Take the values of a module's parameters away, to free their memory."""
        import torch

        for name in self.names_in(module):
            self.set(name, torch.empty(0, device="meta"))


def _empty_model(folder: Path) -> Any:
    """Return a model of transformers whose weights take no memory."""
    import transformers
    from accelerate import init_empty_weights

    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights(include_buffers=False):
            model = library.AutoModelForCausalLM.from_config(config, dtype="float32")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _unknown(str(error).splitlines()[0]) from error
    return model.eval()


def _unknown(reason: str) -> ToolchainError:
    return ToolchainError(
        f"this model can't be quantized layer by layer: {reason}", "Quantize it with `--quantizer ggml`."
    )

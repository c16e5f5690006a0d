"""Measure how much each matrix of a GGUF loses in each type: ``python -m … JOB``.

What counts is what the model predicts. With a rounding error E of a matrix, whose inputs are x and at whose outputs the
log-probability of the next tokens has the gradient g, the KL divergence grows by half the mean of ``(g · E x)²``: the
Fisher information along E, with next tokens that are sampled from the model's own predictions. ``g · E x`` is kept for
each token and type, since errors of several matrices may add up: where the base lies on a quantization grid, all of
them take the training back together.

The model is computed layer by layer, as transformers does it: forward, keeping what goes into each layer, and backward
from the last layer to the first, with one layer's weights and gradients in memory at a time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation import typed_storage
from kolotune.runners import child_process

from . import importance_matrix
from .conversion_plan import TensorPlan
from .error_feedback import is_compensable
from .layered_model import UnloadedModel
from .rounding_effects import RoundingEffects, effect, rounding_errors
from .stored_values import StoredValues
from .type_choices import part_of, possible_types, write_sensitivity

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 768
"""At most so many tokens are looked at."""
TOKENS_AT_ONCE = 256
"""Tokens whose probabilities are in memory."""
_SEED = 0
_FEEDBACK_LAYERS = (0.25, 0.75)


@dataclass(frozen=True)
class SensitivityJob:
    """What to measure.

    Attributes:
        source: the unquantized GGUF.
        target: the file to write; see `type_choices`.
        config: folder with the model's config.json.
        rows: tokens, all rows of the same length.
        tensors: how each tensor of the GGUF is made from the model's.
        matrix: the importance matrix; "": none.
        is_compensated: rounding errors will be compensated.
        key: hash of all that the result depends on; written beside it.
    """

    source: str
    target: str
    config: str
    rows: list[list[int]]
    tensors: list[TensorPlan]
    matrix: str
    is_compensated: bool
    key: str


def main(arguments: list[str]) -> int:
    """Measure, or with ``--check`` only check that it is possible; return the exit code."""
    file, *options = arguments
    return child_process.carry_out(
        lambda: (check if "--check" in options else measure)(typed_storage.read(SensitivityJob, Path(file)))
    )


def check(job: SensitivityJob) -> None:
    """Check that the model of a job can be computed layer by layer; its files need not exist.

    Raises:
        ToolchainError: it can't.
    """
    UnloadedModel(Path(job.config), job.tensors)


def measure(job: SensitivityJob) -> None:
    """Carry out a job; report each layer.

    Raises:
        ToolchainError: the model is of a kind whose layers can't be computed one by one.
        ArtifactError: the GGUF or the importance matrix is damaged.
    """
    with StoredValues(Path(job.source)) as source:
        _Measurement(job, source).run()


@dataclass
class _LayerCall:
    """How a layer was called: what it computes on, and its other arguments."""

    hidden: Tensor
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class _Seen:
    """What a matrix saw: inputs ``[tokens, columns]`` and gradients at its outputs ``[tokens, rows]``."""

    inputs: Tensor
    gradients: Tensor | None = None


class _Measurement:
    """Goes through a model forward and backward, and measures its matrices on the way."""

    def __init__(self, job: SensitivityJob, source: StoredValues) -> None:
        import torch

        self._job, self._source = job, source
        self._model = UnloadedModel(Path(job.config), job.tensors)
        self._matrix = importance_matrix.read(Path(job.matrix)) if job.matrix else {}
        self._ids = torch.tensor(job.rows)
        count = self._ids.numel()
        self._tokens = torch.linspace(0, count - 1, min(count, TOKENS)).long()
        self._types = possible_types(source.summary())
        self._calls: list[_LayerCall] = []
        self._measured = RoundingEffects()

    def run(self) -> None:
        """Measure all, and write it."""
        import torch

        with torch.enable_grad():
            embedded, first, last, final = self._forward()
            gradients = _gradient(final, last, self._head(final.detach()))
            for number in reversed(range(len(self._calls))):
                child_process.emit("layer", done=len(self._calls) - 1 - number, of=len(self._calls))
                gradients = self._layer(number, gradients)
            self._embedding(gradients if first is embedded else _gradient(first, embedded, gradients))
        child_process.emit("layer", done=len(self._calls), of=len(self._calls))
        write_sensitivity(Path(self._job.target), self._job.key, self._measured, self._source.summary())

    def _forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the model; return what leaves the embedding, enters and leaves the layers, and enters the head."""
        import torch

        model, ends = self._model, {}
        in_layers = set(model.names_in(model.layers))
        for name in model.names_in(model.decoder):
            if name not in in_layers:
                model.load(name, self._source)

        def after_embedding(_: object, __: object, output: Tensor) -> Tensor:
            ends["embedded"] = output.detach().requires_grad_()
            return ends["embedded"]

        def before_layer(layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            hidden = arguments[0]
            ends.setdefault("first", hidden)
            self._calls.append(_LayerCall(hidden.detach(), arguments[1:], options))
            for name in model.names_in(layer):
                model.load(name, self._source)
            torch.set_grad_enabled(False)

        def after_layer(layer: nn.Module, _: object, output: Any) -> Any:
            torch.set_grad_enabled(True)
            model.drop(layer)
            hidden = output[0] if isinstance(output, tuple) else output
            ends["last"] = hidden.detach().requires_grad_(len(self._calls) == len(model.layers))
            return (ends["last"], *output[1:]) if isinstance(output, tuple) else ends["last"]

        hooks = [model.embedding.register_forward_hook(after_embedding)]
        for layer in model.layers:
            hooks.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
            hooks.append(layer.register_forward_hook(after_layer))
        final = model.decoder(input_ids=self._ids, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return ends["embedded"], ends["first"], ends["last"], final

    def _head(self, final: Tensor) -> Tensor:
        """Sample the next tokens, measure the head; return the gradient of their log-probability at its inputs."""
        import torch

        generator = torch.Generator().manual_seed(_SEED)
        weight, scaled = self._model.head_weight(self._source), self._model.scaled_logits
        inputs = final.reshape(-1, final.shape[-1])
        gradients = torch.empty_like(inputs)
        of_logits = []
        for start in range(0, len(inputs), TOKENS_AT_ONCE):
            some = slice(start, start + TOKENS_AT_ONCE)
            logits = (inputs[some] @ weight.T).requires_grad_()
            logs = torch.log_softmax(scaled(logits), dim=1)
            sampled = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            (of_some,) = torch.autograd.grad(logs.gather(1, sampled).sum(), logits)
            gradients[some] = of_some @ weight
            looked_at = self._tokens[(self._tokens >= start) & (self._tokens < start + len(of_some))] - start
            of_logits.append((looked_at + start, of_some[looked_at]))
        plan = self._model.head_plan
        with torch.no_grad():
            for kind in self._types.get(plan.name, ()):
                errors = self._errors(plan, weight, kind)
                effects = [effect(errors, inputs[at], of_some) for at, of_some in of_logits]
                self._measured.add(plan.name, kind, torch.cat(effects))
        return gradients.reshape(final.shape)

    def _embedding(self, gradients: Tensor) -> None:
        """Measure the embedding, of which the tokens' rows are used."""
        import torch

        plan, module = self._model.plan_of(self._model.embedding_name), self._model.embedding
        weight = module.weight.detach()
        tokens = self._ids.reshape(-1)[self._tokens]
        of_tokens = gradients.reshape(-1, gradients.shape[-1])[self._tokens]
        used = torch.unique(tokens)
        with torch.no_grad():
            for kind in self._types.get(plan.name, ()):
                errors = torch.zeros_like(weight)
                errors[used] = self._errors(plan, weight[used], kind)
                self._model.set(self._model.embedding_name, errors)
                self._measured.add(plan.name, kind, (module(tokens) * of_tokens).sum(dim=1))

    def _layer(self, number: int, gradients: Tensor) -> Tensor:
        """Measure a layer's matrices; return the gradient at its inputs."""
        import torch

        model, call, layer = self._model, self._calls[number], self._model.layers[number]
        matrices = {}
        for name in model.names_in(layer):
            model.load(name, self._source)
            plan, owner = model.plan_of(name), model.owner_of(name)
            if type(owner).__name__ == "Linear" and name.endswith(".weight") and plan.name in self._types:
                matrices[plan.name] = (plan, owner)
        seen: dict[str, list[_Seen]] = {name: [] for name in matrices}
        hooks = [owner.register_forward_hook(partial(_watch, seen[name])) for name, (_, owner) in matrices.items()]
        hidden = call.hidden.requires_grad_()
        output = layer(hidden, *call.arguments, **call.options)
        result = _gradient(output[0] if isinstance(output, tuple) else output, hidden, gradients)
        for hook in hooks:
            hook.remove()
        probes = {int(share * len(self._calls)) for share in _FEEDBACK_LAYERS}
        with torch.no_grad():
            for name, (plan, owner) in matrices.items():
                self._matrix_effects(plan, owner.get_parameter("weight").detach(), seen[name], number in probes)
        model.drop(layer)
        call.hidden = hidden.new_empty(0)  # frees the memory
        return result

    def _matrix_effects(self, plan: TensorPlan, weight: Tensor, seen: list[_Seen], is_probe: bool) -> None:
        import torch

        calls = [(each.inputs, each.gradients) for each in seen if each.gradients is not None]
        if not calls:
            return
        inputs, gradients = (torch.cat(parts) for parts in zip(*calls, strict=True))
        total = self._ids.numel()
        is_aligned = len(inputs) == total
        chosen = self._tokens if is_aligned else torch.linspace(0, len(inputs) - 1, min(len(inputs), TOKENS)).long()
        for kind in self._types[plan.name]:
            effects = effect(self._errors(plan, weight, kind), inputs[chosen], gradients[chosen])
            if is_aligned:
                self._measured.add(plan.name, kind, effects)
            else:
                self._measured.energies[plan.name, kind] = 0.5 * float(effects.square().mean()) * len(inputs) / total
            if is_probe and self._job.is_compensated and is_compensable(kind):
                self._measured.add_feedback(part_of(plan.name), kind, weight, inputs[chosen], gradients[chosen])

    def _errors(self, plan: TensorPlan, weight: Tensor, kind: str) -> Tensor:
        importance = self._matrix.get(plan.name)
        return rounding_errors(weight, kind, importance)


def _watch(seen: list[_Seen], _: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Note what goes into a matrix, and what comes back to its outputs."""
    visit = _Seen(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
    seen.append(visit)

    def note(gradients: Tensor) -> None:
        visit.gradients = gradients.reshape(-1, gradients.shape[-1])

    output.register_hook(note)  # type: ignore[no-untyped-call]


def _gradient(output: Tensor, at: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradient at a tensor, from that at what was computed with it."""
    import torch

    (result,) = torch.autograd.grad(output, at, gradients)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

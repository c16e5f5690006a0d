"""Fill the blocks of a quantized GGUF again, with error feedback: ``python -m … JOB``; see `error_feedback`.

The GGUF was quantized by ggml; types, header and everything outside of the layers' matrices stay. Calibration tokens go
through the model layer by layer, as transformers computes it, once with its exact weights and once with what is
written. When they reach a matrix, its inputs are those that the rounded weights before it give; it is rounded so that
its outputs come close to the exact ones, written into the file, and computed with what was written. One layer's weights
are in memory at a time, and the inputs of its matrices. Finished matrices are kept in a journal: after a kill the
next process resumes behind them, and computes the layers before with what was written.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError
from kolotune.runners import child_process

from .compensation_journal import CompensationJournal
from .conversion_plan import TensorPlan
from .exact_inputs import ExactInputs
from .layered_model import UnloadedModel
from .stored_values import StoredValues, dequantized

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .error_feedback import InputStatistics

_FEWEST_INPUTS = 0.25  # of the columns; a matrix that fewer tokens reach stays as ggml rounded it
_LAYER = "blk."


@dataclass(frozen=True)
class CompensationJob:
    """What to compensate.

    Attributes:
        source: the unquantized GGUF.
        target: the quantized one, changed in place.
        config: folder with the model's config.json.
        rows: calibration tokens, all rows of the same length.
        tensors: how each tensor of the GGUF is made from the model's.
        journal: the file that keeps finished matrices for a process that resumes; "": none.
        key: hash of what the blocks depend on beside the types.
    """

    source: str
    target: str
    config: str
    rows: list[list[int]]
    tensors: list[TensorPlan]
    journal: str = ""
    key: str = ""


def main(arguments: list[str]) -> int:
    """Compensate, or with ``--check`` only check that it is possible; return the exit code."""
    file, *options = arguments
    task = check if "--check" in options else compensate
    return child_process.carry_out(lambda: task(typed_storage.read(CompensationJob, Path(file))))


def check(job: CompensationJob) -> None:
    """Check that the model of a job can be computed layer by layer; its files need not exist.

    Raises:
        ToolchainError: it can't.
    """
    UnloadedModel(Path(job.config), job.tensors)


def compensate(job: CompensationJob) -> None:
    """Carry out a job; report each layer, and the compensated tensors at the end.

    Raises:
        ToolchainError: the model is of a kind whose layers can't be computed one by one.
        ArtifactError: a file is damaged, or what was written is not what was computed.
    """
    import torch

    with torch.no_grad(), StoredValues(Path(job.source)) as source, StoredValues(Path(job.target)) as before:
        compensated = _LayerByLayer(job, source, before)
        compensated.run()
    with StoredValues(Path(job.target)) as after:
        for name, written in compensated.written.items():
            if after.digest(name) != written:
                raise ArtifactError(f"{job.target}: {name} is not what was written", "Quantize again.")
    child_process.emit("compensated", tensors=sorted(compensated.written))


class _Reached(Exception):
    """The first layer was reached, with these hidden states ``[rows, tokens, width]``."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _LayerByLayer:
    """Gives the decoder layers of a model their weights, rounds and computes them, one after another.

    Attributes:
        written: hashes of the tensors that were written.
    """

    def __init__(self, job: CompensationJob, source: StoredValues, quantized: StoredValues) -> None:
        import torch

        self._target, self._source, self._quantized = Path(job.target), source, quantized
        self._model = UnloadedModel(Path(job.config), job.tensors)
        self._ids = torch.tensor(job.rows)
        self._exact: ExactInputs | None = None
        self._statistics: tuple[Tensor, InputStatistics] | None = None
        self._hooks: dict[str, Any] = {}
        types = [(name, tensor.type) for name, tensor in quantized.tensors.items()]
        key = hashlib.sha256(f"{job.key}{types}".encode()).hexdigest()
        self._journal = CompensationJournal(Path(job.journal) if job.journal else None, key)
        self.written: dict[str, str] = {}

    def run(self) -> None:
        """Round all layers."""
        model = self._model
        in_layers = set(model.names_in(model.layers))
        outside = [name for name in model.names_in(model.decoder) if name not in in_layers]
        self._exact = ExactInputs(self._into_the_first_layer(outside))
        model.drop(model.embedding)  # so that not both of its forms are in memory
        for name in outside:
            model.load(name, self._quantized)
        for number, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
            layer.register_forward_hook(self._after_layer)
        model.decoder(input_ids=self._ids, use_cache=False)
        child_process.emit("layer", done=len(model.layers), of=len(model.layers))

    def _into_the_first_layer(self, outside: list[str]) -> Tensor:
        """Return the hidden states that the exact weights outside of the layers make of the tokens."""
        for name in outside:
            self._model.load(name, self._source)

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            raise _Reached(arguments[0])

        handle = self._model.layers[0].register_forward_pre_hook(stop)
        try:
            self._model.decoder(input_ids=self._ids, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("a decoder calls its first layer")

    def _before_layer(self, number: int) -> Any:
        def load(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            assert self._exact is not None
            child_process.emit("layer", done=number, of=len(self._model.layers))
            if number == 0:
                self._model.drop(self._model.embedding)
            names = self._model.names_in(layer)
            rounded = {name: self._model.owner_of(name) for name in names if self._is_rounded(name)}
            for name in names:
                self._model.load(name, self._source)
            self._exact.run(layer, rounded, arguments[1:], named)
            for name in names:
                if name not in rounded:
                    self._model.load(name, self._quantized)
            for name, module in rounded.items():
                self._hooks[name] = module.register_forward_pre_hook(self._round(name))

        return load

    def _is_rounded(self, name: str) -> bool:
        from torch import nn

        from .error_feedback import is_compensable

        plan = self._model.plan_of(name)
        is_matrix = isinstance(self._model.owner_of(name), nn.Linear) and name.endswith(".weight")
        if not is_matrix or not plan.name.startswith(_LAYER) or plan.added:
            return False
        kind = self._quantized.tensors[plan.name].type
        return is_compensable(kind) and self._source.tensors[plan.name].type != kind

    def _round(self, name: str) -> Any:
        def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
            self._round_matrix(name, module, inputs[0])

        return before

    def _round_matrix(self, name: str, module: Any, inputs: Tensor) -> None:
        """Round a matrix, write it, and let the module compute with what was written."""
        import numpy as np
        import torch

        from .error_feedback import restored_weight, round_with_feedback

        assert self._exact is not None
        self._hooks.pop(name).remove()  # experts may be called more than once
        exact = self._exact.take(name, inputs)
        plan = self._model.plan_of(name)
        order = None if plan.order is None else torch.tensor(plan.order)
        kind = self._quantized.tensors[plan.name].type
        if (finished := self._journal.get(plan.name)) is not None:
            blocks = np.frombuffer(finished, np.uint8)
            values = torch.from_numpy(dequantized(blocks, kind).reshape(module.weight.shape))
            self._write(name, finished, values)
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) < _FEWEST_INPUTS * rows.shape[1]:
            self._model.load(name, self._quantized)
            return
        weight, statistics = module.weight, self._statistics_of(inputs, exact.inputs)
        if exact.outputs is not None:
            weight = restored_weight(weight, rows, exact.outputs, statistics)
        rounded, values = round_with_feedback(weight if order is None else weight[order], kind, statistics)
        self._journal.add(plan.name, rounded.tobytes())
        self._write(name, rounded.tobytes(), values)

    def _statistics_of(self, inputs: Tensor, exact: Tensor | None) -> InputStatistics:
        """Return the statistics of inputs, which matrices that read the same ones share."""
        from .error_feedback import input_statistics

        if self._statistics is None or self._statistics[0] is not inputs:
            self._statistics = None  # frees the memory of the last ones
            self._statistics = (inputs, input_statistics(inputs.reshape(-1, inputs.shape[-1]), exact))
        return self._statistics[1]

    def _write(self, name: str, data: bytes, values: Tensor) -> None:
        """Write a rounded matrix, and give its values, in the GGUF's order of rows, to the model."""
        import torch

        plan = self._model.plan_of(name)
        with self._target.open("r+b") as file:
            file.seek(self._quantized.position(plan.name))
            file.write(data)
        self.written[plan.name] = hashlib.sha256(data).hexdigest()
        if plan.order is not None:
            ordered = torch.empty_like(values)
            ordered[torch.tensor(plan.order)] = values
            values = ordered
        self._model.set(name, values)

    def _after_layer(self, layer: nn.Module, _: object, __: object) -> None:
        self._statistics = None
        self._model.drop(layer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

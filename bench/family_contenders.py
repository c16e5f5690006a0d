"""Contenders of `families.py`, and the settings in which each is tried."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kolotune.engines.job import TrainJob
from kolotune.engines.native.model import PackedModel, TransformersModel
from kolotune.engines.native.padded_batch import pad_batch
from kolotune.engines.prepared_tokens import IGNORED, PreparedTokens

PEFT, TRANSFORMERS, KOLOTUNE = "transformers + peft", "transformers", "kolotune"
MODULE = "transformers, kolotune's module for experts"
EXPERTS = ("grouped_mm", "eager", "batched_mm")
_ROWS, _SIZES = 100, (1536, 2048)
_TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Contender(Protocol):
    """Computes steps."""

    def groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[list[int]]:
        """Split chats into groups that are computed at once."""

    def backward(self, tokens: PreparedTokens, group: Sequence[int], factor: float) -> Tensor:
        """Add `factor` times the gradient of a group's loss to the adapters' gradients; return the loss, ``[]``."""


@dataclass(frozen=True)
class Setting:
    """What a contender is and how it is set up.

    Attributes:
        contender: one of the names above.
        dtype: "bf16" or "fp32".
        experts: how transformers computes experts; "" for others.
    """

    contender: str
    dtype: str
    experts: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}, {self.experts}" if self.experts else self.dtype

    def open(self, job: TrainJob) -> Contender:
        """Load the job's model with new adapters."""
        job = dataclasses.replace(job, dtype=self.dtype)
        if self.contender == PEFT:
            return PeftModel(job, self.experts)
        return PackedModel(job) if self.contender == KOLOTUNE else TransformersModel(job, "cpu")

    def gathered_bytes(self, expert_weights: int, choices: int) -> int:
        """Return the bytes that transformers gathers of experts' weights for one layer and the backward pass.

        Args:
            expert_weights: weights of one expert.
            choices: how many experts all tokens choose, together.
        """
        return choices * expert_weights * _TORCH[self.dtype].itemsize if self.experts == "batched_mm" else 0


def settings_of(dtype: str, experts: Sequence[str], *, has_experts: bool) -> dict[str, list[Setting]]:
    """Return the settings to try of each contender, by its name; kolotune is the last.

    Args:
        dtype: "bf16" or "fp32".
        experts: transformers' implementations of experts.
        has_experts: whether the model has some.
    """
    if not has_experts:
        return {name: [Setting(name, dtype)] for name in (TRANSFORMERS, KOLOTUNE)}
    peft = [Setting(PEFT, dtype, name) for name in experts]
    return {PEFT: peft, **{name: [Setting(name, dtype)] for name in (MODULE, KOLOTUNE)}}


def product_rates() -> dict[str, list[float]]:
    """Return for each dtype the GFLOP/s of PyTorch's products ``x Wᵀ``, ``y W`` and ``yᵀ x``, of some tokens."""
    rates = {}
    for dtype, kind in _TORCH.items():
        weight, x, y = (torch.randn(size).to(kind) for size in (_SIZES, (_ROWS, _SIZES[1]), (_ROWS, _SIZES[0])))
        products = (lambda: nn.functional.linear(x, weight), lambda: y @ weight, lambda: y.t() @ x)  # noqa: B023
        rates[dtype] = [_rate(product) for product in products]
    return rates


def _rate(product: Callable[[], Tensor]) -> float:
    product()
    started = time.perf_counter()
    product()
    return 2 * _ROWS * _SIZES[0] * _SIZES[1] / 1e9 / (time.perf_counter() - started)


class PeftModel:
    """What a user of transformers and PEFT has: adapters on attention and on the fused weights of experts.

    Logits are computed only where a label is next, which spares it some work.

    Args:
        job: the training.
        experts: transformers' ``experts_implementation``.
    """

    def __init__(self, job: TrainJob, experts: str) -> None:
        import peft
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(
            job.base_model, dtype=_TORCH[job.dtype], experts_implementation=experts, local_files_only=True
        )
        config = peft.LoraConfig(
            r=job.lora_rank, lora_alpha=int(job.lora_alpha), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )  # fmt: skip
        torch.manual_seed(job.seed)
        self._model: Any = peft.get_peft_model(model, config)

    def groups(self, tokens: PreparedTokens, indices: Sequence[int]) -> list[list[int]]:
        return [[number for index in indices for number in tokens.sequences(index)]]

    def backward(self, tokens: PreparedTokens, group: Sequence[int], factor: float) -> Tensor:
        self._model.train()
        batch = pad_batch(tokens, group)
        logits: Tensor = self._model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.positions).logits
        targets = batch.targets.flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
        (loss * factor).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

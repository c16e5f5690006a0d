"""The MLP of a layer with experts, of which a router chooses some for each token: forward and backward.

Tokens are sorted by their experts. Each expert computes its own with its frozen weights and, where its weights have
adapters, two thin products beside them. The router is frozen, but its input has a gradient.
Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architecture import Activation
from .expert_lora import LoraExpertWeight
from .fused_linear import FusedLinear
from .matrix_product import InputGradient
from .mlp import SavedMlp
from .operations import Operations

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class _Route:
    """Which experts compute which tokens.

    Attributes:
        order: int64 ``[tokens * chosen]``: choices, token by token, sorted by their experts.
        back: int64 ``[tokens * chosen]``: where each choice is among the sorted ones.
        scores: fp32 ``[tokens, chosen]``: how much each choice counts.
    """

    order: Tensor
    back: Tensor
    scores: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each sorted choice, int64."""
        return self.order // self.scores.shape[1]


class Experts:
    """The experts of a layer and their router.

    Args:
        operations: computes the activation.
        activation: of the gates.
        router: ``[experts, hidden]``.
        weights: by name, ``[experts, outputs, inputs]``; gate and up are one.
        chosen: experts of each token.
        normalizes: whether the scores of a token's experts are divided by their sum.

    Attributes:
        inputs: the width of the input.
        updates: the adapters of the weights, by name; set once they exist.
    """

    linears: tuple[FusedLinear, ...] = ()

    def __init__(
        self,
        operations: Operations,
        activation: Activation,
        router: Tensor,
        weights: Mapping[str, Tensor],
        chosen: int,
        normalizes: bool,
    ) -> None:
        self._operations, self._activation = operations, activation
        self._router, self.weights = router, weights
        self._chosen, self._normalizes = chosen, normalizes
        self.inputs = router.shape[1]
        self.updates: Mapping[str, LoraExpertWeight] = {}

    def new_input(self, tokens: int) -> Tensor:
        return self._router.new_empty(tokens, self.inputs)

    def forward(self, x: Tensor, saved: SavedMlp | None) -> Tensor:
        shares, index, totals, scores = self._scores(x)
        order = torch.argsort(index.flatten(), stable=True)
        route = _Route(order, torch.argsort(order), scores)
        # Read by the host: how many rows each product has depends on it.
        counts = torch.bincount(index.flatten(), minlength=len(self._router)).tolist()
        masks: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
        gate_up, low_up = self._project(GATE_UP, x[route.tokens], counts, None if saved is None else masks[GATE_UP])
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._operations.gate(self._activation, gate_up, product)
        out, low_down = self._project(DOWN, product, counts, None if saved is None else masks[DOWN])
        if saved is not None:
            saved.counts = counts
            saved.masks = {name: of_rows for name, of_rows in masks.items() if of_rows}
            saved.tensors = {
                "shares": shares, "index": index, "totals": totals, "scores": scores, "order": order,
                "back": route.back, "gate_up": gate_up, "low_up": low_up, "product": product, "out": out,
                "low_down": low_down,
            }  # fmt: skip
        return self._mixed(out, route, scores).to(x.dtype)

    def backward(self, d_out: Tensor, x: Tensor, saved: SavedMlp) -> InputGradient:
        kept, counts = saved.tensors, saved.counts
        route = _Route(kept["order"], kept["back"], kept["scores"])
        d_chosen = d_out[route.tokens]
        d_scores = (d_chosen.float() * kept["out"].float()).sum(1)[route.back].view_as(route.scores)
        d_chosen = (d_chosen * route.scores.flatten()[route.order, None]).to(x.dtype)
        d_product = self._project_backward(
            DOWN, d_chosen, kept["product"], kept["low_down"], counts, saved.masks.get(DOWN)
        )
        d_gate_up = self._operations.gate_backward(
            self._activation, InputGradient(d_product, d_product.shape[1], None), kept["gate_up"]
        )
        d_given = self._project_backward(
            GATE_UP, d_gate_up, x[route.tokens], kept["low_up"], counts, saved.masks.get(GATE_UP)
        )
        d_x = self._mixed(d_given, route, torch.ones_like(route.scores))
        d_x += (self._scores_backward(d_scores, kept).to(x.dtype) @ self._router).float()
        return InputGradient(d_x.to(x.dtype), self.inputs, None)

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the experts' shares, fp32 ``[tokens, experts]``; the chosen ones; their sum; and their scores."""
        shares = torch.softmax(x @ self._router.t(), -1, dtype=torch.float32)
        scores, index = torch.topk(shares, self._chosen, -1)
        totals = scores.sum(-1, keepdim=True)
        return shares, index, totals, scores / totals if self._normalizes else scores

    def _scores_backward(self, d_scores: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient of the router's logits, fp32 ``[tokens, experts]``."""
        if self._normalizes:
            d_scores = (d_scores - (d_scores * kept["scores"]).sum(-1, keepdim=True)) / kept["totals"]
        shares = kept["shares"]
        d_shares = torch.zeros_like(shares).scatter_(1, kept["index"], d_scores)
        return shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True))

    def _mixed(self, sorted_rows: Tensor, route: _Route, scores: Tensor) -> Tensor:
        """Return for each token the sum of its choices' rows by their scores, fp32 ``[tokens, width]``."""
        tokens, chosen = scores.shape
        rows = sorted_rows[route.back].view(tokens, chosen, -1)
        return torch.bmm(scores[:, None], rows.float()).squeeze(1)

    def _project(
        self, name: str, x: Tensor, counts: Sequence[int], masks: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the products of sorted rows with their experts' weights, and those with ``lora_A``.

        Args:
            name: of the weight.
            x: ``[rows, inputs]``.
            counts: rows of each expert.
            masks: in training with dropout, receives the mask of all rows.
        """
        weight, update = self.weights[name], self.updates.get(name)
        out = x.new_empty(len(x), weight.shape[1])
        for expert, rows in _spans(counts):
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
        if update is None:
            return out, x.new_empty(0)
        if masks is not None and isinstance(update.dropout, nn.Dropout):
            masks.append(nn.functional.dropout(torch.ones_like(x), update.dropout.p))
            x = x * masks[-1]
        a, b = (each.detach().to(x.dtype) for each in (update.lora_A, update.lora_B))
        low = x.new_empty(len(x), a.shape[1])
        for expert, rows in _spans(counts):
            torch.mm(x[rows], a[expert].t(), out=low[rows])
            out[rows].addmm_(low[rows], b[expert].t(), alpha=update.scale)
        return out, low

    def _project_backward(
        self, name: str, d_out: Tensor, x: Tensor, low: Tensor, counts: Sequence[int], masks: list[Tensor] | None
    ) -> Tensor:
        """Add to the adapters' gradients; return that of ``x [rows, inputs]``."""
        weight, update = self.weights[name], self.updates.get(name)
        d_x = d_out.new_empty(len(d_out), weight.shape[2])
        for expert, rows in _spans(counts):
            torch.mm(d_out[rows], weight[expert], out=d_x[rows])
        if update is None:
            return d_x
        assert update.lora_A.grad is not None and update.lora_B.grad is not None
        a, b = (each.detach().to(d_out.dtype) for each in (update.lora_A, update.lora_B))
        dropped = x * masks[0] if masks else x
        for expert, rows in _spans(counts):
            d_low = (d_out[rows] @ b[expert]).mul_(update.scale)
            update.lora_B.grad[expert].add_(d_out[rows].t() @ low[rows], alpha=update.scale)
            update.lora_A.grad[expert].add_(d_low.t() @ dropped[rows])
            d_inputs = d_low @ a[expert]
            d_x[rows] += d_inputs * masks[0][rows] if masks else d_inputs
        return d_x


def _spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and these."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count

"""The MLP of a layer with experts, of which a router chooses some for each token: forward and backward.

Tokens are sorted by their experts, each of which computes its own (`expert_linear`). The router is frozen, but its
input has a gradient.
Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architecture import Activation
from .expert_linear import ExpertLinear, ExpertRows
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

    @property
    def sorted_scores(self) -> Tensor:
        """The score of each sorted choice, fp32 ``[tokens * chosen, 1]``."""
        return self.scores.flatten()[self.order, None]

    def summed(self, sorted_rows: Tensor) -> Tensor:
        """Return for each token the sum of its choices' rows, ``[tokens, width]``."""
        places = self.back.view_as(self.scores)
        if sorted_rows.device.type == "cpu":  # rows are not gathered first
            return nn.functional.embedding_bag(places, sorted_rows, mode="sum")
        return sorted_rows[places].sum(1, dtype=torch.float32).to(sorted_rows.dtype)


class Experts:
    """The experts of a layer and their router.

    A choice's score multiplies the input of `down`, not its output: that is narrower, and no output is kept for the
    score's gradient.

    Args:
        operations: computes the activation and the products.
        activation: of the gates.
        router: ``[experts, hidden]``.
        weights: by name, ``[experts, outputs, inputs]``; gate and up are one.
        chosen: experts of each token.
        normalizes: whether the scores of a token's experts are divided by their sum.

    Attributes:
        inputs: the width of the input.
        weights: by name, with their adapters once they exist.
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
        self._router = router
        self._products = operations.expert_products(router)
        self.weights: Mapping[str, ExpertLinear] = {
            name: operations.expert_linear(weight, self._products) for name, weight in weights.items()
        }
        self._chosen, self._normalizes = chosen, normalizes
        self.inputs = router.shape[1]

    def new_input(self, tokens: int) -> Tensor:
        return self._router.new_empty(tokens, self.inputs)

    def forward(self, x: Tensor, saved: SavedMlp | None) -> Tensor:
        shares, index, totals, scores = self._scores(x)
        order = torch.argsort(index.flatten(), stable=True)
        route = _Route(order, torch.argsort(order), scores)
        groups = self._products.groups(index.flatten()[order], len(self._router))
        masks: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
        kept = masks if saved is not None else {}
        gate_up, low_up = self.weights[GATE_UP].forward(ExpertRows(x, route.tokens), groups, kept.get(GATE_UP))
        inner = self._inner(gate_up).mul_(route.sorted_scores)
        out, low_down = self.weights[DOWN].forward(ExpertRows(inner), groups, kept.get(DOWN))
        if saved is not None:
            saved.groups = groups
            saved.masks = {name: of_rows for name, of_rows in masks.items() if of_rows}
            saved.tensors = {
                "shares": shares, "index": index, "totals": totals, "scores": scores, "order": order,
                "back": route.back, "gate_up": gate_up, "low_up": low_up, "low_down": low_down,
            }  # fmt: skip
        return route.summed(out)

    def backward(self, d_out: Tensor, x: Tensor, saved: SavedMlp) -> InputGradient:
        kept, groups, masks = saved.tensors, saved.groups, saved.masks
        route = _Route(kept["order"], kept["back"], kept["scores"])
        product = self._inner(kept["gate_up"])
        inner = product * route.sorted_scores.to(product.dtype)
        d_inner = self.weights[DOWN].backward(
            ExpertRows(d_out, route.tokens), ExpertRows(inner), kept["low_down"], groups, masks.get(DOWN)
        )
        d_scores = torch.mul(d_inner, product, out=inner).sum(1, dtype=torch.float32)[route.back].view_as(route.scores)
        d_product = d_inner.mul_(route.sorted_scores)
        d_gate_up = self._operations.gate_backward(
            self._activation, InputGradient(d_product, d_product.shape[1], None), kept["gate_up"]
        )
        d_given = self.weights[GATE_UP].backward(
            ExpertRows(d_gate_up), ExpertRows(x, route.tokens), kept["low_up"], groups, masks.get(GATE_UP)
        )
        d_x = route.summed(d_given)
        d_x += self._scores_backward(d_scores, kept).to(x.dtype) @ self._router
        return InputGradient(d_x, self.inputs, None)

    def _inner(self, gate_up: Tensor) -> Tensor:
        """Return what the activation makes of gate and up, ``[rows, width]``."""
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._operations.gate(self._activation, gate_up, product)
        return product

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

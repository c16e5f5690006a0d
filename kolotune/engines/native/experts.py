"""The MLP of a layer with experts, of which a router chooses some for each token: forward and backward.

Tokens are sorted by their experts. Each expert computes its own with its frozen weights and, where its weights have
adapters, two thin products beside them. The router is frozen, but its input has a gradient.
Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architecture import Activation
from .expert_lora import LoraExpertWeight
from .expert_products import Groups
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
        self._products = operations.expert_products(router)
        self._chosen, self._normalizes = chosen, normalizes
        self.inputs = router.shape[1]
        self.updates: Mapping[str, LoraExpertWeight] = {}

    def new_input(self, tokens: int) -> Tensor:
        return self._router.new_empty(tokens, self.inputs)

    def forward(self, x: Tensor, saved: SavedMlp | None) -> Tensor:
        shares, index, totals, scores = self._scores(x)
        order = torch.argsort(index.flatten(), stable=True)
        route = _Route(order, torch.argsort(order), scores)
        groups = self._products.groups(index.flatten()[order], len(self._router))
        masks: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
        gate_up, low_up = self._project(GATE_UP, x[route.tokens], groups, None if saved is None else masks[GATE_UP])
        product = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._operations.gate(self._activation, gate_up, product)
        out, low_down = self._project(DOWN, product, groups, None if saved is None else masks[DOWN])
        if saved is not None:
            saved.groups = groups
            saved.masks = {name: of_rows for name, of_rows in masks.items() if of_rows}
            saved.tensors = {
                "shares": shares, "index": index, "totals": totals, "scores": scores, "order": order,
                "back": route.back, "gate_up": gate_up, "low_up": low_up, "product": product, "out": out,
                "low_down": low_down,
            }  # fmt: skip
        return self._mixed(out, route, scores).to(x.dtype)

    def backward(self, d_out: Tensor, x: Tensor, saved: SavedMlp) -> InputGradient:
        kept, groups = saved.tensors, saved.groups
        route = _Route(kept["order"], kept["back"], kept["scores"])
        d_chosen = d_out[route.tokens]
        d_scores = (d_chosen.float() * kept["out"].float()).sum(1)[route.back].view_as(route.scores)
        d_chosen = (d_chosen * route.scores.flatten()[route.order, None]).to(x.dtype)
        d_product = self._project_backward(
            DOWN, d_chosen, kept["product"], kept["low_down"], groups, saved.masks.get(DOWN)
        )
        d_gate_up = self._operations.gate_backward(
            self._activation, InputGradient(d_product, d_product.shape[1], None), kept["gate_up"]
        )
        d_given = self._project_backward(
            GATE_UP, d_gate_up, x[route.tokens], kept["low_up"], groups, saved.masks.get(GATE_UP)
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

    def _project(self, name: str, x: Tensor, groups: Groups, masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the products of sorted rows with their experts' weights, and those with ``lora_A``.

        Args:
            name: of the weight.
            x: ``[rows, inputs]``.
            groups: how the rows belong to experts.
            masks: in training with dropout, receives the mask of all rows.
        """
        products, update = self._products, self.updates.get(name)
        out = products.forward(x, self.weights[name], groups)
        if update is None:
            return out, x.new_empty(0)
        if masks is not None and isinstance(update.dropout, nn.Dropout):
            masks.append(nn.functional.dropout(torch.ones_like(x), update.dropout.p))
            x = x * masks[-1]
        a, b = (each.detach().to(x.dtype) for each in (update.lora_A, update.lora_B))
        low = products.forward(x, a, groups)
        products.add_forward(out, low, b, groups, update.scale)
        return out, low

    def _project_backward(
        self, name: str, d_out: Tensor, x: Tensor, low: Tensor, groups: Groups, masks: list[Tensor] | None
    ) -> Tensor:
        """Add to the adapters' gradients; return that of ``x [rows, inputs]``."""
        products, update = self._products, self.updates.get(name)
        d_x = products.backward(d_out, self.weights[name], groups)
        if update is None:
            return d_x
        assert update.lora_A.grad is not None and update.lora_B.grad is not None
        a, b = (each.detach().to(d_out.dtype) for each in (update.lora_A, update.lora_B))
        d_low = products.backward(d_out, b, groups).mul_(update.scale)
        products.add_gradient(update.lora_B.grad, d_out, low, groups, update.scale)
        products.add_gradient(update.lora_A.grad, d_low, x * masks[0] if masks else x, groups, 1.0)
        d_inputs = products.backward(d_low, a, groups)
        return d_x.add_(d_inputs * masks[0] if masks else d_inputs)

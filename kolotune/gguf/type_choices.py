"""Choose the type of each matrix for a budget: the least predicted divergence for the size.

`sensitivity` measures what each type does to each matrix. Rounding several matrices changes a token's log-probability
by the sum of the changes, so half the mean square of that sum is the predicted KL divergence. From the widest types on,
the step with the least divergence for each byte that it saves is taken again and again: this walks along the convex
hull of size and divergence, and every budget is a place on the way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import header
from .header import GgufSummary
from .quantized_header import aligned
from .tensor_types import quantized_tensors

if TYPE_CHECKING:
    import numpy as np

    from .rounding_effects import RoundingEffects

    Types = dict[str, str]

_OF_LONG_BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")
_OF_SHORT_BLOCKS = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_LAYER = re.compile(r"^blk\.\d+\.|\.weight$")
_FILE_TYPES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_LEAST_GAIN = 1e-9  # nats
_WORST = 1.0  # nats; a prediction beyond says nothing


def possible_types(summary: GgufSummary) -> dict[str, tuple[str, ...]]:
    """Return the types that each matrix of an unquantized GGUF may get, from narrow to wide, beside its own.

    Tensors that llama.cpp never quantizes are missing, as are those whose rows are no whole blocks of any type.
    """
    types: dict[str, tuple[str, ...]] = {}
    for name in quantized_tensors(summary):
        columns = summary.tensors[name].shape[0]
        possible = _OF_SHORT_BLOCKS if columns % header.block_of("Q4_K")[0] else _OF_LONG_BLOCKS
        if columns % header.block_of("Q8_0")[0] == 0:
            types[name] = possible
    return types


def part_of(name: str) -> str:
    """Return what a tensor is in its layer, such as "ffn_up"."""
    return _LAYER.sub("", name)


def weight_count(summary: GgufSummary) -> int:
    """Return the number of a model's weights."""
    return sum(math.prod(tensor.shape) for tensor in summary.tensors.values())


def smallest_size(summary: GgufSummary, header_size: int) -> int:
    """Return the bytes of the smallest file that a budget can ask for."""
    possible = possible_types(summary)
    return header_size + sum(
        min(aligned(header.size_of(tensor.shape, kind)) for kind in (tensor.type, *possible.get(name, ())))
        for name, tensor in summary.tensors.items()
    )


def file_type(types: Mapping[str, str], summary: GgufSummary) -> str:
    """Return the file type that comes closest to a mixture: that of the type that most weights of the layers have."""
    weights: dict[str, int] = {}
    for name in possible_types(summary):
        if name.startswith("blk."):
            weights[types[name]] = weights.get(types[name], 0) + summary.tensors[name].size
    most = max(sorted(weights), key=lambda kind: weights[kind], default="Q8_0")
    return _FILE_TYPES.get(most, most if most not in ("F16", "F32") else "Q8_0")


@dataclass(frozen=True)
class Mixture:
    """A choice of types.

    Attributes:
        types: of each matrix that has a choice.
        size: bytes of all tensors, without the header.
        kl: predicted mean KL divergence, in nats.
    """

    types: Types
    size: int
    kl: float


@dataclass
class _State:
    """A choice on the way.

    Attributes:
        chosen: the option of each tensor, ``[tensors]``.
        fields: sum of each option's products with the chosen ones, ``[options]``.
    """

    chosen: np.ndarray
    fields: np.ndarray


class Sensitivity:
    """What was measured of a model.

    Args:
        options: tensor and type, those of a tensor next to each other.
        products: half the mean product of the effects of two options, fp32 ``[options, options]``.
        summary: of the unquantized GGUF.
    """

    def __init__(self, options: Sequence[tuple[str, str]], products: np.ndarray, summary: GgufSummary) -> None:
        import numpy as np

        free = {name for name, _ in options}
        self._fixed = sum(aligned(each.size) for name, each in summary.tensors.items() if name not in free)
        self._options = [*options, *((name, summary.tensors[name].type) for name in sorted(free))]
        count = len(self._options)
        self._products = np.zeros((count, count))
        self._products[: len(options), : len(options)] = products
        self._sizes = np.array([aligned(header.size_of(summary.tensors[n].shape, kind)) for n, kind in self._options])
        order = {name: number for number, name in enumerate(sorted(free))}
        self._numbers = {option: number for number, option in enumerate(self._options)}
        self._tensors = np.array([order[name] for name, _ in self._options])
        self._widest = np.arange(len(options), count)

    @cached_property
    def path(self) -> list[Mixture]:
        """The mixtures from the widest types to the narrowest, each a step from the one before."""
        import numpy as np

        state = _State(self._widest.copy(), self._products[:, self._widest].sum(axis=1))
        path = [self._mixture(state)]
        while True:
            more, saved = self._changes(state)
            costs = np.where(saved > 0, more / np.maximum(saved, 1), np.inf)
            best = int(costs.argmin())
            if not np.isfinite(costs[best]):
                return path
            self._change(state, best)
            path.append(self._mixture(state))

    def predicted(self, types: Mapping[str, str]) -> float:
        """Return the predicted KL of any choice of types, of which each has to be measured."""
        chosen = [self._numbers[option] for option in types.items() if option in self._numbers]
        return float(self._products[chosen][:, chosen].sum())

    def within_size(self, size: int) -> Mixture | None:
        """Return a mixture whose tensors take at most so many bytes; None if there is none.

        It is the first one of the path that fits; what the last step left over is filled again.
        """
        import numpy as np

        fitting = next((mixture for mixture in self.path if mixture.size <= size), None)
        if fitting is None:
            return None
        chosen = np.array([self._numbers[option] for option in fitting.types.items()])
        state = _State(chosen, self._products[:, chosen].sum(axis=1))
        while True:
            more, saved = self._changes(state)
            fits = (saved >= self._mixture(state).size - size) & (more < -_LEAST_GAIN)
            if not fits.any():
                return self._mixture(state)
            self._change(state, int(np.where(fits, more / np.maximum(-saved, 1), np.inf).argmin()))

    def within_kl(self, kl: float) -> Mixture:
        """Return the smallest mixture with at most this predicted KL."""
        return min((each for each in self.path if each.kl <= kl), key=lambda each: each.size)

    def _changes(self, state: _State) -> tuple[np.ndarray, np.ndarray]:
        """Return what each option adds to the divergence in place of the chosen one, and the bytes that it saves."""
        import numpy as np

        now, diagonal = state.chosen[self._tensors], np.diag(self._products)
        between = self._products[np.arange(len(now)), now]
        more = 2 * (state.fields - state.fields[now]) + diagonal + diagonal[now] - 2 * between
        return more, self._sizes[now] - self._sizes

    def _change(self, state: _State, option: int) -> None:
        tensor = self._tensors[option]
        state.fields += self._products[:, option] - self._products[:, state.chosen[tensor]]
        state.chosen[tensor] = option

    def _mixture(self, state: _State) -> Mixture:
        size = self._fixed + int(self._sizes[state.chosen].sum())
        kl = float(state.fields[state.chosen].sum())
        return Mixture(dict(self._options[number] for number in state.chosen), size, max(0.0, kl))


def curve(path: Sequence[Mixture], header_size: int, points: int = 40) -> list[tuple[int, float]]:
    """Return (bytes of the file, predicted KL) at some places of a path, smallest first, each better than the last."""
    usable: list[tuple[int, float]] = []
    for size, kl in sorted((mixture.size + header_size, mixture.kl) for mixture in path if mixture.kl <= _WORST):
        if not usable or kl < usable[-1][1]:
            usable.append((size, kl))
    if len(usable) <= points:
        return usable
    low, high = usable[0][0], usable[-1][0]
    wanted = [low + (high - low) * number / (points - 1) for number in range(points)]
    return sorted({min(usable, key=lambda point: abs(point[0] - size)) for size in wanted})


def knee(points: Sequence[tuple[int, float]]) -> int:
    """Return the number of the point that lies farthest below the line from the first to the last."""
    (first, worst), (last, best) = points[0], points[-1]
    width, height = max(1, last - first), max(1e-12, worst - best)
    below = [1 - (size - first) / width - (kl - best) / height for size, kl in points]
    return max(range(len(points)), key=lambda number: below[number])


def write_sensitivity(path: Path, key: str, measured: RoundingEffects, summary: GgufSummary) -> None:
    """Write what was measured, with the hash of what it depends on.

    A matrix that could not be measured, such as a stack of experts, counts for each weight as the measured ones do on
    average.
    """
    import numpy as np
    from safetensors.numpy import save_file

    possible = possible_types(summary)
    options = [(name, kind) for name in possible for kind in possible[name]]
    effects = (
        np.zeros((len(options), len(next(iter(measured.effects.values()))))) if measured.effects else np.zeros((0, 1))
    )
    energies = np.zeros(len(options))
    means = _mean_energies(measured, summary)
    for number, (name, kind) in enumerate(options):
        plain, compensated = measured.feedback.get((part_of(name), kind), (1.0, 1.0))
        gained = (compensated / plain) ** 0.5 if plain else 1.0
        if (name, kind) in measured.effects:
            effects[number] = measured.effects[name, kind].numpy() * gained
        else:
            weights = summary.tensors[name].size
            energies[number] = measured.energies.get((name, kind), means.get(kind, 0.0) * weights) * gained**2
    products = 0.5 * effects @ effects.T / max(1, effects.shape[1]) + np.diag(energies)
    save_file({"products": products.astype(np.float32)}, path, {"key": key})


def read_sensitivity(path: Path, summary: GgufSummary, key: str) -> Sensitivity | None:
    """Read what `write_sensitivity` wrote; None where there is no such file, or it was measured on something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            products = file.get_tensor("products")
    except (OSError, SafetensorError):  # a damaged file is measured again
        return None
    options = [(name, kind) for name, kinds in possible_types(summary).items() for kind in kinds]
    return Sensitivity(options, products, summary)


def _mean_energies(measured: RoundingEffects, summary: GgufSummary) -> dict[str, float]:
    """Return the mean divergence for each stored byte of the unquantized layers, by type."""
    sums: dict[str, tuple[float, int]] = {}
    for (name, kind), effect in measured.effects.items():
        energy, size = sums.get(kind, (0.0, 0))
        sums[kind] = (energy + 0.5 * float(effect.square().mean()), size + summary.tensors[name].size)
    return {kind: energy / size for kind, (energy, size) in sums.items()}

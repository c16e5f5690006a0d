"""What a run takes, from shapes alone: weights, memory of a training step, bytes on the disk. Pure arithmetic.

Bytes throughout. What no formula gives is a constant that says how it was measured, on Linux with PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.weights.model_config import read_model_config
from kolotune.weights.tensors import Entry, header_of, weight_files

WIDTHS = {"fp32": 4, "bf16": 2, "f16": 2}
"""Bytes of a weight, by the names of the options."""

FP32 = 4
_ALL_LINEAR = "all-linear"
_STATE_FILE = 2_000  # the facts beside a checkpoint's tensors
_HEADER_ENTRY = 170  # what a header takes for a tensor of an adapter or an optimizer; measured on SmolLM2's
GATHERS = 2  # how often a batch brings a parted layer together: forwards and backwards; counted with FSDP2
LOGITS_AT_ONCE = 256  # rows of logits that the decoder has in memory together


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer: ``[outputs, inputs]``, by its name without ``.weight``."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        entries: its tensors.
        linears: the matrices that can get an adapter.
        layers, width, queries, keys, head, vocabulary: of a decoder; keys are key heads, head is the width of one.
        tied: whether the embedding is the head.
    """

    entries: tuple[Entry, ...]
    linears: tuple[Linear, ...]
    layers: int
    width: int
    queries: int
    keys: int
    head: int
    vocabulary: int
    tied: bool

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(_count(entry) for entry in self.entries)

    @property
    def stored(self) -> int:
        """Bytes of the tensors in the model's own files."""
        return sum(entry.size for entry in self.entries)

    @property
    def importance(self) -> int:
        """Bytes of an importance matrix: fp32 for each column of each matrix of the layers."""
        return sum(FP32 * each.inputs + _HEADER_ENTRY for each in self.linears)

    @property
    def in_layers(self) -> int:
        """Numbers in the matrices of the layers: what is parted where a base is."""
        return sum(each.outputs * each.inputs for each in self.linears)

    def of_layer(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer: the first's."""
        return self.linears[: len(self.linears) // max(1, self.layers)]


def _count(entry: Entry) -> int:
    count = 1
    for extent in entry.shape:
        count *= extent
    return count


def read_shape(folder: Path) -> ModelShape:
    """The shape of a model folder, from its config and the headers of its files; no weight is read.

    Raises:
        ModelError: there are no whole safetensors files.
    """
    config = read_model_config(folder)
    entries = []
    for path in weight_files(folder):
        header, _ = header_of(path)
        entries += [Entry(name, told["dtype"], tuple(told["shape"])) for name, told in header.items()]
    in_layers = [
        Linear(each.name.removesuffix(".weight"), each.shape[0], each.shape[1])
        for each in entries
        if len(each.shape) == 2 and each.name.endswith(".weight") and any(part.isdecimal() for part in _parts(each))
    ]
    in_layers.sort(key=lambda each: next(int(part) for part in each.name.split(".") if part.isdecimal()))
    return ModelShape(
        entries=tuple(entries),
        linears=tuple(in_layers),
        layers=config.layers,
        width=config.hidden_size,
        queries=config.attention_heads,
        keys=config.key_value_heads,
        head=config.head_size,
        vocabulary=config.vocabulary_size,
        tied=not any(each.name.endswith("lm_head.weight") for each in entries),
    )


def _parts(entry: Entry) -> list[str]:
    return entry.name.split(".")


@dataclass(frozen=True)
class Adapter:
    """Numbers of an adapter: its weights, how many matrices they are, and those of one layer by its linear layers."""

    weights: int
    matrices: int
    rank: int
    adapted: frozenset[str]

    @classmethod
    def of(cls, shape: ModelShape, rank: int, targets: Sequence[str]) -> Adapter:
        """The adapter of that rank on the linear layers that `targets` name by the last parts of their names."""
        every = list(targets) == [_ALL_LINEAR]
        chosen = [each for each in shape.linears if every or each.name.rpartition(".")[2] in targets]
        return cls(
            weights=sum(rank * (each.inputs + each.outputs) for each in chosen),
            matrices=2 * len(chosen),
            rank=rank,
            adapted=frozenset(each.name for each in chosen),
        )

    @property
    def file(self) -> int:
        """Bytes of the adapter's folder: fp32."""
        return FP32 * self.weights + _HEADER_ENTRY * self.matrices

    def checkpoint(self, keeps_best: bool, width: int = FP32) -> int:
        """Bytes of a checkpoint: adapter and AdamW's two moments, and the best adapter where one is kept."""
        copies = 4 if keeps_best else 3
        return copies * (width * self.weights + _HEADER_ENTRY * self.matrices) + _STATE_FILE


@dataclass(frozen=True)
class Row:
    """Chats that are computed at once.

    Attributes:
        tokens: in the row.
        chats: how many of them, a shared beginning counted as one.
        longest: tokens of the longest one.
        prefix: tokens of the shared beginning.
        labels: tokens that have a label.
        padded: whether attention computes them as a padded batch, which keeps its scores.
    """

    tokens: int
    chats: int
    longest: int
    prefix: int
    labels: int
    padded: bool


def kept_by_layer(shape: ModelShape, adapter: Adapter, row: Row, width: int) -> int:
    """Bytes that a layer of the packed decoder keeps of a row for the way back.

    Args:
        shape: the model.
        adapter: whose middle stands beside each input.
        row: what is computed.
        width: bytes of a number.
    """
    linears = {each.name.rpartition(".")[2]: each for each in shape.of_layer()}
    attention = shape.queries * shape.head
    middle = linears["down_proj"].inputs if "down_proj" in linears else 4 * shape.width
    ranks = adapter.rank * sum(each.name in adapter.adapted for each in shape.of_layer())
    # The layer's input, what is normalised twice, the sum between, attention's result, gate and up, their product.
    a_token = 4 * shape.width + attention + 3 * middle + ranks
    heads = shape.queries + 2 * shape.keys
    if not row.padded:
        return row.tokens * (width * (a_token + heads * shape.head) + FP32 * (2 + shape.queries))
    own = row.longest
    queries = row.chats * own * attention
    keys = row.chats * (own + row.prefix) * 2 * shape.keys * shape.head
    scores = row.chats * own * (own + row.prefix) * shape.queries
    return row.tokens * (width * a_token + 2 * FP32) + width * (queries + keys + scores)


def passing(shape: ModelShape, row: Row, width: int) -> int:
    """Bytes that come and go while a step is computed: the logits of a portion, or a layer's gradients."""
    linears = {each.name.rpartition(".")[2]: each for each in shape.of_layer()}
    middle = linears["down_proj"].inputs if "down_proj" in linears else 4 * shape.width
    # In the dtype the logits and their gradient, in fp32 their logarithms.
    logits = min(row.labels, LOGITS_AT_ONCE) * shape.vocabulary * (2 * width + FP32)
    scores = row.chats * row.longest * (row.longest + row.prefix) * shape.queries * 3 if row.padded else 0
    gradients = width * (row.tokens * (6 * middle + 6 * shape.width) + scores)
    return max(logits, gradients)


@dataclass(frozen=True)
class Memory:
    """What a stage holds in memory at its peak, all processes together.

    Attributes:
        own: bytes that only ending gives back.
        mapped: bytes of files (weights, libraries) that the system drops when others need the room.
    """

    own: int
    mapped: int

    @property
    def resident(self) -> int:
        """Bytes that a monitor shows, as long as there is enough for all."""
        return self.own + self.mapped


# Measured on SmolLM2-135M with 40 short chats: the peak of each process, less what the formulas say of its tensors.
MAIN = Memory(320_000_000, 60_000_000)
ENGINE = Memory(160_000_000, 45_000_000)
# Of what the packed decoder keeps of a layer, by bytes of a number: measured on Llamas of widths 512 and 576, with 128
# and 1,024 tokens (1.18 to 1.20; 1.33 to 1.46). It keeps norms in fp32, and what it makes of queries and keys.
_TRANSFORMERS_KEEPS = {4: 1.2, 2: 1.4}
PARTED = Memory(420_000_000, 100_000_000)  # with transformers and FSDP loaded
QUANTIZER = Memory(30_000_000, 20_000_000)
READER = Memory(100_000_000, 40_000_000)  # llama.cpp, for an importance matrix: a guess, not measured


def of_training_step(shape: ModelShape, adapter: Adapter, row: Row, width: int, *, recompute: bool) -> int:
    """Bytes of activations at the peak of a step of the packed decoder."""
    layer = kept_by_layer(shape, adapter, row, width)
    inputs = row.tokens * shape.width * width
    kept = layer + shape.layers * inputs if recompute else shape.layers * layer
    return kept + passing(shape, row, width)


def of_training(
    shape: ModelShape, adapter: Adapter, row: Row, width: int, *, recompute: bool, keeps_best: bool = False
) -> Memory:
    """What the native engine's process holds on a CPU, with the packed decoder, at its peak."""
    frozen = width * (shape.weights + adapter.weights)
    optimizer = FP32 * adapter.weights * (5 if keeps_best else 4)  # weights, gradient, two moments
    # Between steps a checkpoint is put together, and serialized.
    passing_by = max(
        of_training_step(shape, adapter, row, width, recompute=recompute), 2 * adapter.checkpoint(keeps_best)
    )
    # While it is loaded the model's file is mapped; later that room is taken by the step.
    loading = max(0, shape.stored - optimizer - passing_by)
    return Memory(ENGINE.own + frozen + optimizer + passing_by, ENGINE.mapped + loading)


def kept_by_transformers(shape: ModelShape, adapter: Adapter, row: Row, width: int) -> int:
    """Bytes that all layers keep of a padded batch for the way back when transformers computes them."""
    return int(shape.layers * _TRANSFORMERS_KEEPS[width] * kept_by_layer(shape, adapter, row, width))


def of_plain_training(
    shape: ModelShape,
    adapter: Adapter,
    row: Row,
    width: int,
    *,
    recompute: bool,
    parts: int = 1,
    at_once: int = 0,
    keeps_best: bool = False,
) -> Memory:
    """What a process holds at its peak when transformers computes the model, with the logits of all labels at once.

    Args:
        shape, adapter, width, recompute, keeps_best: as in `of_training`.
        row: a padded batch; its labels are positions that have one in any chat, times chats.
        parts: processes that share the layers' weights (`--sharding`).
        at_once: numbers of those that are gathered together: a layer on a GPU, a matrix on a CPU.
    """
    frozen = width * (shape.weights - shape.in_layers + shape.in_layers // parts + 2 * at_once)
    optimizer = FP32 * adapter.weights * (5 if keeps_best else 4)
    inputs = shape.layers * row.tokens * shape.width * width
    kept = kept_by_transformers(shape, adapter, row, width)
    logits = row.labels * shape.vocabulary * (3 * width + 3 * FP32)  # they and their gradient, also in fp32
    gradients = row.tokens * width * (3 * shape.width + 3 * max((each.outputs for each in shape.of_layer()), default=0))
    layer = kept // shape.layers + gradients
    step = inputs + max(layer, logits) if recompute else kept + max(gradients, logits)
    own = PARTED.own + frozen + optimizer + max(step, 2 * adapter.checkpoint(keeps_best))
    return Memory(own, PARTED.mapped + shape.stored // parts)


def of_quantizing(shape: ModelShape) -> Memory:
    """What llama.cpp's quantizer holds: a tensor at a time, as fp32 and in its new type."""
    largest = max(_count(entry) for entry in shape.entries)
    return Memory(QUANTIZER.own + 5 * largest, QUANTIZER.mapped + 2 * largest)


def of_importance(shape: ModelShape, longest: int, at_once: int) -> Memory:
    """What llama.cpp holds while it reads chats of up to `longest` tokens, `at_once` of them together."""
    cache = 2 * FP32 * shape.layers * shape.keys * shape.head * longest
    logits = 2 * FP32 * at_once * shape.vocabulary
    return Memory(READER.own + cache + logits, READER.mapped + WIDTHS["f16"] * shape.weights)


@dataclass(frozen=True)
class Written:
    """What a stage writes.

    Attributes:
        stays: bytes of its results.
        passes: bytes beside them that are gone when it ends.
        replaced: bytes of what stood in their place, kept until the new ones are whole.
    """

    stays: int
    passes: int = 0
    replaced: int = 0


def peak_of(stages: Iterable[Written]) -> tuple[int, int]:
    """Bytes that are needed beyond what is there before the first stage: at the peak, and in the end."""
    now = peak = 0
    for each in stages:
        peak = max(peak, now + each.stays + each.passes)
        now += each.stays - each.replaced
    return max(peak, now), now


def checkpoints_written(steps_in_epoch: int, epochs: int, every: int) -> int:
    """How many checkpoints a training writes."""
    steps = range(every, steps_in_epoch * epochs, every) if every else ()
    return epochs + sum(1 for step in steps if step % steps_in_epoch)

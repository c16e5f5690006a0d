"""Memory and traffic of 1B to 70B models on 1 to 64 GPUs: the tables of docs/scaling.md, from the formulas of `plan`.

    python bench/scaling_model.py [--write]

Nothing is measured here: published shapes are put into the formulas of `engines.native.memory` and `planning.network`.
docs/scaling.md says which of the formulas were compared with small real trainings.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from kolotune.engines.memory import BatchShape
from kolotune.engines.native.memory import SHARDED_PROCESS, transformers_training
from kolotune.planning import network
from kolotune.weights.model_shape import DTYPE_BYTES, AdapterShape, Linear, ModelShape
from kolotune.weights.safetensors_header import Entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- made by bench/scaling_model.py -->\n", "<!-- end -->\n"
GPUS = (1, 8, 64)
RANK = 16
TOKENS = 8_192
"""Tokens of each GPU's batch: eight chats of 1,024 tokens, of which a third are labels."""
_BATCH = BatchShape(tokens=TOKENS, chats=8, longest=1024, prefix=0, labels=TOKENS // 3, padded=False)
_BF16 = DTYPE_BYTES["bf16"]
MACHINE = 8
"""GPUs per machine."""
LINK_GBIT = 100
RATE = 200e12
"""Operations per second of a GPU in bf16 matrix products: an assumption."""
_GB = 1e9


@dataclass(frozen=True)
class Llama:
    """A published model shape of the Llama family."""

    name: str
    layers: int
    width: int
    middle: int
    queries: int
    keys: int
    tied: bool
    head: int = 128
    vocabulary: int = 128_256

    def shape(self) -> ModelShape:
        """Return the shape that `read_shape` would read from the model's files."""
        rows = {"q_proj": self.queries * self.head, "k_proj": self.keys * self.head, "v_proj": self.keys * self.head}
        sizes = {name: (count, self.width) for name, count in rows.items()}
        sizes |= {"o_proj": (self.width, self.queries * self.head), "down_proj": (self.width, self.middle)}
        sizes |= {name: (self.middle, self.width) for name in ("gate_proj", "up_proj")}
        linears = tuple(
            Linear(f"model.layers.{layer}.{name}", *size)
            for layer in range(self.layers)
            for name, size in sizes.items()
        )
        norms = [f"model.layers.{layer}.norm{number}" for layer in range(self.layers) for number in (1, 2)]
        outside = ["model.embed_tokens"] if self.tied else ["model.embed_tokens", "lm_head"]
        entries = (
            *(Entry(f"{each.name}.weight", "BF16", (each.outputs, each.inputs)) for each in linears),
            *(Entry(f"{name}.weight", "BF16", (self.width,)) for name in [*norms, "model.norm"]),
            *(Entry(f"{name}.weight", "BF16", (self.vocabulary, self.width)) for name in outside),
        )
        return ModelShape(
            entries, linears, self.layers, self.width, self.queries, self.keys, self.head, self.vocabulary, self.tied
        )


MODELS = (
    Llama("Llama 3.2 1B", 16, 2048, 8192, 32, 8, tied=True, head=64),
    Llama("Llama 3.2 3B", 28, 3072, 8192, 24, 8, tied=True),
    Llama("Llama 3.1 8B", 32, 4096, 14336, 32, 8, tied=False),
    Llama("Llama 3.1 70B", 80, 8192, 28672, 64, 8, tied=False),
)


def held(shape: ModelShape, adapter: AdapterShape, shards: int) -> float:
    """Return GB per GPU: with the whole base on one, or with sharded layers and recomputed activations."""
    layer = sum(linear.weight_count for linear in shape.first_layer)
    memory = transformers_training(
        shape, adapter, _BATCH, _BF16, recompute=shards > 1, shards=shards, gathered=layer if shards > 1 else 0
    )
    return (memory.own - SHARDED_PROCESS.own) / _GB


def memory_table() -> str:
    """Return the table of GB per GPU, by model and number of GPUs."""
    layouts = ["whole", *(f"sharded over {count}" for count in GPUS[1:])]
    lines = [f"| GB on each GPU | weights | {' | '.join(layouts)} |", f"|---|---|{'---|' * len(layouts)}"]
    for model in MODELS:
        shape = model.shape()
        adapter = AdapterShape.of(shape, RANK, ["all-linear"])
        cells = [f"{held(shape, adapter, shards):.1f}" for shards in GPUS]
        lines.append(f"| {model.name} | {_BF16 * shape.weight_count / _GB:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table() -> str:
    """Return the table of what each machine sends in a step of one batch per GPU, and the network's share of a step."""
    columns = ["a step", "computing", "whole: sent", "network", "sharded: sent", "network"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for model in MODELS:
        shape = model.shape()
        adapter = AdapterShape.of(shape, RANK, ["all-linear"])
        # A forward pass and a backward pass to the inputs; with a sharded base one more forward pass.
        computing = [count * shape.weight_count * TOKENS / RATE for count in (4, 6)]
        processes = max(GPUS)
        gradients = network.gradient_bytes(adapter.weight_count, processes)
        base = network.sharded_base_bytes(_BF16 * shape.layer_weight_count, processes, 1)
        cells = [f"{computing[0]:.2f} s, {computing[1]:.2f} s"]
        for sent, computed in zip((gradients, gradients + base), computing, strict=True):
            seconds = network.transfer_seconds(sent, 1000 * LINK_GBIT)
            cells += [_bytes(sent), f"{seconds:.2f} s, {100 * seconds / (seconds + computed):.0f}%"]
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 1e6:.0f} MB"


def tables() -> str:
    """Return both tables as the page contains them."""
    return f"{BEGIN}\n{memory_table()}\n\n{traffic_table()}\n\n{END}"


def main() -> int:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scaling.md")
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + tables() + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What models of 1B to 70B take on 1 to 64 GPUs: the tables of docs/scaling.md, from the formulas that `plan` uses.

    python bench/scaling_model.py [--write]

Nothing is measured here: these are shapes that are published, put into `estimates` and `traffic`. What of the formulas
was held against small real trainings stands in docs/scaling.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from kolotune.engines import estimates
from kolotune.engines.estimates import Adapter, Linear, ModelShape, Row
from kolotune.planning import network
from kolotune.weights.tensors import Entry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- made by bench/scaling_model.py -->\n", "<!-- end -->\n"
GPUS = (1, 8, 64)
RANK = 16
TOKENS = 8_192
"""Of each GPU's batch: eight chats of 1,024 tokens, a third of them labels."""
_ROW = Row(tokens=TOKENS, chats=8, longest=1024, prefix=0, labels=TOKENS // 3, padded=False)
_BF16 = estimates.WIDTHS["bf16"]
MACHINE = 8
"""GPUs of a machine."""
LINK_GBIT = 100
RATE = 200e12
"""Operations a second of a GPU in bf16 products: an assumption."""
_GB = 1e9


@dataclass(frozen=True)
class Llama:
    """A published shape of the Llama family."""

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
        """As `estimates.read_shape` would read it from the model's files."""
        rows = {"q_proj": self.queries * self.head, "k_proj": self.keys * self.head, "v_proj": self.keys * self.head}
        sizes = {name: (count, self.width) for name, count in rows.items()}
        sizes |= {"o_proj": (self.width, self.queries * self.head), "down_proj": (self.width, self.middle)}
        sizes |= {name: (self.middle, self.width) for name in ("gate_proj", "up_proj")}
        linears = tuple(
            Linear(f"model.layers.{layer}.{name}", *size)
            for layer in range(self.layers)
            for name, size in sizes.items()
        )
        norms = [f"model.layers.{layer}.norm{place}" for layer in range(self.layers) for place in (1, 2)]
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


def held(shape: ModelShape, adapter: Adapter, parts: int) -> float:
    """GB on each GPU: the whole base, or the layers parted over several, with activations computed again."""
    layer = sum(each.outputs * each.inputs for each in shape.of_layer())
    found = estimates.of_plain_training(
        shape, adapter, _ROW, _BF16, recompute=parts > 1, parts=parts, at_once=layer if parts > 1 else 0
    )
    return (found.own - estimates.PARTED.own) / _GB


def memory_table() -> str:
    """GB on each GPU, by model and number of GPUs."""
    ways = ["whole", *(f"parted over {count}" for count in GPUS[1:])]
    lines = [f"| GB on each GPU | weights | {' | '.join(ways)} |", f"|---|---|{'---|' * len(ways)}"]
    for model in MODELS:
        shape = model.shape()
        adapter = Adapter.of(shape, RANK, ["all-linear"])
        cells = [f"{held(shape, adapter, parts):.1f}" for parts in GPUS]
        lines.append(f"| {model.name} | {_BF16 * shape.weights / _GB:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table() -> str:
    """What leaves each machine in a step of one batch on each GPU, and the share of a step that the network takes."""
    columns = ["a step", "computing", "whole: sent", "network", "parted: sent", "network"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for model in MODELS:
        shape = model.shape()
        adapter = Adapter.of(shape, RANK, ["all-linear"])
        # Forwards and backwards to the inputs, and once more forwards where the base is parted.
        computing = [count * shape.weights * TOKENS / RATE for count in (4, 6)]
        processes = max(GPUS)
        gradients = network.of_step(adapter.weights, processes)
        base = network.of_parted_base(_BF16 * shape.in_layers, processes, 1)
        cells = [f"{computing[0]:.2f} s, {computing[1]:.2f} s"]
        for sent, computed in zip((gradients, gradients + base), computing, strict=True):
            seconds = network.seconds(sent, 1000 * LINK_GBIT)
            cells += [_bytes(sent), f"{seconds:.2f} s, {100 * seconds / (seconds + computed):.0f}%"]
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / _GB:.1f} GB" if count >= _GB else f"{count / 1e6:.0f} MB"


def tables() -> str:
    """Both, as they stand in the page."""
    return f"{BEGIN}\n{memory_table()}\n\n{traffic_table()}\n\n{END}"


def main() -> int:
    """Prints the tables, or puts them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + tables() + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

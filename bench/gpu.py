"""Training on a GPU in real tokens per second and peak memory: kolotune, and transformers with PEFT as TRL sets it up.

    python bench/gpu.py [--shapes NAME ...] [--steps N] [--quick] [--json FILE]

It needs PyTorch, transformers and PEFT, and no network: weights are random, in the shapes of published models, and
chats are random tokens with the lengths of the other measurements' chats. Every contender trains the same steps in a
process of its own, each in the settings that its row names; the best of the peers' is compared. Liger's kernels and
flash attention are used where their packages are installed. With --quick a tiny model is trained on the CPU, which
shows that the script works, and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import CONTENDERS, Task, run
from measuring import Result, Table, median, options, versions
from safetensors.torch import save_file

from kolotune.engines.process_environment import ENVIRONMENT

_QUANTILES = (48, 55, 57, 58, 59, 60, 61, 65, 66, 70, 74, 77, 81, 88, 96, 108, 118, 149, 171, 240, 368)
"""Tokens of the docstring chats: each twentieth of them, from the shortest to the longest."""
_PREFIX = 21  # tokens that all of them share
_LONG = 2048
_EIGHT_GB = 8e9
_LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class GpuShape:
    """A published model's shape: its family, and sizes as transformers names them."""

    kind: str
    sizes: dict[str, Any]

    @property
    def operations(self) -> tuple[float, float]:
        """Operations of a step for each token, and for each label: products forward, and backward to their inputs."""
        sizes = self.sizes
        width = sizes["hidden_size"]
        heads = (2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]) * sizes["head_dim"]
        layer = width * heads + 3 * width * sizes["intermediate_size"]
        return 4.0 * sizes["num_hidden_layers"] * layer, 4.0 * width * sizes["vocab_size"]


def _shape(kind: str, width: int, mlp: int, layers: int, heads: tuple[int, int, int], tokens: int) -> GpuShape:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": tokens}
    return GpuShape(kind, {**sizes, **dict(zip(names, heads, strict=True)), "tie_word_embeddings": width < 4096})


SHAPES = {
    "0.5B": _shape("qwen2", 896, 4864, 24, (14, 2, 64), 151_936),
    "1B": _shape("llama", 2048, 8192, 16, (32, 8, 64), 128_256),
    "8B": _shape("llama", 4096, 14_336, 32, (32, 8, 128), 128_256),
}
"""Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B."""
_TINY = _shape("llama", 64, 128, 2, (4, 2, 16), 512)


def main() -> int:
    """Measure and report; or run one contender, in a child."""
    parser = options(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--task", help="a contender's task, as JSON: for the children of this script")
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(run(Task(**json.loads(arguments.task)))))
        return 0
    if not arguments.quick and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured. --quick trains a tiny model on the CPU.")
        return 0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = Result(
        "gpu", f"Training on a GPU ({device})", versions("torch", "transformers", "peft"), quick=arguments.quick
    )
    rate = _matrix_rate(arguments.quick)
    shapes = {"tiny": _TINY} if arguments.quick else {name: SHAPES[name] for name in arguments.shapes}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            _write_model(shape, Path(folder, "base"))
            chats = 8 if arguments.quick else 64
            _compare(result, name, shape, Path(folder), rate, chats, 3 if arguments.quick else arguments.steps)
            if name == "8B":
                _eight_gigabytes(result, Path(folder))
    _against_cpu(result, 2 if arguments.quick else 20)
    result.notes.append(
        f"Matrix rate: {rate / 1e12:.3g} TFLOP/s, measured with square bf16 products. Tokens are those of the chats: "
        "padding does not count. The first step warms up. Cold start: from the start of the process to the end of the "
        "first step. Memory: the peak that PyTorch allocated on the GPU."
    )
    result.finish(arguments.json)
    return 0


def _compare(result: Result, name: str, shape: GpuShape, folder: Path, rate: float, chats: int, steps: int) -> None:
    """Train with all contenders, and add a table and the figures of a shape."""
    _write_chats(folder / "data", [_length() for _ in range(chats * steps)], shape.sizes["vocab_size"])
    rows: list[list[object]] = []
    best: dict[str, dict[str, float]] = {}
    for contender, needed in CONTENDERS.items():
        if any(importlib.util.find_spec(package) is None for package in needed):
            rows.append([contender, f"{' and '.join(needed)} not installed", "", "", "", ""])
            continue
        found = _child(Task(contender, str(folder), chats, steps))
        if "tokens_per_second" not in found:
            rows.append([contender, str(found["failure"]), "", "", "", ""])
            continue
        per_token, per_label = shape.operations
        operations = found["tokens"] * per_token + found["labels"] * per_label
        share = 100 * operations / found["seconds"] / rate
        memory = found["memory"] / 1e9
        rows.append([contender, found["tokens_per_second"], memory, share, found["cold_start"], found["last_loss"]])
        print(*rows[-1], flush=True)
        side = contender if contender.startswith("kolotune") else "peers"
        if side not in best or found["tokens_per_second"] > best[side]["tokens_per_second"]:
            best[side] = found
    columns = ["contender", "tokens/s", "peak GB", "% of the matrix rate", "cold start s", "last loss"]
    result.tables.append(Table(f"{name}, {chats} chats a step", columns, rows))
    own, peers = best.get("kolotune bf16"), best.get("peers")
    if own and peers and torch.cuda.is_available():
        ratio = own["tokens_per_second"] / peers["tokens_per_second"]
        result.at_least(f"{name}, tokens/s relative to the best peer", ratio, 2.0)
        result.at_most(f"{name}, peak memory relative to that peer", own["memory"] / peers["memory"], 0.5, " x")
        if name == "8B":
            share = next(row[3] for row in rows if row[0] == "kolotune bf16")
            result.at_least("8B, share of the matrix rate", float(str(share)), 50.0, "%")


def _eight_gigabytes(result: Result, folder: Path) -> None:
    """Add the peak memory of 8B in 4 bits with chats of 2,048 tokens."""
    _write_chats(folder / "data", [_LONG] * 4, SHAPES["8B"].sizes["vocab_size"])
    found = _child(Task("kolotune 4 bits", str(folder), 1, 4))
    if "memory" in found:
        result.at_most("8B in 4 bits, 2,048 tokens: peak", found["memory"] / 1e9, _EIGHT_GB / 1e9, " GB")
    else:
        result.notes.append(f"8B in 4 bits, 2,048 tokens: {found['failure']}")


def _against_cpu(result: Result, steps: int) -> None:
    """Add how far the loss of a tiny model on the GPU is from the CPU's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_model(_TINY, folder / "base")
        _write_chats(folder / "data", [_length() for _ in range(8 * steps)], _TINY.sizes["vocab_size"])
        losses = [
            _child(Task("kolotune bf16", name, 8, steps), environment)["last_loss"]
            for environment in ({}, {"CUDA_VISIBLE_DEVICES": ""})
        ]
    apart = 100 * abs(losses[0] / losses[1] - 1)
    if torch.cuda.is_available():
        result.at_most(f"loss after {steps} steps, apart from the CPU's", apart, 1.0, "%")


def _child(task: Task, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a contender in a process of its own; its figures, or why there are none."""
    argv = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--task",
        json.dumps({**asdict(task), "started": time.time()}),
    ]
    paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, "PYTHONPATH": paths, **ENVIRONMENT, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {_LIMIT_SECONDS} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(done.stderr, file=sys.stderr)
        return {"failure": "out of memory" if "out of memory" in done.stderr.lower() else last[0][:80]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _write_model(shape: GpuShape, folder: Path) -> None:
    """Write a model with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        shape.kind, **shape.sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096
    )
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


_dice = random.Random(0)


def _length() -> int:
    """Draw a length between two neighbouring quantiles."""
    index = _dice.randrange(len(_QUANTILES) - 1)
    return _dice.randint(_QUANTILES[index], _QUANTILES[index + 1])


def _write_chats(folder: Path, lengths: list[int], vocabulary: int) -> None:
    """Write chats of random tokens behind a shared prefix, as prepared chats are; half of each is the answer."""
    shared = [_dice.randrange(3, vocabulary) for _ in range(_PREFIX)]
    ids = [token for length in lengths for token in (*shared, *_dice.choices(range(3, vocabulary), k=length - _PREFIX))]
    labelled = [place >= length - length // 2 for length in lengths for place in range(length)]
    folder.mkdir(exist_ok=True)
    save_file(
        {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "labelled": torch.tensor(labelled, dtype=torch.uint8),
            "offsets": torch.tensor([0, *lengths]).cumsum(0),
        },
        folder / "train.safetensors",
    )


def _matrix_rate(quick: bool) -> float:
    """Return the operations per second of square bf16 products."""
    size, device = (256, "cpu") if quick and not torch.cuda.is_available() else (8192, "cuda")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / median(seconds))


if __name__ == "__main__":
    sys.exit(main())

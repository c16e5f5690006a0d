"""Training speed in real tokens per second: kolotune, torchtune, and TRL at its best settings, in turns.

    python bench/training_speed.py [--rounds N] [--chats N] [--quick] [--json FILE]

All train on some of the same chats, in bf16, with the same adapters and loss on answers only. Real tokens are those of
the chats: padding does not count, and a shared prefix counts in each chat. The first step of each run is a warm-up and
does not count. torchtune runs as in the original scripts, recomputing activations. TRL is tried once in each of its
modes (batches of 1 to 16, of similar length, padding-free, packed). Modes that mix chats, so that the loss of a batch
is not that of its chats, are reported and excluded; the fastest of the others is measured in the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import environments
import material
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions
from operations import Shape, chats_of, count_operations

from kolotune.engines.job import TrainJob
from kolotune.engines.native.kernels import build
from kolotune.engines.prepared_tokens import PreparedTokens, epoch_steps
from kolotune.engines.process_environment import ENVIRONMENT
from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.stages import train

NATIVE, TORCHTUNE = "kolotune.engines.native", "kolotune.engines.torchtune"
BATCH_OF_MANY = 8
"""The batch size that kolotune chooses for chats of this length, if there are enough of them."""

_MODES = [
    *(("plain", size) for size in (1, 2, 4, 8, 16)),
    *((mode, size) for mode in ("grouped", "padding-free") for size in (4, 8, 16)),
    *(("packed", size) for size in (4, 8)),
]
_FEW_MODES = [("plain", 4), ("grouped", 8), ("packed", 4)]


def prepared_job(folder: Path, count: int, chats: Path | None = None) -> TrainJob:
    """Prepare `count` chats in `folder`; return the native engine's job with the batch size of many chats."""
    run = RunFolder(folder / "run")
    data = chats or material.chats(folder / "chats", count).train
    argv = [
        *KOLOTUNE, "prepare", data, "--eval-split", "0", "--max-seq-length", str(material.MAX_SEQUENCE),
        "--output-dir", run.root,
    ]  # fmt: skip
    measure(argv, folder / "prepare.log", env=material.OFFLINE)
    own = {"batch_size": BATCH_OF_MANY, "train_data": [data], "output_dir": run.root}
    values = material.values() | own | {"compile": "off" if build.reason_unavailable() else "on"}
    config = configs.resolve((values, "bench", run.root))
    return train.make_job(Context(config, run, material.base()))


def engine_speed(module: str, job: TrainJob, folder: Path) -> float:
    """Train an epoch; return the real tokens per second, without the first step."""
    folder.mkdir(parents=True)
    own = dataclasses.replace(
        job, adapter=str(folder / "adapter"), checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"), checkpoint_steps=0,
    )  # fmt: skip
    own.write(folder / "job.json")
    env = material.OFFLINE | (ENVIRONMENT if module == NATIVE else {})  # a peer runs with its own defaults
    measure(local.python(module, str(folder / "job.json")), folder / "log", env=env)
    return speed_of(Path(own.metrics), job)


def speed_of(metrics: Path, job: TrainJob, skipped: int = 1) -> float:
    """Return the real tokens per second of the steps in a metrics file, without the first `skipped` ones."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    epochs = (epoch_steps(len(tokens), epoch, job.seed, job.batch_size) for epoch in range(job.epochs))
    steps = [indices for epoch in epochs for indices in epoch][: len(speeds)]
    real = [sum(tokens.chat_length(index) for index in step) for step in steps]
    pairs = list(zip(real, speeds, strict=True))[skipped:]
    return sum(count for count, _ in pairs) / sum(count / speed for count, speed in pairs)


@dataclasses.dataclass(frozen=True)
class TrlSpeed:
    """The result of `peers/trl_training.py`."""

    tokens_per_second: float
    exact: bool


def trl(chats: Path, mode: str, size: int, folder: Path) -> TrlSpeed:
    """Train with TRL in one of its modes."""
    folder.mkdir(parents=True)
    task = {
        "base": str(material.base()), "train": str(chats), "seed": material.SEED, "rank": material.RANK,
        "alpha": material.ALPHA, "targets": list(material.TARGETS), "learning_rate": material.LEARNING_RATE,
        "max_length": material.MAX_SEQUENCE, "batch_size": size, "mode": mode,
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    python = environments.ensure("trl") / "python"
    argv = [python, environments.PEERS / "trl_training.py", folder / "task.json", folder / "result.json"]
    measure(argv, folder / "log", env=material.OFFLINE, cwd=folder)
    return typed_storage.read(TrlSpeed, folder / "result.json")


def best_of_trl(chats: Path, root: Path, quick: bool) -> tuple[Table, tuple[str, int]]:
    """Try all modes of TRL once; return a table, and the fastest mode that does not mix chats."""
    rows, best, fastest = [], ("plain", 4), 0.0
    for mode, size in _FEW_MODES if quick else _MODES:
        trained = trl(chats, mode, size, root / f"trl-{mode}-{size}")
        speed = trained.tokens_per_second
        rows.append([mode, size, speed, "yes" if trained.exact else "no: it mixes chats"])
        print(f"TRL, {mode}, batch {size}: {speed:.0f} tokens/s, exact: {trained.exact}", flush=True)
        if trained.exact and speed > fastest:
            best, fastest = (mode, size), speed
    return Table("Modes of TRL, once each", ["mode", "batch", "tokens/s", "loss as for separate chats"], rows), best


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.chats = 1, 24
    result = Result("training_speed", "Training speed", versions("torch", "transformers"), quick=arguments.quick)
    result.versions |= environments.versions(environments.ensure_torchtune(), "torchtune")
    result.versions |= environments.versions(environments.ensure("trl"), "trl")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        chats = material.chats(root / "chats", arguments.chats).train
        job = prepared_job(root, arguments.chats, chats=chats)
        four = dataclasses.replace(job, batch_size=material.BATCH_SIZE)
        table, (mode, size) = best_of_trl(chats, root, arguments.quick)
        result.tables.append(table)
        best = f"TRL, {mode}, batch {size}"
        engine_speed(NATIVE, job, root / "warm")
        runs: dict[str, Callable[[Path], float]] = {
            f"kolotune, batch {BATCH_OF_MANY}": lambda folder: engine_speed(NATIVE, job, folder),
            "kolotune, batch 4": lambda folder: engine_speed(NATIVE, four, folder),
            "torchtune, batch 4": lambda folder: engine_speed(TORCHTUNE, four, folder),
            f"torchtune, batch {BATCH_OF_MANY}": lambda folder: engine_speed(TORCHTUNE, job, folder),
            best: lambda folder: trl(chats, mode, size, folder).tokens_per_second,
        }
        speeds: dict[str, list[float]] = {program: [] for program in runs}
        for number in range(arguments.rounds):
            for index, (program, run) in enumerate(runs.items()):
                speeds[program].append(run(root / f"round-{number}-{index}"))
                print(f"round {number + 1}, {program}: {speeds[program][-1]:.0f} tokens/s", flush=True)
        result.notes.append(_limit(job))
    _add_speeds(result, speeds, best)
    result.finish(arguments.json)
    return 0


def _limit(job: TrainJob) -> str:
    """Return the operations that the exact result needs per real token, which limit the speed of any program."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    shape = Shape.read(Path(job.base_model), job.lora_rank, material.TARGETS)
    steps = list(epoch_steps(len(tokens), 0, job.seed, job.batch_size))
    counts = [count_operations(shape, chats_of(tokens, step)) for step in steps]
    real = sum(tokens.chat_length(index) for step in steps for index in step)
    per_token = sum(count.all - count.unneeded for count in counts) / real
    return (
        f"In batches of {job.batch_size}, the exact result of these chats needs {per_token / 1e6:.0f} million "
        "operations per real token. The matrix rate measured in the next section therefore limits the speed of any "
        "program."
    )


def _add_speeds(result: Result, speeds: dict[str, list[float]], best: str) -> None:
    medians = {program: median(measured) for program, measured in speeds.items()}
    ours = medians[f"kolotune, batch {BATCH_OF_MANY}"]
    rows = [
        [program, value, f"{min(speeds[program]):.0f} to {max(speeds[program]):.0f}", ours / value]
        for program, value in medians.items()
    ]
    columns = ["program", "tokens/s", "range", f"speedup of kolotune, batch {BATCH_OF_MANY}"]
    result.tables.append(Table("Real tokens per second, medians", columns, rows))
    torchtune = max(value for program, value in medians.items() if program.startswith("torchtune"))
    result.at_least("training speedup over torchtune in bf16, at its faster batch size", ours / torchtune, 10)
    result.at_least(f"training speedup over TRL's best setting ({best})", ours / medians[best], 8)


if __name__ == "__main__":
    raise SystemExit(main())

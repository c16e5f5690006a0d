"""Training speed in real tokens a second: kolotune, torchtune, and TRL at its best settings, in turns.

    python bench/training_speed.py [--rounds N] [--chats N] [--quick] [--json FILE]

All train a part of the same chats, in bf16, with the same adapters and the loss on the answers alone. Real tokens are
those of the chats: padding is left out, and a beginning that chats share is counted in each. The first step of each
run is left out: it warms up. torchtune runs as the original scripts ran it, with activations computed again on the way
back. TRL is tried once in every way that it offers (batches of 1 to 16, of near-equal length, without padding, packed);
those that mix up chats (the loss of a batch is not that of its chats) are told and left out; the best goes into the
rounds.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import material
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions
from operations import Shape, chats_of, needed

from kolotune.engines.job import TrainJob
from kolotune.engines.native.environment import ENVIRONMENT
from kolotune.engines.native.kernels import build
from kolotune.engines.prepared_tokens import PreparedTokens, epoch_steps
from kolotune.foundation import config as configs
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.stages import train

NATIVE, TORCHTUNE = "kolotune.engines.native", "kolotune.engines.torchtune"
BATCH_OF_MANY = 8
"""What kolotune comes to by itself for chats of this length, when there are enough of them for it."""

_WAYS = [
    *(("plain", size) for size in (1, 2, 4, 8, 16)),
    *((way, size) for way in ("grouped", "padding-free") for size in (4, 8, 16)),
    *(("packed", size) for size in (4, 8)),
]
_FEW_WAYS = [("plain", 4), ("grouped", 8), ("packed", 4)]


def prepared_job(folder: Path, count: int, chats: Path | None = None) -> TrainJob:
    """The native engine's job for `count` chats, in the batches of many chats, prepared in `folder`."""
    run = RunFolder(folder / "run")
    data = chats or material.chats(folder / "chats", count).train
    argv = [
        *KOLOTUNE, "prepare", data, "--eval-split", "0", "--max-seq-length", str(material.MAX_SEQUENCE),
        "--output-dir", run.root,
    ]  # fmt: skip
    measure(argv, folder / "prepare.log", env=material.OFFLINE)
    own = {"batch_size": BATCH_OF_MANY, "train_data": [data], "output_dir": run.root}
    values = material.values() | own | {"compile": "off" if build.why_not() else "on"}
    config = configs.resolve((values, "bench", run.root))
    return train.make_job(Context(config, run, material.base()))


def engine_speed(module: str, job: TrainJob, folder: Path) -> float:
    """Real tokens a second of an engine's epoch, without its first step."""
    folder.mkdir(parents=True)
    own = dataclasses.replace(
        job, adapter=str(folder / "adapter"), checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"), checkpoint_steps=0,
    )  # fmt: skip
    own.write(folder / "job.json")
    env = material.OFFLINE | (ENVIRONMENT if module == NATIVE else {})  # a peer runs as it is
    measure(local.python(module, str(folder / "job.json")), folder / "log", env=env)
    return speed_of(Path(own.metrics), job)


def speed_of(metrics: Path, job: TrainJob, skipped: int = 1) -> float:
    """Tokens a second of all steps in a file of metrics but the first ones."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    epochs = (epoch_steps(len(tokens), epoch, job.seed, job.batch_size) for epoch in range(job.epochs))
    steps = [indices for epoch in epochs for indices in epoch][: len(speeds)]
    real = [sum(tokens.chat_length(index) for index in step) for step in steps]
    pairs = list(zip(real, speeds, strict=True))[skipped:]
    return sum(count for count, _ in pairs) / sum(count / speed for count, speed in pairs)


def trl(chats: Path, way: str, size: int, folder: Path) -> dict[str, Any]:
    """What `peers/trl_training.py` found."""
    folder.mkdir(parents=True)
    task = {
        "base": str(material.base()), "train": str(chats), "seed": material.SEED, "rank": material.RANK,
        "alpha": material.ALPHA, "targets": list(material.TARGETS), "learning_rate": material.LEARNING_RATE,
        "max_length": material.MAX_SEQUENCE, "batch_size": size, "way": way,
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    python = environments.ensure("trl") / "python"
    argv = [python, environments.PEERS / "trl_training.py", folder / "task.json", folder / "result.json"]
    measure(argv, folder / "log", env=material.OFFLINE, cwd=folder)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def best_of_trl(chats: Path, root: Path, quick: bool) -> tuple[Table, tuple[str, int]]:
    """All ways of TRL, once each, and the fastest one that keeps chats apart."""
    rows, best, fastest = [], ("plain", 4), 0.0
    for way, size in _FEW_WAYS if quick else _WAYS:
        found = trl(chats, way, size, root / f"trl-{way}-{size}")
        speed = found["tokens_per_second"]
        rows.append([way, size, speed, "yes" if found["exact"] else "no: it mixes chats"])
        print(f"TRL, {way}, batch {size}: {speed:.0f} tokens/s, exact: {found['exact']}", flush=True)
        if found["exact"] and speed > fastest:
            best, fastest = (way, size), speed
    return Table("TRL's ways, once each", ["way", "batch", "tokens/s", "the chats' own loss"], rows), best


def main() -> int:
    """Measures and tells."""
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
        table, (way, size) = best_of_trl(chats, root, arguments.quick)
        result.tables.append(table)
        best = f"TRL, {way}, batch {size}"
        engine_speed(NATIVE, job, root / "warm")
        runs: dict[str, Callable[[Path], float]] = {
            f"kolotune, batch {BATCH_OF_MANY}": lambda folder: engine_speed(NATIVE, job, folder),
            "kolotune, batch 4": lambda folder: engine_speed(NATIVE, four, folder),
            "torchtune, batch 4": lambda folder: engine_speed(TORCHTUNE, four, folder),
            f"torchtune, batch {BATCH_OF_MANY}": lambda folder: engine_speed(TORCHTUNE, job, folder),
            best: lambda folder: float(trl(chats, way, size, folder)["tokens_per_second"]),
        }
        speeds: dict[str, list[float]] = {who: [] for who in runs}
        for number in range(arguments.rounds):
            for place, (who, run) in enumerate(runs.items()):
                speeds[who].append(run(root / f"round-{number}-{place}"))
                print(f"round {number + 1}, {who}: {speeds[who][-1]:.0f} tokens/s", flush=True)
        result.notes.append(_limit(job))
    _tell(result, speeds, best)
    result.finish(arguments.json)
    return 0


def _limit(job: TrainJob) -> str:
    """What keeps anyone from being faster: operations that the exact result needs, for each real token."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    shape = Shape.read(Path(job.base_model), job.lora_rank, material.TARGETS)
    steps = list(epoch_steps(len(tokens), 0, job.seed, job.batch_size))
    counts = [needed(shape, chats_of(tokens, step)) for step in steps]
    real = sum(tokens.chat_length(index) for step in steps for index in step)
    each = sum(count.all - count.spared for count in counts) / real
    return (
        f"In batches of {job.batch_size} the exact result of these chats needs {each / 1e6:.0f} million operations a "
        "real token; more than the measured rate of the next part allows of that, nobody can train."
    )


def _tell(result: Result, speeds: dict[str, list[float]], best: str) -> None:
    medians = {who: median(each) for who, each in speeds.items()}
    ours = medians[f"kolotune, batch {BATCH_OF_MANY}"]
    rows = [
        [who, value, f"{min(speeds[who]):.0f} to {max(speeds[who]):.0f}", ours / value]
        for who, value in medians.items()
    ]
    columns = ["who", "tokens/s", "from, to", f"kolotune's, batch {BATCH_OF_MANY}, are more by"]
    result.tables.append(Table("Real tokens a second, medians", columns, rows))
    torchtune = max(value for who, value in medians.items() if who.startswith("torchtune"))
    result.at_least("training tokens/s, against torchtune bf16, the faster of its batches", ours / torchtune, 10)
    result.at_least(f"training tokens/s, against TRL's best setting ({best})", ours / medians[best], 8)


if __name__ == "__main__":
    raise SystemExit(main())

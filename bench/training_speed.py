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
from pathlib import Path
from typing import Any

import environments
import material
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions

from kolotune.engines.job import TrainJob
from kolotune.engines.native.batches import Tokens, steps_of
from kolotune.layout import RunFolder
from kolotune.runners import local

_WAYS = [("plain", 1), ("plain", 2), ("plain", 4), ("plain", 8), ("plain", 16)] + [
    (way, size) for way in ("grouped", "padding-free", "packed") for size in (4, 8, 16)
]
_FEW_WAYS = [("plain", 4), ("grouped", 8), ("packed", 4)]


def prepared_job(folder: Path, count: int, *flags: str, chats: Path | None = None) -> TrainJob:
    """The native engine's job for `count` chats, with the batch that kolotune chooses, prepared in `folder`."""
    run = RunFolder(folder / "run")
    data = chats or material.chats(folder / "chats", count).train
    if not run.prepared.is_dir():
        argv = [*KOLOTUNE, "prepare", data, *_without_batch(), *flags, "--output-dir", run.root]
        measure(argv, folder / "prepare.log", env=material.OFFLINE)
    from kolotune import config as configs
    from kolotune import models
    from kolotune.records import Context
    from kolotune.reporter import PlainReporter
    from kolotune.stages import train

    saved = configs.load_file(run.config)
    config = configs.resolve((saved, "bench", run.root), ({"output_dir": run.root}, "bench", run.root))
    context = Context(config, run, models.resolve(config.base_model, None, PlainReporter()))
    return train.make_job(context)


def _without_batch() -> list[str]:
    flags = material.settings()
    at = flags.index("--batch-size")
    return flags[:at] + flags[at + 2 :]


def engine_speed(module: str, job: TrainJob, folder: Path) -> float:
    """Real tokens a second of an engine's epoch, without its first step."""
    folder.mkdir(parents=True)
    own = dataclasses.replace(
        job, adapter=str(folder / "adapter"), checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"), checkpoint_steps=0,
    )  # fmt: skip
    own.write(folder / "job.json")
    measure(local.python(module, str(folder / "job.json")), folder / "log", env=material.OFFLINE)
    return speed_of(Path(own.metrics), job)


def speed_of(metrics: Path, job: TrainJob, skipped: int = 1) -> float:
    """Tokens a second of all steps in a file of metrics but the first ones."""
    tokens = Tokens.load(Path(job.data) / "train.safetensors")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "loss" in line]
    epochs = (steps_of(len(tokens), epoch, job.seed, job.batch_size) for epoch in range(job.epochs))
    steps = [indices for epoch in epochs for indices in epoch][: len(speeds)]
    real = [sum(tokens.length_of(index) for index in step) for step in steps]
    pairs = list(zip(real, speeds, strict=True))[skipped:]
    return sum(count for count, _ in pairs) / sum(count / speed for count, speed in pairs)


def trl(chats: Path, way: str, size: int, folder: Path, steps: int = -1) -> dict[str, Any]:
    """What `peers/trl_training.py` found."""
    folder.mkdir(parents=True)
    task = {
        "base": str(material.base()), "train": str(chats), "seed": material.SEED, "rank": material.RANK,
        "alpha": material.ALPHA, "targets": list(material.TARGETS), "learning_rate": material.LEARNING_RATE,
        "max_length": material.MAX_SEQUENCE, "batch_size": size, "way": way, "steps": steps,
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
        native, torchtune = "kolotune.engines.native", "kolotune.engines.torchtune"
        table, (way, size) = best_of_trl(chats, root, arguments.quick)
        result.tables.append(table)
        ours, best = f"kolotune, batch {job.batch_size}", f"TRL, {way}, batch {size}"
        engine_speed(native, job, root / "warm")
        speeds: dict[str, list[float]] = {
            ours: [], "kolotune, batch 4": [], "torchtune, batch 4": [], f"torchtune, batch {job.batch_size}": [],
            best: [],
        }  # fmt: skip
        for number in range(arguments.rounds):
            speeds[ours].append(engine_speed(native, job, root / f"a{number}"))
            speeds["kolotune, batch 4"].append(engine_speed(native, four, root / f"b{number}"))
            speeds["torchtune, batch 4"].append(engine_speed(torchtune, four, root / f"c{number}"))
            if job.batch_size != material.BATCH_SIZE:
                speeds[f"torchtune, batch {job.batch_size}"].append(engine_speed(torchtune, job, root / f"d{number}"))
            speeds[best].append(trl(chats, way, size, root / f"e{number}")["tokens_per_second"])
            told = ", ".join(f"{who}: {each[-1]:.0f}" for who, each in speeds.items())
            print(f"round {number + 1}, tokens/s: {told}", flush=True)
    medians = {who: median(each) for who, each in speeds.items()}
    rows = [[who, value, f"{min(speeds[who]):.0f} to {max(speeds[who]):.0f}", medians[ours] / value]
            for who, value in medians.items()]  # fmt: skip
    result.tables.append(
        Table("Real tokens a second, medians", ["who", "tokens/s", "from, to", "kolotune's are more by"], rows)
    )
    result.at_least(
        "training tokens/s, against torchtune bf16, batch 4", medians[ours] / medians["torchtune, batch 4"], 10
    )
    result.at_least(
        f"training tokens/s, against TRL's best setting ({way}, batch {size})", medians[ours] / medians[best], 8
    )
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

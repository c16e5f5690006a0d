"""DPO: pairs a second and peak memory of kolotune, of TRL at its best setting, and of a supervised step.

    python bench/preferences.py [--rounds N] [--pairs N] [--quick] [--json FILE]

All train on the same pairs of the manners sample, in the dtype that a training has on this processor, with the same
adapters, on SmolLM2. Both compute the reference before the first step, which does not count, nor does the first step.
The supervised step has the same tokens and labels as ours of DPO: both answers of each pair, as answers to learn. TRL
is tried once with each batch size; the fastest is measured in the rounds. Memory is the peak of the whole process, the
reference and the loading included.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import environments
import material
from measuring import KOLOTUNE, ROOT, Result, Table, measure, median, options, versions

from kolotune.engines.job import TrainJob
from kolotune.engines.native.kernels import build
from kolotune.engines.process_environment import ENVIRONMENT
from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.hardware import best_dtype
from kolotune.run_folder.layout import TRAIN_TOKENS, RunFolder
from kolotune.run_folder.stage import Context
from kolotune.runners import local
from kolotune.stages import train

_PAIRS = ROOT / "examples" / "manners" / "pairs.jsonl"
_BETA, _BATCH = 0.1, 8
_SIZES, _FEW_SIZES = (1, 2, 4, 8), (2, 4)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Pairs per second after the first step, and the peak memory in MB (10^6 bytes)."""

    pairs_per_second: float
    peak_mb: float


@dataclasses.dataclass(frozen=True)
class _TrlResult:
    pairs_per_second: float
    steps: int


def prepared_job(folder: Path, pairs: Path) -> TrainJob:
    """Prepare the pairs; return the native engine's job."""
    run = RunFolder(folder / "run")
    own = {
        "batch_size": _BATCH, "train_data": [pairs], "output_dir": run.root, "objective": "dpo",
        "compile": "off" if build.reason_unavailable() else "on", "dtype": best_dtype(),
    }  # fmt: skip
    argv = [
        *KOLOTUNE, "prepare", pairs, "--objective", "dpo", "--eval-split", "0", "--max-seq-length",
        str(material.MAX_SEQUENCE), "--output-dir", run.root,
    ]  # fmt: skip
    measure(argv, folder / "prepare.log", env=material.OFFLINE)
    config = configs.resolve((material.values() | own, "bench", run.root))
    return train.make_job(Context(config, run, material.base()))


def supervised_job(job: TrainJob, folder: Path) -> TrainJob:
    """Return the job of supervised training on the same sequences and labels."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True)
    tables = load_file(Path(job.data) / TRAIN_TOKENS)
    tables.pop("rejected")
    save_file(tables, folder / TRAIN_TOKENS)
    return dataclasses.replace(job, data=str(folder), data_sha256="supervised", preference=None)


def engine_speed(job: TrainJob, folder: Path) -> Speed:
    """Train an epoch with the native engine."""
    folder.mkdir(parents=True)
    own = dataclasses.replace(
        job, adapter=str(folder / "adapter"), checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"), reference=str(folder / "reference.safetensors"), checkpoint_steps=0,
    )  # fmt: skip
    own.write(folder / "job.json")
    argv = local.python("kolotune.engines.native", str(folder / "job.json"))
    measured = measure(argv, folder / "log", env=material.OFFLINE | ENVIRONMENT)
    lines = [json.loads(line) for line in Path(own.metrics).read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines if "loss" in line]
    return Speed(job.batch_size * (len(times) - 1) / (times[-1] - times[0]), measured.peak_mb)


def trl_speed(pairs: Path, size: int, folder: Path) -> Speed:
    """Train an epoch with TRL."""
    folder.mkdir(parents=True)
    task = {
        "base": str(material.base()), "pairs": str(pairs), "beta": _BETA, "seed": material.SEED, "rank": material.RANK,
        "alpha": material.ALPHA, "targets": list(material.TARGETS), "learning_rate": material.LEARNING_RATE,
        "max_length": material.MAX_SEQUENCE, "batch_size": size, "dtype": best_dtype(),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    python = environments.ensure("trl") / "python"
    argv = [python, environments.PEERS / "trl_preference_training.py", folder / "task.json", folder / "result.json"]
    measured = measure(argv, folder / "log", env=material.OFFLINE, cwd=folder)
    return Speed(typed_storage.read(_TrlResult, folder / "result.json").pairs_per_second, measured.peak_mb)


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.pairs = 1, 16
    result = Result("preferences", "Preferences", versions("torch", "transformers"), quick=arguments.quick)
    result.versions |= environments.versions(environments.ensure("trl"), "trl")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pairs = root / "pairs.jsonl"
        lines = _PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)[: arguments.pairs]
        pairs.write_text("".join(lines), encoding="utf-8")
        job = prepared_job(root, pairs)
        supervised = supervised_job(job, root / "supervised")
        sizes = _FEW_SIZES if arguments.quick else _SIZES
        tried: dict[int, Speed] = {}
        for size in sizes:
            tried[size] = trl_speed(pairs, size, root / f"trl-{size}")
            print(f"TRL, batch {size}: {tried[size]}", flush=True)
        best = max(tried, key=lambda size: tried[size].pairs_per_second)
        rows = [[size, each.pairs_per_second, each.peak_mb] for size, each in tried.items()]
        result.tables.append(Table("TRL, once each", ["batch", "pairs/s", "peak memory, MB"], rows))
        runs = {
            f"kolotune, DPO, batch {_BATCH}": lambda folder: engine_speed(job, folder),
            f"kolotune, supervised on the same tokens, batch {_BATCH}": lambda folder: engine_speed(supervised, folder),
            f"TRL, DPO, batch {best}": lambda folder: trl_speed(pairs, best, folder),
        }
        speeds: dict[str, list[Speed]] = {program: [] for program in runs}
        for number in range(arguments.rounds):
            for index, (program, run) in enumerate(runs.items()):
                speeds[program].append(run(root / f"round-{number}-{index}"))
                print(f"round {number + 1}, {program}: {speeds[program][-1]}", flush=True)
    _add_figures(result, speeds)
    result.finish(arguments.json)
    return 0


def _add_figures(result: Result, speeds: dict[str, list[Speed]]) -> None:
    rates, memory = (
        [median(getattr(each, name) for each in measured) for measured in speeds.values()]
        for name in ("pairs_per_second", "peak_mb")
    )
    rows = [
        [program, rate, f"{min(each.pairs_per_second for each in speeds[program]):.2f} to "
        f"{max(each.pairs_per_second for each in speeds[program]):.2f}", peak]
        for program, rate, peak in zip(speeds, rates, memory, strict=True)
    ]  # fmt: skip
    result.tables.append(Table("Medians", ["program", "pairs/s", "range", "peak memory, MB"], rows))
    result.at_least("pairs a second, against TRL's best setting", rates[0] / rates[2], 3)
    result.at_most("peak memory, against TRL's", memory[0] / memory[2], 0.5, " x")
    result.at_most("time of a step, against our supervised step of the same tokens", rates[1] / rates[0], 2.2, " x")
    result.at_most("peak memory, against that", memory[0] / memory[1], 1.2, " x")


if __name__ == "__main__":
    raise SystemExit(main())

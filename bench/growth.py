"""How speed and memory change with the number and the length of chats.

    python bench/growth.py [--rounds N] [--steps N] [--quick] [--json FILE]

`kolotune train` runs on 100 to 10,000 similar chats, prepared beforehand, with the same batch size. It is stopped after
a number of steps (an epoch of 10,000 would take an hour), and the first steps are not counted. The same is done with
chats of 128 to 8,192 tokens. Memory is that of the whole process tree.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import material
from docstring_chats import SYSTEM, docstrings
from measuring import KOLOTUNE, Measured, Result, Table, measure, median, options, versions
from tokenizers import Tokenizer

from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import MetricsLine, parse_line

_COUNTS, _LENGTHS = (100, 1_000, 10_000), (128, 256, 512, 1_024, 2_048, 4_096, 8_192)
_BATCH = 8
_TOKENS_PER_STEP = 2_048
_SKIPPED = 2
_TARGET_PERCENT = 100
_TARGET_GB = 6
_SPECIAL_TOKENS = 30  # at least what roles, special tokens and the question of a long chat take


@dataclass(frozen=True)
class StoppedTraining:
    """A training that was stopped: real tokens per second after the first steps, and the memory of the process tree."""

    tokens_per_second: float
    measured: Measured


def prepare_run(folder: Path, data: Path, longest: int) -> RunFolder:
    """Return a run folder with prepared chats."""
    run = RunFolder(folder)
    argv = [
        *KOLOTUNE, "prepare", data, "--eval-split", "0", "--max-seq-length", str(longest), "--output-dir", run.root,
    ]  # fmt: skip
    measure(argv, folder.with_suffix(".log"), env=material.OFFLINE)
    return run


def train_steps(
    run: RunFolder, batch: int, steps: int, *more: str, threads: int = 0, memory: bool = True
) -> StoppedTraining:
    """Run `kolotune train` from scratch until it has made `steps` steps.

    Args:
        run: a run folder with prepared chats.
        batch: chats per step.
        steps: when to stop.
        more: options.
        threads: per process; 0 for `material.THREADS`.
        memory: see `measuring.measure`.
    """
    run.metrics.unlink(missing_ok=True)
    argv = [
        *KOLOTUNE, "train", run.root, "--epochs", "1000", "--dtype", "bf16",
        "--batch-size", str(batch), "--checkpoint-steps", "0", "--target-modules", ",".join(material.TARGETS), *more,
    ]  # fmt: skip
    env = {**material.OFFLINE, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    log = run.root.with_suffix(".log")
    measured = measure(argv, log, env=env, until=lambda: len(_steps(run)) >= steps, memory=memory)
    speeds = [line.tokens_per_second for line in _steps(run)[_SKIPPED:steps]]
    # Batches are about equally long, so the harmonic mean of the speeds is right.
    return StoppedTraining(len(speeds) / sum(1 / speed for speed in speeds), measured)


def _steps(run: RunFolder) -> list[MetricsLine]:
    """Return the metrics of finished steps, without a line that is still being written."""
    try:
        text = run.metrics.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = [parse_line(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line is not None and line.loss is not None]


def long_chats(path: Path, count: int, length: int) -> None:
    """Write chats of nearly `length` tokens, with concatenated docstrings as the answers."""
    tokenizer = Tokenizer.from_file(str(material.base() / "tokenizer.json"))
    texts = [text for _, text in docstrings()]
    budget = length - len(tokenizer.encode(SYSTEM).ids) - _SPECIAL_TOKENS
    text = "\n\n".join(texts * (1 + count * length // 100_000))
    start = 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answer = text[start : start + 6 * budget]
            start += len(answer)
            while (tokens := len(tokenizer.encode(answer).ids)) > budget:
                answer = answer[: min(len(answer) - 1, len(answer) * budget // tokens)]
            question = f"Part {number}, please."
            roles = ("system", SYSTEM), ("user", question), ("assistant", answer)
            file.write(json.dumps({"messages": [{"role": role, "content": content} for role, content in roles]}) + "\n")


def measure_many(root: Path, counts: tuple[int, ...], rounds: int, steps: int, result: Result) -> None:
    """Measure more and more chats."""
    runs = {}
    for count in counts:
        runs[count] = prepare_run(root / f"many-{count}", material.chats(root / f"chats-{count}", count).train, 2_048)
    trainings: dict[int, list[StoppedTraining]] = {count: [] for count in counts}
    for number in range(rounds):
        for count, run in runs.items():
            trainings[count].append(train_steps(run, _BATCH, steps))
            speed = trainings[count][-1].tokens_per_second
            print(f"round {number + 1}, {count} chats: {speed:.0f} tokens/s", flush=True)
    speeds = {count: median(training.tokens_per_second for training in trainings[count]) for count in counts}
    peaks = {count: median(training.measured.peak_mb for training in trainings[count]) for count in counts}
    rows = [[f"{count:,}", speeds[count], peaks[count]] for count in counts]
    result.tables.append(Table(f"Batches of {_BATCH}, {steps} steps, medians", ["chats", "tokens/s", "peak MB"], rows))
    first, last = counts[0], counts[-1]
    what = f"tokens/s at {last:,} chats, relative to {first:,}"
    result.at_least(what, 100 * speeds[last] / speeds[first], _TARGET_PERCENT, "%")


def measure_long(root: Path, lengths: tuple[int, ...], steps: int, result: Result) -> None:
    """Measure longer and longer chats."""
    rows, peak = [], 0.0
    for length in lengths:
        batch = max(1, _TOKENS_PER_STEP // length)
        data = root / f"long-{length}.jsonl"
        long_chats(data, batch * 4, length)
        run = train_steps(prepare_run(root / f"long-{length}", data, length), batch, steps)
        rows.append([f"{length:,}", batch, run.tokens_per_second, run.measured.peak_mb, run.measured.anonymous_mb])
        print(f"{length} tokens: {run.tokens_per_second:.0f} tokens/s, {run.measured.peak_mb:.0f} MB", flush=True)
        peak = run.measured.peak_mb
    columns = ["tokens per chat", "batch", "tokens/s", "peak MB", "anonymous MB"]
    result.tables.append(Table(f"Long chats, {steps} steps", columns, rows))
    what = f"{lengths[-1]:,}-token sequences of the 135M model, memory of the process tree"
    result.at_most(what, peak / 1000, _TARGET_GB, " GB")


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=22)
    arguments = parser.parse_args()
    counts, lengths, long_steps = _COUNTS, _LENGTHS, 5
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 6
        counts, lengths, long_steps = (20, 200), (128, 1_024), 3
    result = Result("growth", "Growth", versions("torch"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        measure_many(Path(name), counts, arguments.rounds, arguments.steps, result)
        measure_long(Path(name), lengths, long_steps, result)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

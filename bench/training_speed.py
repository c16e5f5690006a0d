"""Training speed of the native engine against torchtune and a plain peft + transformers loop, in one run, in turns.

    python bench/training_speed.py [--rounds N] [--steps N] [--batch-size N]

All three train on the same chats of the sample, in the same dtype and batches, with the same adapters; what counts is
real tokens a second, padding left out and shared beginnings counted in each chat. torchtune runs as the original
scripts ran it, with activations computed again on the way back. Prints each round, the medians and their ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kolotune import config as configs
from kolotune import hardware, models
from kolotune.engines.job import TrainJob
from kolotune.engines.native.batches import IGNORED, Tokens, make_batch, steps_of
from kolotune.engines.native.training import Trainer
from kolotune.engines.torchtune import environment
from kolotune.layout import RunFolder
from kolotune.records import Context
from kolotune.reporter import PlainReporter
from kolotune.runners import local
from kolotune.stages import prepare, train

SAMPLE = Path(__file__).parent.parent / "examples" / "lighthouse" / "chats.jsonl"


def job_for(folder: Path, batch_size: int, chats: int) -> TrainJob:
    """The first chats of the sample, prepared in `folder`, as a job of one epoch."""
    data = folder / "chats.jsonl"
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()[:chats]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "train_data": [data], "output_dir": folder, "epochs": 1, "dtype": hardware.best_dtype(),
        "eval_split": 0, "batch_size": batch_size, "checkpoint_steps": 0,
    }  # fmt: skip
    config = configs.resolve((values, "bench", Path.cwd()))
    base = models.resolve(config.base_model, None, PlainReporter())
    context = Context(config, RunFolder(folder), base)
    prepare.run(context, PlainReporter())
    return train.make_job(context)


def plain_step(job: TrainJob, tokens: Tokens) -> Callable[[Sequence[int]], None]:
    """One step, over the chats of given numbers, of the loop that a user would write with peft and transformers."""
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(job.base_model, dtype=dtype)
    lora: Any = LoraConfig(
        r=job.lora_rank, lora_alpha=int(job.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=job.learning_rate)

    def step(indices: Sequence[int]) -> None:
        batch = make_batch(tokens, list(indices))
        labels = torch.full_like(batch.ids, IGNORED)
        labels[:, batch.positions + 1] = batch.targets
        model(input_ids=batch.ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchtune_speed(job: TrainJob, folder: Path) -> float:
    """Tokens a second of torchtune's steps, the first left out: it warms up."""
    folder.mkdir()
    own = dataclasses.replace(
        job,
        adapter=str(folder / "adapter"),
        checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"),
    )
    own.write(folder / "job.json")
    argv = local.python("kolotune.engines.torchtune", str(folder / "job.json"))
    code = local.run(argv, log=folder / "log", ends_with_us=True)
    assert code == 0, local.last_lines(folder / "log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median([line["tokens_per_second"] for line in lines if "loss" in line][1:])


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    environment.ensure(print)
    with tempfile.TemporaryDirectory() as folder:
        job = job_for(Path(folder), arguments.batch_size, arguments.batch_size * arguments.steps)
        trainer = Trainer(job)
        steps = list(steps_of(len(trainer.tokens), 0, job.seed, job.batch_size))
        plain = plain_step(job, trainer.tokens)

        def timed(step: Callable[[Sequence[int]], object]) -> float:
            speeds = []
            for indices in steps:
                started = time.perf_counter()
                step(indices)
                real = sum(trainer.tokens.length_of(index) for index in indices)
                speeds.append(real / (time.perf_counter() - started))
            return statistics.median(speeds)

        speeds: dict[str, list[float]] = {"kolotune": [], "peft loop": [], "torchtune": []}
        for number in range(arguments.rounds):
            speeds["kolotune"].append(timed(lambda indices: trainer.step(indices, job.learning_rate)))
            speeds["peft loop"].append(timed(plain))
            speeds["torchtune"].append(torchtune_speed(job, Path(folder, f"torchtune-{number}")))
            told = ", ".join(f"{name} {each[-1]:.0f}" for name, each in speeds.items())
            print(f"round {number + 1}, tokens/s: {told}", flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    print(f"{job.dtype}, batches of {job.batch_size}, {torch.get_num_threads()} threads, {versions}, torchtune 0.6.1")
    for peer in ("peft loop", "torchtune"):
        print(f"kolotune / {peer}: {medians['kolotune'] / medians[peer]:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

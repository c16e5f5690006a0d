"""Training speed of the native engine against a plain peft + transformers loop, in one run, in turns.

    python bench/training_speed.py [--rounds N] [--chats N]

Both train on the same batches of the sample's chats, in the same dtype; what counts is real tokens a second,
padding left out. Prints each round, the medians and their ratio.
"""

from __future__ import annotations

import argparse
import importlib.metadata
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
from kolotune.layout import RunFolder
from kolotune.records import Context
from kolotune.reporter import PlainReporter
from kolotune.stages import prepare, train

SAMPLE = Path(__file__).parent.parent / "examples" / "lighthouse" / "chats.jsonl"


def job_for(folder: Path) -> TrainJob:
    """The sample, prepared in `folder`, as a job of one epoch."""
    values = {"train_data": [SAMPLE], "output_dir": folder, "epochs": 1, "dtype": hardware.best_dtype()}
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
        for at in range(0, len(indices), job.batch_size):
            batch = make_batch(tokens, list(indices[at : at + job.batch_size]))
            labels = torch.full_like(batch.ids, IGNORED)
            labels[:, batch.positions + 1] = batch.targets
            model(input_ids=batch.ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = job_for(Path(folder))
        trainer = Trainer(job)
        size = job.batch_size * job.gradient_accumulation
        steps = list(steps_of(len(trainer.tokens), 0, job.seed, size))[: arguments.steps]
        contenders: dict[str, Callable[[Sequence[int]], object]] = {
            "kolotune": lambda indices: trainer.step(indices, job.learning_rate),
            "peft loop": plain_step(job, trainer.tokens),
        }
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(arguments.rounds + 1):
            for name, contender in contenders.items():
                started = time.perf_counter()
                for indices in steps:
                    contender(indices)
                real = sum(trainer.tokens.length_of(index) for indices in steps for index in indices)
                speed = real / (time.perf_counter() - started)
                if number:  # the first round warms up
                    speeds[name].append(speed)
                    print(f"round {number}: {name:10} {speed:6.0f} tokens/s", flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    print(f"{job.dtype}, {torch.get_num_threads()} threads, {versions}")
    print(f"kolotune / peft loop: {medians['kolotune'] / medians['peft loop']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Training speed of TRL's DPOTrainer. Runs in TRL's environment.

    python trl_preference_training.py TASK.json RESULT.json

The task has base, pairs (JSON Lines with prompt, chosen and rejected), beta, seed, rank, alpha, targets, learning_rate,
max_length, batch_size and dtype (bf16 or fp32). The reference is computed before the training, as TRL advises for
speed, and its time does not count. The result has the pairs per second after the first step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class StepTimes(TrainerCallback):
    """Record when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **others: object) -> None:
        self.ends.append(time.perf_counter())


def main(task_file: Path, result_file: Path) -> int:
    """Train and write the result."""
    transformers.logging.set_verbosity_error()
    task = json.loads(task_file.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(task["pairs"]).read_text(encoding="utf-8").splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    data = [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in rows]
    is_bf16 = task["dtype"] == "bf16"
    config = DPOConfig(
        output_dir=str(result_file.parent / "trl"), num_train_epochs=1, seed=task["seed"], bf16=is_bf16, use_cpu=True,
        per_device_train_batch_size=task["batch_size"], gradient_checkpointing=False, beta=task["beta"],
        learning_rate=task["learning_rate"], lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.01,
        max_length=task["max_length"], precompute_ref_log_probs=True, save_strategy="no", report_to=[],
        logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, dataloader_drop_last=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], target_modules=task["targets"], task_type="CAUSAL_LM"
    )  # fmt: skip
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=dtype, attn_implementation="sdpa")
    times = StepTimes()
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(data), peft_config=lora, callbacks=[times],
        processing_class=AutoTokenizer.from_pretrained(task["base"]),
    )  # fmt: skip
    trainer.train()
    pairs = task["batch_size"] * (len(times.ends) - 1)
    result = {"pairs_per_second": pairs / (times.ends[-1] - times.ends[0]), "steps": len(times.ends)}
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))

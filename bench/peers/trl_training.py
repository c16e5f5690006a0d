"""Training speed of TRL's SFTTrainer. Runs in TRL's environment.

    python trl_training.py TASK.json RESULT.json

The task has base, train (chats as JSON Lines), seed, rank, alpha, targets, learning_rate, max_length, batch_size and
`mode` ("plain", "grouped" for batches of similar length, "padding-free", "packed").
The result has the real tokens per second after the first step, and whether the loss of a batch equals that of its
separate chats. Packed and padding-free batches are right only if attention does not cross chats, for which TRL requires
flash attention, and CPUs don't have that.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

_TOLERANCE = 0.02  # relative, for losses in bf16
_MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "packing_strategy": "bfd"},
}


class StepTimes(TrainerCallback):
    """Record when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **others: object) -> None:
        self.ends.append(time.perf_counter())


class CountingTrainer(SFTTrainer):
    """Count the real tokens of each step, without padding."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokens: list[int] = []

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], *others: object, **options: object
    ) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return super().training_step(model, inputs, *others, **options)


def chats(path: Path) -> Dataset:
    """Return prompts and completions, with which TRL computes the loss on answers only."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def trainer_for(task: dict[str, Any], times: StepTimes, output: str) -> CountingTrainer:
    """Return TRL's trainer for the task."""
    mode_options = dict(_MODES[task["mode"]])
    lengths = {"packed": task["batch_size"] * 256, "padding-free": None}
    config = SFTConfig(
        output_dir=output, num_train_epochs=1, seed=task["seed"], bf16=True, use_cpu=True,
        per_device_train_batch_size=1 if task["mode"] == "packed" else task["batch_size"],
        gradient_checkpointing=False, learning_rate=task["learning_rate"], lr_scheduler_type="cosine",
        warmup_steps=2, weight_decay=0.01, max_length=lengths.get(task["mode"], task["max_length"]),
        completion_only_loss=True, save_strategy="no",
        report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, **mode_options,
    )  # fmt: skip
    lora = LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], target_modules=task["targets"], task_type="CAUSAL_LM"
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.bfloat16, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(task["base"])
    return CountingTrainer(
        model, config, train_dataset=chats(Path(task["train"])), processing_class=tokenizer, peft_config=lora,
        callbacks=[times],
    )  # fmt: skip


@torch.no_grad()
def losses(trainer: CountingTrainer) -> tuple[float, float]:
    """Return the summed loss of one batch in this mode, and of its chats computed separately."""
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    together = _summed(model, batch)
    ids, labels, starts = batch["input_ids"], batch["labels"], None
    if "position_ids" in batch:  # all chats in one sequence
        starts = [*(batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist(), ids.shape[1]]
        pairs = [(ids[:, a:b], labels[:, a:b]) for a, b in itertools.pairwise(starts)]
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        pairs = [(ids[row : row + 1, :n], labels[row : row + 1, :n]) for row, n in enumerate(lengths)]
    alone = sum(_summed(model, {"input_ids": each, "labels": targets}) for each, targets in pairs)
    model.train()
    return together, alone


def _summed(model: Any, batch: dict[str, torch.Tensor]) -> float:
    labels = batch["labels"]
    kept = {name: each for name, each in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**kept, use_cache=False).logits[:, :-1].float()
    return float(
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
        )
    )


def main(task_file: Path, result_file: Path) -> int:
    """Train and write the result."""
    transformers.logging.set_verbosity_error()
    task = json.loads(task_file.read_text(encoding="utf-8"))
    times = StepTimes()
    trainer = trainer_for(task, times, str(result_file.parent / "trl"))
    together, alone = losses(trainer)
    trainer.train()
    seconds = times.ends[-1] - times.ends[0]
    tokens = sum(trainer.tokens[1 : len(times.ends)])
    result = {
        "tokens_per_second": tokens / seconds, "tokens": tokens, "steps": len(times.ends), "loss_together": together,
        "loss_alone": alone, "exact": abs(together / alone - 1) < _TOLERANCE,
    }  # fmt: skip
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))

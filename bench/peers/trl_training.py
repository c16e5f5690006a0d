"""Training speed of TRL's SFTTrainer. Runs in TRL's environment.

    python trl_training.py TASK.json RESULT.json

The task: base, train (chats as JSON Lines), seed, rank, alpha, targets, learning_rate, max_length, batch_size,
`way` ("plain", "grouped": batches of near-equal length, "padding-free", "packed").
The result: real tokens a second after the first step, and whether the loss of a batch of this way is the loss of its
chats one by one (packing and padding-free batches are right only where attention keeps chats apart, for which TRL asks
for flash attention, that CPUs don't have).
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

_ALIKE = 0.02  # relative, of losses in bf16
_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True},
    "packed": {"packing": True, "packing_strategy": "bfd"},
}


class Timed(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.ends.append(time.perf_counter())


class Counting(SFTTrainer):
    """Counts each step's real tokens: a padded place is none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokens: list[int] = []
        self.first: dict[str, torch.Tensor] = {}

    def training_step(self, model: Any, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return super().training_step(model, inputs, *others, **options)


def chats(path: Path) -> Dataset:
    """Prompt and completion: TRL's way to a loss on the answer alone."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def trainer_for(task: dict[str, Any], timed: Timed, output: str) -> Counting:
    """TRL's trainer for the task."""
    way = dict(_WAYS[task["way"]])
    lengths = {"packed": task["batch_size"] * 256, "padding-free": None}
    config = SFTConfig(
        output_dir=output, num_train_epochs=1, seed=task["seed"], bf16=True, use_cpu=True,
        per_device_train_batch_size=1 if task["way"] == "packed" else task["batch_size"],
        gradient_checkpointing=False, learning_rate=task["learning_rate"], lr_scheduler_type="cosine",
        warmup_steps=2, weight_decay=0.01, max_length=lengths.get(task["way"], task["max_length"]),
        completion_only_loss=True, save_strategy="no",
        report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, **way,
    )  # fmt: skip
    lora = LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], target_modules=task["targets"], task_type="CAUSAL_LM"
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.bfloat16, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(task["base"])
    return Counting(
        model, config, train_dataset=chats(Path(task["train"])), processing_class=tokenizer, peft_config=lora,
        callbacks=[timed],
    )  # fmt: skip


@torch.no_grad()
def losses(trainer: Counting) -> tuple[float, float]:
    """The summed loss of one batch as this way computes it, and of its chats one by one."""
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    together = _summed(model, batch)
    ids, labels, starts = batch["input_ids"], batch["labels"], None
    if "position_ids" in batch:  # all chats in one row
        starts = [*(batch["position_ids"][0] == 0).nonzero().squeeze(1).tolist(), ids.shape[1]]
        pairs = [(ids[:, a:b], labels[:, a:b]) for a, b in itertools.pairwise(starts)]
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        pairs = [(ids[row : row + 1, :n], labels[row : row + 1, :n]) for row, n in enumerate(lengths)]
    alone = sum(_summed(model, {"input_ids": each, "labels": wanted}) for each, wanted in pairs)
    model.train()
    return together, alone


def _summed(model: Any, batch: dict[str, Any]) -> float:
    labels = batch["labels"]
    kept = {name: each for name, each in batch.items() if name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**kept, use_cache=False).logits[:, :-1].float()
    return float(
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
        )
    )


def main(task_file: Path, result_file: Path) -> int:
    """Trains and tells."""
    transformers.logging.set_verbosity_error()
    task = json.loads(task_file.read_text(encoding="utf-8"))
    timed = Timed()
    trainer = trainer_for(task, timed, str(result_file.parent / "trl"))
    together, alone = losses(trainer)
    trainer.train()
    seconds = timed.ends[-1] - timed.ends[0]
    tokens = sum(trainer.tokens[1 : len(timed.ends)])
    result = {
        "tokens_per_second": tokens / seconds, "tokens": tokens, "steps": len(timed.ends), "loss_together": together,
        "loss_alone": alone, "exact": abs(together / alone - 1) < _ALIKE,
    }  # fmt: skip
    result_file.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))

"""Small training jobs, and chats of random tokens for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.engines.job import TrainJob

VOCABULARY = 96


def write_tokens(path: Path, chats: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Write chats (ids, loss mask) as the prepare stage does."""
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "ids": np.array([token for ids, _ in chats for token in ids], np.int32),
            "labelled": np.array([flag for _, mask in chats for flag in mask], np.uint8),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in chats)], dtype=np.int64),
        },
        path,
    )


def random_chats(count: int, seed: int, shortest: int = 5, longest: int = 20) -> list[tuple[list[int], list[int]]]:
    """Return chats of random tokens with a rule to learn: each answer token is its predecessor plus 3.

    About nine tenths of the answer tokens are in the loss mask.
    """
    import random

    dice = random.Random(seed)
    chats = []
    for _ in range(count):
        length = dice.randint(shortest, longest)
        start = dice.randint(1, length - 2)
        ids = [dice.randrange(VOCABULARY) for _ in range(start)]
        while len(ids) < length:
            ids.append((ids[-1] + 3) % VOCABULARY)
        chats.append((ids, [int(index >= start and dice.random() < 0.9) for index in range(length)]))
        chats[-1][1][-1] = 1
    return chats


@dataclass(frozen=True)
class TrainingFolder:
    """A folder with a base model and data, for training jobs."""

    root: Path

    def job(self, name: str = "run", **options: Any) -> TrainJob:
        """Return a job that writes into the folder `name`; the options are fields of `TrainJob`."""
        defaults: dict[str, Any] = {
            "resume": False,
            "nproc": 1,
            "nnodes": 1,
            "rdzv": None,
            "sharded": False,
            "dtype": "fp32",
            "compile": False,
            "load_in_4bit": False,
            "epochs": 2,
            "learning_rate": 5e-3,
            "scheduler_type": "cosine",
            "warmup_steps": None,
            "weight_decay": 0.01,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "max_grad_norm": 1.0,
            "seed": 7,
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "target_modules": ["all-linear"],
            "early_stopping": 0,
            "checkpoint_steps": 0,
            "base_model": str(self.root / "base"),
            "base_name": "tiny",
            "base_sha256": "b",
            "data": str(self.root / "data"),
            "data_sha256": "d",
            "adapter": str(self.root / name / "adapter"),
            "checkpoints": str(self.root / name / "checkpoints"),
            "metrics": str(self.root / name / "metrics.jsonl"),
        }
        (self.root / name).mkdir(exist_ok=True)
        return TrainJob(**{**defaults, **options})

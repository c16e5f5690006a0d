"""Small trainings: chats of random tokens, and a folder with jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.engines.job import TrainJob

VOCABULARY = 96


def write_tokens(path: Path, chats: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Chats (ids, flags) as the prepare stage writes them."""
    import numpy as np
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "ids": np.array([each for ids, _ in chats for each in ids], np.int32),
            "labelled": np.array([each for _, flags in chats for each in flags], np.uint8),
            "offsets": np.cumsum([0, *(len(ids) for ids, _ in chats)], dtype=np.int64),
        },
        path,
    )


def random_chats(count: int, seed: int, shortest: int = 5, longest: int = 20) -> list[tuple[list[int], list[int]]]:
    """Chats of random tokens that follow a rule (each answer token is its predecessor plus 3), partly labelled."""
    import random

    dice = random.Random(seed)
    chats = []
    for _ in range(count):
        length = dice.randint(shortest, longest)
        start = dice.randint(1, length - 2)
        ids = [dice.randrange(VOCABULARY) for _ in range(start)]
        while len(ids) < length:
            ids.append((ids[-1] + 3) % VOCABULARY)
        chats.append((ids, [int(at >= start and dice.random() < 0.9) for at in range(length)]))
        chats[-1][1][-1] = 1
    return chats


@dataclass(frozen=True)
class TrainingFolder:
    """A folder with a base model and data, and the jobs that train there."""

    root: Path

    def job(self, name: str = "run", **options: Any) -> TrainJob:
        """A job whose outputs stand in the folder `name`; the options are those of `TrainJob`."""
        chosen: dict[str, Any] = {
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
        return TrainJob(**{**chosen, **options})

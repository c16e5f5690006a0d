"""Small training jobs, and chats of random tokens for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kolotune.engines.job import PreferenceSettings, TrainJob
from kolotune.foundation.objectives import beta_of

VOCABULARY = 96


LabelledIds: TypeAlias = tuple[Sequence[int], Sequence[float]]
"""A sequence: ids, and for each how much the loss on it counts: 0 or 1, or a weight in between."""


class Preference(list[LabelledIds]):
    """The sequences of a chat, of which the first `rejected` are of the rejected answer."""

    def __init__(self, sequences: Sequence[LabelledIds], rejected: int) -> None:
        super().__init__(sequences)
        self.rejected = rejected


def write_tokens(path: Path, chats: Sequence[LabelledIds | list[LabelledIds]]) -> None:
    """Write chats as the prepare stage does; a chat is a sequence, or a list of several."""
    import numpy as np
    from safetensors.numpy import save_file

    sequences = [each for chat in chats for each in (chat if isinstance(chat, list) else [chat])]
    arrays = {
        "ids": np.array([token for ids, _ in sequences for token in ids], np.int32),
        "labelled": np.array([weight > 0 for _, weights in sequences for weight in weights], np.uint8),
        "offsets": np.cumsum([0, *(len(ids) for ids, _ in sequences)], dtype=np.int64),
    }
    if any(0 < weight < 1 for _, weights in sequences for weight in weights):
        arrays["weights"] = np.array([weight for _, weights in sequences for weight in weights], np.float32)
    if len(sequences) > len(chats):
        sizes = [len(chat) if isinstance(chat, list) else 1 for chat in chats]
        arrays["chats"] = np.cumsum([0, *sizes], dtype=np.int64)
    if any(isinstance(chat, Preference) for chat in chats):
        arrays["rejected"] = np.array([getattr(chat, "rejected", 0) for chat in chats], np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path)


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


def branching_chats(
    count: int, seed: int, *, turns: int = 5, longest: int = 12, system: int = 0, kept: float = 0.3
) -> list[list[LabelledIds]]:
    """Return chats of up to `turns` random exchanges, each answer a sequence of its own behind its prompt.

    Each prompt ends with an opening that is not written in front of finished answers. The text of an answer follows
    `random_chats`' rule.

    Args:
        count, seed: how many chats, of which random numbers.
        turns: exchanges of the longest chat.
        longest: tokens of the longest question and answer.
        system: tokens with which all chats begin.
        kept: how many of the finished answers stay with their opening, as they were generated.
    """
    import random

    dice = random.Random(seed)
    opening, shared = [1, 2], [dice.randrange(VOCABULARY) for _ in range(system)]
    chats = []
    for _ in range(count):
        history, sequences = list(shared), []
        for _ in range(dice.randint(1, turns)):
            history += [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, longest))] + [3]
            first = dice.randrange(VOCABULARY)
            answer = [(first + 3 * index) % VOCABULARY for index in range(dice.randint(1, longest))]
            prompt = history + opening
            sequences.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
            history = (prompt if dice.random() < kept else history) + answer
        chats.append(sequences)
    return chats


def random_pairs(count: int, seed: int, *, system: int = 0, several: bool = False) -> list[Preference]:
    """Return pairs with a rule to learn: preferred answers have tokens from 10 to 12, rejected ones from 60 to 62.

    Some begin with the same token.

    Args:
        count, seed: how many pairs, of which random numbers.
        system: tokens with which all prompts begin.
        several: whether some answers are two sequences, as where the template rewrites finished answers.
    """
    import random

    dice = random.Random(seed)
    shared = [dice.randrange(VOCABULARY) for _ in range(system)]

    def answer(lowest: int, begin: int, prompt: list[int]) -> list[LabelledIds]:
        ids = [begin, *(lowest + dice.randrange(3) for _ in range(dice.randint(1, 7)))]
        sequences: list[LabelledIds] = [(prompt + ids, [0] * len(prompt) + [1] * len(ids))]
        if several and dice.random() < 0.4:
            later = [*prompt, *ids, 5, 6]
            sequences.append(([*later, lowest + 1], [0] * len(later) + [1]))
        return sequences

    pairs = []
    for _ in range(count):
        prompt = shared + [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 9))]
        rejected, preferred = answer(60, dice.choice([10, 60, 61]), prompt), answer(10, 10, prompt)
        pairs.append(Preference([*rejected, *preferred], len(rejected)))
    return pairs


def rated_answers(count: int, seed: int) -> list[Preference]:
    """Return the answers of `random_pairs`, about half of the chats with the preferred one alone or the other alone."""
    chats = []
    for number, pair in enumerate(random_pairs(count, seed)):
        kept = [Preference(pair[:1], 1), Preference(pair[1:], 0), pair][number % 3]
        chats.append(kept)
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
            "reference": str(self.root / name / "reference.safetensors"),
        }
        (self.root / name).mkdir(exist_ok=True)
        return TrainJob(**{**defaults, **options})

    def preference_job(
        self, objective: str, name: str = "run", *, beta: float | None = None, **options: Any
    ) -> TrainJob:
        """Return a job of a preference objective; the options are fields of `TrainJob`."""
        numbers = {"simpo_gamma": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
        settings = PreferenceSettings(objective, beta_of(objective, beta), **numbers)
        return self.job(name, preference=settings, **options)

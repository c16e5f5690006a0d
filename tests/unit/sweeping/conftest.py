"""Fixtures for sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import chat_line

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Config:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(map(chat_line, range(20))), encoding="utf-8")
    chosen = {
        "train_data": chats, "base_model": str(tiny_base), "output_dir": tmp_path / "sweep", "dtype": "fp32",
        "compile": "off", "epochs": 1, "lora_rank": 2, "eval_split": 0.3,
    }  # fmt: skip
    return configs.resolve((chosen, "test", tmp_path))

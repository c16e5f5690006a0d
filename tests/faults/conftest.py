"""A tiny base model, chats and configs for fault tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.workspace import Workspace
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Base model and chats, without a run."""
    return Workspace.make(tmp_path_factory.mktemp("faults"), reference=False)


@pytest.fixture
def config_in(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Return the config of a small run: ``config_in("folder", epochs=1)``."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(folder: str, **options: Any) -> Config:
        chosen = {
            "train_data": workspace.root / "chats.jsonl", "base_model": str(workspace.root / "base"),
            "output_dir": tmp_path / folder, "dtype": "fp32", "compile": "off", "epochs": 2, "batch_size": 4,
            "lora_rank": 2, "learning_rate": 1e-2, "checkpoint_steps": 2, "eval_split": 0,
            "template_date": "2026-01-02", "compare": False, **options,
        }  # fmt: skip
        return configs.resolve((chosen, "test", tmp_path))

    return make

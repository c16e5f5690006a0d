"""The user's cache folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kolotune.foundation.cache import cache_folder


def test_a_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "c"))
    assert cache_folder("models") == tmp_path / "c" / "models"
    assert not (tmp_path / "c").exists()
    monkeypatch.setenv("KOLOTUNE_CACHE", "")
    assert cache_folder("models").parts[-2:] == ("kolotune", "models")


def test_the_folder_is_found_without_heavy_imports() -> None:
    heavy = {"torch", "transformers", "huggingface_hub"}
    code = f"import kolotune.base_models.downloads, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

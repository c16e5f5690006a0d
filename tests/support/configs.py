"""Layers of options as a command line gives them, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation.config import resolve
from kolotune.foundation.errors import ConfigError

HERE = Path("/here")


def flags(**values: Any) -> tuple[dict[str, Any], str, Path]:
    return values, "command line", HERE


def refusal(*layers: Any) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(*layers)
    assert error.value.exit_code == 2
    return error.value.cause


def write_yaml(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "options.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path

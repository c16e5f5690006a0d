"""What a training works through, counted in a child so that the parent does not hold PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.training import random_chats, write_tokens

from kolotune.foundation import config as configs
from kolotune.foundation.errors import TrainingError
from kolotune.planning.workload import read_workload
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS

_PROGRAM = """
import sys
from pathlib import Path
from kolotune.foundation import config
from kolotune.planning.workload import read_workload
resolved = config.resolve(({"train_data": [sys.argv[1]], "batch_size": 3}, "test", Path.cwd()))
print(read_workload(Path(sys.argv[1]), resolved, Path(sys.argv[2])))
assert "torch" not in sys.modules
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Return a folder of prepared chats."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    write_tokens(folder / TRAIN_TOKENS, random_chats(20, seed=1))
    write_tokens(folder / HELD_OUT_TOKENS, random_chats(4, seed=2))
    return folder


def test_a_child_counts_the_same_and_the_parent_stays_without_pytorch(prepared: Path, tmp_path: Path) -> None:
    import torch  # noqa: F401 - so this process counts by itself

    config = configs.resolve(({"train_data": [str(prepared)], "batch_size": 3}, "test", tmp_path))
    argv = [sys.executable, "-c", _PROGRAM, str(prepared), str(tmp_path / "log")]
    child = subprocess.run(argv, capture_output=True, text=True, check=True)
    workload = read_workload(prepared, config, tmp_path / "log")
    assert child.stdout.strip() == str(workload)
    assert (workload.chats, workload.batch_size, workload.steps_in_epoch) == (20, 3, 7)


def test_damaged_chats_are_an_error_of_the_tree(prepared: Path, tmp_path: Path) -> None:
    (prepared / TRAIN_TOKENS).write_bytes(b"damaged")
    argv = [sys.executable, "-c", _PROGRAM, str(prepared), str(tmp_path / "log")]
    child = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert TrainingError.__name__ in child.stderr and "can't be read" in child.stderr

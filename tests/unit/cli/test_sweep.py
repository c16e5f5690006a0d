"""`sweep` on the command line: early errors, and plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str]]
VARY = ["--vary", "lora_rank=4,8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without programs of schedulers, and without ssh
    (tmp_path / "chats.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--submit", "is not one of slurm, kubernetes, ssh, local"),
        ("--partition gpu", "is not one of"),
        ("--on pbs", "is not one of"),
        ("--on slurm --host a", "only for --on ssh"),
        ("--on ssh", "host: 0 machines"),
        ("--on ssh --host a --host a", "named twice"),
        ("--on ssh --host a --host b --host c --nnodes 2", "host: 3 machines"),
        ("--on ssh --host a --host b --at-once 3", "host: 2 machines"),
        ("--on ssh --host a --host b --host c --host d --nnodes 2 --rdzv a:1", "can't all meet"),
        ("--on slurm --hours 0", "hours"),
        ("--on local --nnodes 2", "this machine"),
    ],
)
@pytest.mark.parametrize("submit", [[], ["--submit"]])
def test_early_errors(kolotune: Call, line: str, message: str, submit: list[str], here: Path) -> None:
    code, output = kolotune("sweep", "chats.jsonl", *VARY, *line.split(), *submit)
    assert (code, message in output, "Traceback" in output) == (2, True, False), output
    assert [path.name for path in here.iterdir()] == ["chats.jsonl"]


def test_parallel_trials_need_a_launcher(kolotune: Call) -> None:
    code, output = kolotune("sweep", "chats.jsonl", *VARY, "--at-once", "2")
    assert (code, "one trial after the other" in output) == (2, True), output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--on slurm --at-once 7 --gpus 1", "7 trials run at a time"),
        ("--on local", "4 trials run at a time"),
        ("--on ssh --host a --host b", "2 trials run at a time"),
        ("--on ssh --host a --host b --nnodes 2", "1 trials run at a time"),
        ("--on kubernetes --image reg/kolotune:1 --claim runs", "4 trials run at a time"),
    ],
)
def test_without_submit_the_first_job_is_shown(kolotune: Call, line: str, message: str, here: Path) -> None:
    code, output = kolotune("sweep", "chats.jsonl", *VARY, *line.split())
    assert code == 0 and message in output and "--submit" in output, output
    assert "lora_rank: 4" in output and "kolotune prepare" in output and "kolotune train" in output
    assert "kolotune run " not in output
    assert [path.name for path in here.iterdir()] == ["chats.jsonl"]

"""`launch`, `follow` and `cancel` on the command line: early errors, and nothing is done without --submit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str]]
KUBERNETES = "--on kubernetes --image reg/kolotune:1 --claim runs"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chats.jsonl", "is not one of slurm, kubernetes, ssh, local"),
        ("chats.jsonl --on pbs", "'pbs'"),
        ("--on slurm", "no training data"),
        ("chats.jsonl --on ssh", "needs machines"),
        ("chats.jsonl --on ssh --host a --partition p", "--partition: only for --on slurm"),
        ("chats.jsonl --on slurm --host a --claim b", "only for --on"),
        ("chats.jsonl --on kubernetes --image a", "needs --claim"),
        ("chats.jsonl --on ssh --host -oProxyCommand=x", "not the name or address"),
        ("chats.jsonl --on ssh --host a --nnodes 3", "nnodes: the run takes 3"),
        ("chats.jsonl --on slurm --name UPPER", "can't be a job's name"),
        ("chats.jsonl --on slurm --hours 0", "hours: must be greater than 0"),
        ("chats.jsonl --on slurm --token-file $(x)", "token-file"),
        ("chats.jsonl --on slurm --epochs x --seed y", "seed"),
        ("chats.jsonl --on local --nnodes 2", "this machine"),
        (f"chats.jsonl {KUBERNETES} --token-secret hf_abc", "never the token itself"),
        (f"chats.jsonl {KUBERNETES} --rdzv a:1", "meet at the first"),
        ("chats.jsonl --on slurm --config hub.yaml", "standard input"),
    ],
)
@pytest.mark.parametrize("submit", [[], ["--submit"]])
def test_early_errors(
    kolotune: Call, line: str, message: str, submit: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))  # without programs of schedulers, and without ssh
    (here / "hub.yaml").write_text("hf_token: '-'\n")
    before = sorted(here.rglob("*"))
    code, output = kolotune("launch", *line.split(), *submit)
    assert (code, message in output, "Traceback" in output) == (2, True, False), output
    assert sorted(here.rglob("*")) == before
    assert "hf_abc" not in output


@pytest.mark.parametrize(
    "line", ["--on slurm --nnodes 2", "--on local", "--on ssh --host a --host b", f"{KUBERNETES} --nnodes 2"]
)
def test_a_plan_makes_nothing_and_shows_the_run(kolotune: Call, line: str, here: Path) -> None:
    before = sorted(here.rglob("*"))
    code, output = kolotune("launch", "chats.jsonl", *line.split())
    assert code == 0 and " kolotune run --config " in output.replace("-m kolotune run", " kolotune run"), output
    assert "--submit" in output and "epochs: 3" in output
    assert sorted(here.rglob("*")) == before


def test_only_slurm_gets_the_token_file_of_the_config(kolotune: Call, here: Path) -> None:
    (here / "token").write_text("hf_Planted\n")
    (here / "k.yaml").write_text("train_data: chats.jsonl\nhf_token: token\n")
    output = kolotune("launch", "--config", "k.yaml", "--on", "slurm")[1]
    assert f"--hf-token {here / 'token'}" in output
    code, output = kolotune("launch", "--config", "k.yaml", "--on", "ssh", "--host", "a")
    assert code == 0 and "not sent" in output and "--hf-token" not in output
    assert "hf_Planted" not in output


def test_in_place_needs_no_local_chats(kolotune: Call) -> None:
    line = ["launch", "--train-data", "/data/chats.jsonl", "--on", "ssh", "--host", "a"]
    assert kolotune(*line)[0] == 3
    code, output = kolotune(*line, "--in-place")
    assert code == 0 and "- /data/chats.jsonl" in output and "a tar of chats.jsonl" not in output


@pytest.mark.parametrize("verb", ["follow", "cancel"])
def test_a_folder_without_a_job(kolotune: Call, verb: str) -> None:
    code, output = kolotune(verb, "out")
    assert (code, "no job was launched" in output) == (12, True)


def test_a_plan_as_json(kolotune: Call) -> None:
    code, output = kolotune("launch", "chats.jsonl", "--on", "slurm", "--json")
    events = [json.loads(line) for line in output.splitlines()]
    assert code == 0 and any(event["event"] == "result" and event["text"].startswith("sbatch ") for event in events)

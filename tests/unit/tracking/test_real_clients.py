"""The trackers' own clients, installed beside this environment: what they have is what was logged."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kolotune.foundation.reporter import PlainReporter
from kolotune.tracking.__main__ import TrackingTask
from kolotune.tracking.follower import Follower, following

pytestmark = pytest.mark.slow

_PACKAGES = ("trackio>=0.30", "tensorboard>=2.16", "wandb>=0.19", "mlflow-skinny>=2.20")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients in a folder of their own; `TRACKER_SITE` may name one that is there."""
    if known := os.environ.get("TRACKER_SITE"):
        return Path(known)
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *_PACKAGES], check=True)
    return folder


@pytest.fixture
def track(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reporter: PlainReporter) -> object:
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")

    def call(tracker: str, steps: range, resumes: bool) -> None:
        state = str(tmp_path / f"{tracker}.json")
        parameters = {"epochs": 3, "train_data": ["a.jsonl"], "lean": False, "system": None}
        task = TrackingTask(tracker, "tests", "outputs", str(tmp_path), state, resumes, {"seed": 1}, parameters)
        lines = [json.dumps({"step": step, "loss": 3.0 / step, "learning_rate": 1e-4}) for step in range(1, steps.stop)]
        lines.append(json.dumps({"step": steps.stop - 1, "held_out_loss": 2.5}))
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
        follower = Follower(task, tmp_path / "task.json", metrics, tmp_path / f"{tracker}.log", reporter)
        with following(follower):
            follower.update()

    return call


def test_trackio(track: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(track)
    track("trackio", range(1, 4), False)
    track("trackio", range(4, 6), True)
    assert "no longer tracks" not in " ".join(capsys.readouterr())
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4, 5, 5]
    assert logged[0][1] == {"loss": 3.0, "learning_rate": 1e-4} and logged[3][1] == {"held_out_loss": 2.5}
    (config,) = sqlite3.connect(database).execute("select config from configs").fetchall()
    assert json.loads(config[0])["epochs"] == 3


def test_tensorboard(track: object, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(track)
    track("tensorboard", range(1, 4), False)
    track("tensorboard", range(4, 6), True)
    assert "no longer tracks" not in " ".join(capsys.readouterr())
    (folder,) = (tmp_path / "tensorboard").iterdir()
    program = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E;"
        "e = E(sys.argv[1]); e.Reload();"
        "print([s.step for s in e.Scalars('loss')], [s.step for s in e.Scalars('held_out_loss')])"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    read = subprocess.run([sys.executable, "-c", program, str(folder)], env=env, capture_output=True, text=True)
    assert read.stdout.strip().endswith("[1, 2, 3, 4, 5] [3, 5]"), read.stderr


def test_wandb_offline(track: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(track)
    track("wandb", range(1, 4), False)
    assert "no longer tracks" not in " ".join(capsys.readouterr())
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_mlflow(
    track: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder: the client alone has no database."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert callable(track)
    track("mlflow", range(1, 4), False)
    track("mlflow", range(4, 6), True)
    assert "no longer tracks" not in " ".join(capsys.readouterr())
    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert [int(line.split()[-1]) for line in losses.read_text("utf-8").splitlines()] == [1, 2, 3, 4, 5]
    assert (losses.parents[1] / "params" / "epochs").read_text("utf-8") == "3"

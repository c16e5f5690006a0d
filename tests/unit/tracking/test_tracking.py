"""A training in a tracker: what is logged, once, and what happens where that fails."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.training import TrainingFolder

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context
from kolotune.stages import train
from kolotune.tracking import follower as followers
from kolotune.tracking.__main__ import TrackingTask, track
from kolotune.tracking.follower import Follower, following
from kolotune.tracking.tracker import TRACKERS, TrackedRun, require_installed

STEPS = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-4, "time": 1e9} for step in (1, 2, 3, 4)]
EVALUATION = {"step": 2, "held_out_loss": 2.5, "time": 1e9}
LINES = [json.dumps(each) + "\n" for each in (*STEPS[:2], EVALUATION, *STEPS[2:])]

# A client like trackio's, which writes what it is given into a file.
CLIENT = """
import json, os
def _write(**fields):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(fields) + "\\n")
def init(**fields):
    print("welcome")
    _write(init=fields)
def log(values, step):
    if values.get("loss", 1) < 0:
        raise SystemExit("refused: https://me:geheim@example.org with " + os.environ["EXAMPLE_API_KEY"])
    _write(step=step, values=values)
def finish():
    _write(finish=True)
"""


class RecordingTracker:
    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_finished = False

    def start(self, run: TrackedRun) -> str:
        self.runs.append(run)
        return run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def finish(self) -> None:
        self.is_finished = True


def _task(folder: Path, **changes: object) -> TrackingTask:
    state = str(folder / "tracked.json")
    task = TrackingTask("trackio", "tests", "outputs", str(folder), state, False, {"seed": 1}, {"epochs": 3})
    return dataclasses.replace(task, **changes)  # type: ignore[arg-type]


def test_metrics_are_logged_by_step(tmp_path: Path) -> None:
    tracker = RecordingTracker()
    track(_task(tmp_path), [*LINES, '{"step": 5, "lo'], tracker)
    assert [step for step, _ in tracker.logged] == [1, 2, 2, 3, 4] and tracker.is_finished
    assert tracker.logged[2][1] == {"held_out_loss": 2.5}
    assert tracker.logged[0][1] == {"loss": 3.0, "learning_rate": 1e-4}
    assert tracker.runs[0].parameters == {"epochs": 3} and not tracker.runs[0].is_resumed


def test_a_resumed_training_is_the_same_run_and_logs_nothing_twice(tmp_path: Path) -> None:
    first, second, other = RecordingTracker(), RecordingTracker(), RecordingTracker()
    track(_task(tmp_path), LINES[:2], first)
    track(_task(tmp_path, resumes=True), LINES, second)
    assert second.runs[0].is_resumed and second.runs[0].id == first.runs[0].id
    assert [step for step, _ in first.logged + second.logged] == [1, 2, 2, 3, 4]
    track(_task(tmp_path, resumes=True, training={"seed": 2}), LINES, other)
    assert not other.runs[0].is_resumed and other.runs[0].id != first.runs[0].id and len(other.logged) == 5


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets what the client of a tracker is given, in a process of its own."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "trackio.py").write_text(CLIENT, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("EXAMPLE_API_KEY", "streng-geheim")
    return tmp_path / "calls.jsonl"


def _follower(folder: Path, reporter: PlainReporter) -> tuple[Follower, Path]:
    metrics = folder / "metrics.jsonl"
    return Follower(_task(folder), folder / "task.json", metrics, folder / "track.log", reporter), metrics


def test_a_metrics_file_is_followed(calls: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    follower, metrics = _follower(tmp_path, reporter)
    with following(follower):
        follower.update()  # nothing was written yet
        metrics.write_text("".join(LINES[:2]) + LINES[2][:9], encoding="utf-8")
        follower.update()
        metrics.write_text("".join(LINES[:1]), encoding="utf-8")  # resumed: what comes again is known
        follower.update()
        metrics.write_text("".join(LINES), encoding="utf-8")
        follower.update()
    received = [json.loads(line) for line in calls.read_text("utf-8").splitlines()]
    assert received[0]["init"]["config"] == {"epochs": 3} and received[-1] == {"finish": True}
    assert [each["step"] for each in received[1:-1]] == [1, 2, 2, 3, 4]
    assert (tmp_path / "track.log").read_text("utf-8").strip() == "welcome"


def test_a_client_that_fails_does_not_stop_the_training_and_shows_no_secret(
    calls: Path, tmp_path: Path, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    follower, metrics = _follower(tmp_path, reporter)
    with following(follower):
        metrics.write_text(LINES[0] + '{"step": 2, "loss": -1}\n', encoding="utf-8")
        follower.update()
    printed = " ".join(capsys.readouterr())
    assert "trackio no longer tracks this run: refused: https://********@example.org" in printed
    assert "geheim" not in printed
    assert len(calls.read_text("utf-8").splitlines()) == 2


def test_short_values_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_TOKEN", "1")
    assert followers.masked("step 1 of 10") == "step 1 of 10"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_client_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = TRACKERS[name].package
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"the package {package} is not installed") as raised:
        require_installed(name)
    assert f".[{name}]" in raised.value.hint


def test_every_tracker_is_an_option_and_an_extra() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(TRACKERS) <= set(extras["optional-dependencies"])
    for name in TRACKERS:
        assert configs.resolve(({"track": name}, "test", Path())).track == name


def test_the_options_of_a_run_are_parameters_and_no_secret_is(
    make_training: Callable[..., TrainingFolder], tmp_path: Path, reporter: PlainReporter
) -> None:
    (tmp_path / "token").write_text("streng-geheim", encoding="utf-8")
    options = {"track": "trackio", "hf_token": str(tmp_path / "token"), "output_dir": tmp_path / "run", "epochs": 7}
    config = configs.resolve((options, "test", tmp_path))
    context = Context(config, RunFolder(config.output_dir), tmp_path)
    follower = train._follower(make_training().job(), context, reporter)
    assert follower is not None
    task = follower._task
    assert (task.tracker, task.name, task.resumes) == ("trackio", "run", False)
    assert task.parameters["epochs"] == 7 and "learning_rate" in task.parameters
    assert "hf_token" not in task.parameters and "geheim" not in json.dumps(dataclasses.asdict(task))
    assert (
        train._follower(
            make_training().job(),
            dataclasses.replace(context, config=dataclasses.replace(config, track="none")),
            reporter,
        )
        is None
    )

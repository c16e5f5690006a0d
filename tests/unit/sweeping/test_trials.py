"""Real trainings of a tiny model with several settings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from support.runs import states

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, DataError, TrainingError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.sweeping import record, trials
from kolotune.sweeping.space import parse


def test_the_best_trial_becomes_the_model(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    varied = parse(["learning_rate=0,1e-2,1e-3"])
    result = trials.run(config, varied, 10, PlainReporter())
    losses = [trial.loss for trial in result.trials]
    assert len(losses) == 3 and result.best is not None and result.best.loss == min(losses)
    assert result.best.values == {"learning_rate": "1e-2"}, "the others hardly learn"
    assert next(row["trial"] for row in trials.table_rows(result)) == 2

    # The prepared chats exist once, and each trial has a record of them.
    folders = [trials.folder_of(trial, config) for trial in result.trials]
    files = [RunFolder(config.output_dir / "chats").prepared / "train.safetensors"]
    files += [folder.prepared / "train.safetensors" for folder in folders]
    assert len({file.stat().st_ino for file in files}) == 1
    assert capsys.readouterr().out.count("prepare: reading") == 1
    assert trials.held_out_losses(folders[1])[-1][1] == result.best.loss

    # Another call trains nothing; the best trial can be finished.
    again = trials.run(config, varied, 10, PlainReporter())
    assert again == result and "trial 1" not in capsys.readouterr().out
    chosen = dataclasses.replace(trials.config_of(result.best, config), compare=False)
    run_pipeline(chosen, PlainReporter())
    assert "train: done before" in capsys.readouterr().out
    assert states(folders[1])["modelfile"] == "done"

    # A different training is a different sweep.
    with pytest.raises(ConfigError, match="other chats or options"):
        trials.run(dataclasses.replace(config, epochs=2), varied, 10, PlainReporter())
    with pytest.raises(ConfigError, match="varies other values"):
        trials.run(config, parse(["learning_rate=0,1e-3"]), 10, PlainReporter())


def test_a_stopped_sweep_resumes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    varied, run = parse(["seed=1,2,3"]), run_pipeline

    def stopped(config: Config, *more: Any, **others: Any) -> RunFolder:
        if config.output_dir.name == "trial-002":
            raise KeyboardInterrupt
        return run(config, *more, **others)

    monkeypatch.setattr(trials, "run_pipeline", stopped)
    with pytest.raises(KeyboardInterrupt):
        trials.run(config, varied, 3, PlainReporter())
    kept = json.loads((config.output_dir / record.NAME).read_text())
    assert [(trial["number"], trial["loss"] is None) for trial in kept["trials"]] == [(1, False), (2, True)]
    monkeypatch.undo()
    result = trials.run(config, varied, 3, PlainReporter())
    assert [trial.values["seed"] for trial in result.trials] == ["1", "2", "3"]
    assert result.trials[0].loss == kept["trials"][0]["loss"]


def test_a_failed_trial_is_reported_and_the_others_continue(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    result = trials.run(dataclasses.replace(config, max_grad_norm=0), parse(["lora_alpha=1e30,2"]), 2, PlainReporter())
    assert result.trials[0].loss is None and result.trials[0].failure
    assert result.best is not None and result.best.number == 2
    assert f"trial 1 failed: {result.trials[0].failure}" in capsys.readouterr().out
    assert trials.table_rows(result)[-1]["failure"] == result.trials[0].failure


def test_no_trial_succeeds(config: Config) -> None:
    with pytest.raises(TrainingError):
        trials.run(dataclasses.replace(config, max_grad_norm=0), parse(["lora_alpha=1e30"]), 2, PlainReporter())


def test_a_sweep_that_would_fail_is_not_started(config: Config) -> None:
    with pytest.raises(DataError, match="held out"):
        trials.run(dataclasses.replace(config, eval_split=0), parse(["seed=1,2"]), 2, PlainReporter())
    with pytest.raises(ConfigError, match="lora-rank"):
        trials.run(config, parse(["lora_rank=4,0"]), 2, PlainReporter())
    with pytest.raises(ConfigError):
        trials.run(dataclasses.replace(config, parameter=("nonsense",)), parse(["seed=1,2"]), 2, PlainReporter())
    assert not list(config.output_dir.glob("trial-*"))

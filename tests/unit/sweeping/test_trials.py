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


def test_the_best_one_becomes_the_model(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    varied = parse(["learning_rate=0,1e-2,1e-3"])
    found = trials.run(config, varied, 10, PlainReporter())
    losses = [each.loss for each in found.trials]
    assert len(losses) == 3 and found.best is not None and found.best.loss == min(losses)
    assert found.best.values == {"learning_rate": "1e-2"}, "the others hardly learn"
    assert next(row["trial"] for row in trials.rows(found)) == 2

    # The prepared chats are there once, and each trial knows that they are.
    folders = [trials.folder_of(each, config) for each in found.trials]
    files = [RunFolder(config.output_dir / "chats").prepared / "train.safetensors"]
    files += [each.prepared / "train.safetensors" for each in folders]
    assert len({each.stat().st_ino for each in files}) == 1
    assert capsys.readouterr().out.count("prepare: reading") == 1
    assert trials.held_out_losses(folders[1])[-1][1] == found.best.loss

    # The same again trains nothing; the best one goes on to its end.
    again = trials.run(config, varied, 10, PlainReporter())
    assert again == found and "trial 1" not in capsys.readouterr().out
    chosen = dataclasses.replace(trials.config_of(found.best, config), compare=False)
    run_pipeline(chosen, PlainReporter())
    assert "train: done before" in capsys.readouterr().out
    assert states(folders[1])["modelfile"] == "done"

    # Another training is another sweep.
    with pytest.raises(ConfigError, match="other options were not the same"):
        trials.run(dataclasses.replace(config, epochs=2), varied, 10, PlainReporter())
    with pytest.raises(ConfigError, match="other values are varied"):
        trials.run(config, parse(["learning_rate=0,1e-3"]), 10, PlainReporter())


def test_one_that_was_stopped_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    varied, run = parse(["seed=1,2,3"]), run_pipeline

    def stopped(config: Config, *more: Any, **others: Any) -> RunFolder:
        if config.output_dir.name == "trial-002":
            raise KeyboardInterrupt
        return run(config, *more, **others)

    monkeypatch.setattr(trials, "run_pipeline", stopped)
    with pytest.raises(KeyboardInterrupt):
        trials.run(config, varied, 3, PlainReporter())
    kept = json.loads((config.output_dir / record.NAME).read_text())
    assert [(each["number"], each["loss"] is None) for each in kept["trials"]] == [(1, False), (2, True)]
    monkeypatch.undo()
    found = trials.run(config, varied, 3, PlainReporter())
    assert [each.values["seed"] for each in found.trials] == ["1", "2", "3"]
    assert found.trials[0].loss == kept["trials"][0]["loss"]


def test_one_that_fails_is_told_and_the_others_go_on(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = trials.run(dataclasses.replace(config, max_grad_norm=0), parse(["lora_alpha=1e30,2"]), 2, PlainReporter())
    assert found.trials[0].loss is None and found.trials[0].failure
    assert found.best is not None and found.best.number == 2
    assert f"trial 1 failed: {found.trials[0].failure}" in capsys.readouterr().out
    assert trials.rows(found)[-1]["failure"] == found.trials[0].failure


def test_when_all_fail(config: Config) -> None:
    with pytest.raises(TrainingError, match="no trial could be trained"):
        trials.run(dataclasses.replace(config, max_grad_norm=0), parse(["lora_alpha=1e30"]), 2, PlainReporter())


def test_what_is_known_to_fail_is_not_started(config: Config) -> None:
    with pytest.raises(DataError, match="no chats are held out"):
        trials.run(dataclasses.replace(config, eval_split=0), parse(["seed=1,2"]), 2, PlainReporter())
    with pytest.raises(ConfigError, match="lora-rank"):
        trials.run(config, parse(["lora_rank=4,0"]), 2, PlainReporter())
    with pytest.raises(ConfigError):
        trials.run(dataclasses.replace(config, parameter=("nonsense",)), parse(["seed=1,2"]), 2, PlainReporter())
    assert not list(config.output_dir.glob("trial-*"))

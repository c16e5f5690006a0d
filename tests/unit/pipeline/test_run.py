"""Running the pipeline with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import STAGES_WITHOUT_COMPARE, config_of, hashes, partials, states

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline import choices
from kolotune.pipeline.run import run_pipeline
from kolotune.pipeline.status import StageState, read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import read_metrics
from kolotune.run_folder.records import read_record


def test_a_finished_run_has_everything_and_says_so(finished: Config) -> None:
    run = RunFolder(finished.output_dir)
    assert set(states(run).values()) == {"done"}
    for path in (run.adapter, run.merged_model, run.gguf, run.quantized("Q4_K_M"), run.modelfile()):
        assert path.exists()
    assert "FROM ./MergedQ4_K_M.gguf" in run.modelfile("Q4_K_M").read_text()
    assert [line.step for line in read_metrics(run.metrics) if line.loss is not None] == [1]
    assert partials(run) == []
    for stage in set(STAGES_WITHOUT_COMPARE):
        assert read_record(run, stage) is not None


def test_a_second_run_does_nothing(run_copy: RunFolder, capsys: Any, reporter: PlainReporter) -> None:
    before = hashes(run_copy)
    run_pipeline(config_of(run_copy), reporter)
    printed = capsys.readouterr().out
    assert printed.count("done before, nothing it depends on has changed") == 6
    assert "..." not in printed
    assert hashes(run_copy) == before


def test_damage_in_the_middle_is_repaired_by_that_stage_alone(
    run_copy: RunFolder, capsys: Any, reporter: PlainReporter
) -> None:
    before = hashes(run_copy)
    run_copy.quantized("Q4_K_M").write_bytes(run_copy.quantized("Q4_K_M").read_bytes()[:4_000_000])
    run_copy.modelfile().unlink()
    run_pipeline(config_of(run_copy), reporter)
    printed = capsys.readouterr().out
    assert "... quantize: quantizing (MergedQ4_K_M.gguf " in printed
    assert "... modelfile: writing the Modelfiles (Modelfile is missing" in printed
    assert printed.count("done before") == 4
    assert hashes(run_copy) == before


def test_the_saved_config_repeats_the_run(run_copy: RunFolder, kolotune: Any, monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "other place").mkdir()
    monkeypatch.chdir(tmp_path / "other place")
    code, output = kolotune("run", "--config", run_copy.config)
    assert code == 0
    assert output.count("done before") == 6
    assert list((tmp_path / "other place").iterdir()) == []


def test_the_default_folder_is_saved_as_an_absolute_one(
    tiny_base: Path, write_chats: Callable[..., Path], kolotune: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kolotune("prepare", write_chats(), "--base-model", tiny_base)[0] == 0
    saved = configs.load_file(tmp_path / "outputs" / "config.yaml")
    assert saved["output_dir"] == str(tmp_path / "outputs")


def test_automatic_choices_are_made_once(run_copy: RunFolder, monkeypatch: Any, reporter: PlainReporter) -> None:
    run_copy.choices.write_text(json.dumps({"dtype": "bf16", "template_date": "2020-02-02"}))
    options = {**configs.load_file(run_copy.config), "dtype": "auto", "template_date": None}
    config = configs.resolve((options, "test", run_copy.root))
    monkeypatch.setattr(choices.hardware, "best_dtype", lambda: pytest.fail("chosen a second time"))
    run_pipeline(config, reporter, [])
    saved = configs.load_file(run_copy.config)
    assert (saved["dtype"], saved["template_date"]) == ("bf16", "2020-02-02")


def test_a_refused_run_leaves_the_folder_as_it_was(run_copy: RunFolder, reporter: PlainReporter) -> None:
    before, kept = hashes(run_copy), [run_copy.config, run_copy.choices]
    contents = [path.read_bytes() for path in kept]
    for changes in ({"base_model": "/no/such"}, {"max_seq_length": 99999}, {"parameter": ["nonsense=1"]}):
        with pytest.raises(KolotuneError):
            run_pipeline(config_of(run_copy, **changes), reporter)
        assert [path.read_bytes() for path in kept] == contents
        assert hashes(run_copy) == before
    assert set(states(run_copy).values()) == {"done"}


def test_a_refused_first_run_chooses_nothing(run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path) -> None:
    with pytest.raises(KolotuneError):
        run_pipeline(config_of(run_copy, output_dir=tmp_path / "new", parameter=["nonsense=1"]), reporter)
    new = RunFolder(tmp_path / "new")
    assert not new.choices.exists() and not new.config.exists()


def test_a_failed_stage_is_shown_with_its_cause_and_its_traceback_is_kept(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text("{\n")
    with pytest.raises(KolotuneError, match=r"chats.jsonl:1: "):
        run_pipeline(config_of(run_copy), reporter)
    status = next(each for each in read_status(run_copy) if each.name == "prepare")
    assert status.state is StageState.FAILED
    assert "chats.jsonl:1" in status.failure and status.failure == status.explanations()[0]
    assert "Traceback" in run_copy.log("error").read_text()
    assert (run_copy.prepared / "train.safetensors").is_file()  # of the run before

"""The verb `compare`, which measures in child processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.files import size_of
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder


@pytest.mark.slow
def test_compare_shows_a_table_and_fails_with_its_exit_code(
    learned_run: Config, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(learned_run.output_dir, run.root)
    run.config.write_text(configs.dump(dataclasses.replace(learned_run, output_dir=run.root)), encoding="utf-8")
    code, output = kolotune("compare", run.root, "--compare-prompt", "Here is a red cup. Which colour?")
    assert code == 0, output
    assert "Compared on 6 held-out chats" in output and output.count(" ok\n") == 7 and "FAILED" not in output
    assert [answer.prompt for answer in Comparison.read(run.comparison).answers] == ["Here is a red cup. Which colour?"]
    code, second_output = kolotune("compare", run.root)
    assert code == 0 and "done before" in second_output and "Compared on 6 held-out chats" in second_output
    file = run.modelfile("Q4_K_M")
    file.write_text(file.read_text().replace('PARAMETER stop "<|im_end|>"\n', ""))
    record: dict[str, Any] = json.loads(run.record("modelfile").read_text())
    record["outputs"][file.name] = {"size": size_of(file), "sha256": Hasher().of(file)}
    del record["sha256"]  # of the unchanged record
    run.record("modelfile").write_text(json.dumps(record))
    code, output = kolotune("compare", run.root)
    assert code == 28, output
    assert "error: modelfile: served Q4_K_M: " in output
    assert "Likely cause: a PARAMETER stop is missing" in output and "served Q4_K_M" in output and "FAILED" in output
    code, output = kolotune("status", run.root)
    assert "compare" in output and "failed" in output


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True])
def test_trial_quantizations_are_measured_and_deleted(
    lean: bool, learned_run: Config, tmp_path: Path, kolotune: Callable[..., tuple[int, str]], reporter: PlainReporter
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(learned_run.output_dir, run.root)
    run_pipeline(dataclasses.replace(learned_run, output_dir=run.root, lean=lean), reporter)
    before = {path for path in run.root.rglob("*") if path.suffix == ".gguf"}
    code, output = kolotune("compare", run.root, "--compare-quantization", "q8_0,IQ2_S,Q4_K_M")
    assert code == 0, output
    assert {path for path in run.root.rglob("*") if path.suffix == ".gguf"} == before and not run.comparing.exists()
    comparison = Comparison.read(run.comparison)
    trials = {figures.name: figures for figures in comparison.quantizations}
    assert set(trials) == {"Q8_0", "IQ2_S", "Q4_K_M"} and comparison.recommended in trials
    assert [figures.size_bytes for figures in comparison.quantizations] == sorted(
        figures.size_bytes for figures in trials.values()
    )
    assert {name: (figures.importance_matrix, figures.kept) for name, figures in trials.items()} == {
        "Q8_0": (False, False), "IQ2_S": (True, False), "Q4_K_M": (False, True),
    }  # fmt: skip
    assert trials["Q8_0"].kl_mean < trials["IQ2_S"].kl_mean and trials["Q8_0"].top1_agreement > 0.9
    assert "Quantizations" in output and f"recommended: {comparison.recommended}" in output
    assert not any(check.name == "Q8_0" for check in comparison.checked), "trials can't fail a run"
    code, second_output = kolotune("compare", run.root, "--compare-quantization", "q8_0,IQ2_S,Q4_K_M")
    assert code == 0 and "done before" in second_output


@pytest.mark.slow
def test_cleaned_files_are_made_again_for_comparing(
    learned_run: Config, tmp_path: Path, kolotune: Callable[..., tuple[int, str]]
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(learned_run.output_dir, run.root)
    run.config.write_text(configs.dump(dataclasses.replace(learned_run, output_dir=run.root)), encoding="utf-8")
    code, output = kolotune("clean", run.root, "--yes")
    assert code == 0 and not run.gguf.exists() and not run.merged_model.exists(), output
    code, output = kolotune("compare", run.root)
    assert code == 0, output
    names = [check.name for check in Comparison.read(run.comparison).checked]
    assert {"merged", "f16 GGUF", "Q4_K_M"} <= set(names) and not Comparison.read(run.comparison).not_kept
    code, output = kolotune("clean", run.root, "--yes")
    assert code == 0 and not run.gguf.exists(), output
    code, output = kolotune("compare", run.root)
    assert code == 0 and "done before" in output and not run.gguf.exists(), output

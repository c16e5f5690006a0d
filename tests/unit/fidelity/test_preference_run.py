"""A run that was trained on preferences passes the gate: it is compared on the chosen answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record

from .conftest import chats


@pytest.mark.parametrize(("objective", "held_out"), [("dpo", True), pytest.param("kto", False, marks=pytest.mark.slow)])
def test_a_preference_run_passes_the_gate(
    objective: str,
    held_out: bool,
    learned_bases: tuple[Path, Path],
    tmp_path: Path,
    reporter: PlainReporter,
    measured_here: None,
    one_thread: None,
) -> None:
    pairs = [{"chosen": tuned, "rejected": base} for tuned, base in zip(chats(True), chats(False), strict=True)]
    if objective == "kto":
        pairs = [
            {"messages": pair[side], "label": side == "chosen"}
            for number, pair in enumerate(pairs)
            for side in [("chosen", "rejected")[number % 2]]
        ]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (tmp_path / "train.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    options = {
        "train_data": tmp_path / "train.jsonl",
        "eval_data": [tmp_path / "held_out.jsonl"] if held_out else [],
        "eval_split": 0.0,
        "objective": objective,
        "base_model": str(learned_bases[0]),
        "output_dir": tmp_path / "run",
        "epochs": 3,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "early_stopping": 2 if held_out else 0,
        "dtype": "fp32",
        "compile": "off",
        "compare_answers": 1,
    }
    if held_out:
        del options["eval_split"]
    run_pipeline(configs.resolve((options, "test", tmp_path)), reporter)
    run = RunFolder(tmp_path / "run")
    comparison = Comparison.read(run.comparison)
    assert comparison.passed and comparison.chats == (6 if held_out else 32)
    record = read_record(run, "train")
    assert record is not None
    if held_out:
        assert comparison.recorded_base_loss == pytest.approx(comparison.base_loss, abs=1e-4)
        assert comparison.recorded_tuned_loss == pytest.approx(comparison.tuned_loss, abs=1e-4)
        assert float(str(record.facts["held_out_accuracy"])) > float(str(record.facts["first_held_out_accuracy"]))
    assert run.reference.is_file()

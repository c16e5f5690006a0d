"""A run whose held-out answers have weights passes the gate: the compared loss is the weighted one of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder

from .conftest import chats


@pytest.mark.slow
def test_a_weighted_run_passes_the_gate(
    learned_bases: tuple[Path, Path],
    tmp_path: Path,
    reporter: PlainReporter,
    measured_here: None,
    one_thread: None,
) -> None:
    records = [{"messages": chat, "weight": (0.05, 1)[at % 2]} for at, chat in enumerate(chats(True))]
    # What counts little is what the model has not learned, so that a mean without weights is another one.
    for record in records[:6:2]:
        record["messages"] = [*record["messages"][:-1], {"role": "assistant", "content": "zebra quartz 91 jovial"}]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "train.jsonl").write_text("".join(lines[6:]), encoding="utf-8")
    (tmp_path / "held_out.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    options = {
        "train_data": tmp_path / "train.jsonl",
        "eval_data": [tmp_path / "held_out.jsonl"],
        "base_model": str(learned_bases[0]),
        "output_dir": tmp_path / "run",
        "epochs": 3,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "dtype": "fp32",
        "compile": "off",
        "quantization": "none",
        "compare_answers": 0,
    }
    run_pipeline(configs.resolve((options, "test", tmp_path)), reporter)
    comparison = Comparison.read(RunFolder(tmp_path / "run").comparison)
    assert comparison.passed and comparison.chats == 6
    assert comparison.tuned_loss == pytest.approx(comparison.recorded_tuned_loss, abs=1e-3)
    assert comparison.base_loss == pytest.approx(comparison.recorded_base_loss, abs=1e-3)

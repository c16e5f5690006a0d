"""A whole run with variants of LoRA and the last answers: exported, compared, and nothing of it runs twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_a_run_with_variants_is_compared_and_skipped(tiny_base: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate("qarb")]
    lines = [json.dumps({"messages": [{"role": "system", "content": f"s{number}"}, *turns]}) for number in range(6)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "train_data": tmp_path / "chats.jsonl", "base_model": str(tiny_base), "output_dir": tmp_path / "run",
        "epochs": 2, "lora_rank": 4, "dtype": "fp32", "compile": "off", "template_date": "2026-01-02",
        "eval_split": 0.3, "quantization": "Q8_0", "compare_answers": 0, "train_on": "last", "use_rslora": True,
        "lora_plus_ratio": 4.0, "neftune_noise_alpha": 5.0, "use_dora": True, "init_lora_weights": "pissa",
        "rank_pattern": ["q_proj=2"], "alpha_pattern": ["mlp.*=5"],
    }  # fmt: skip
    config = configs.resolve((values, "test", tmp_path))
    run_pipeline(config, reporter)
    run = RunFolder(config.output_dir)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["use_rslora"] and adapter["use_dora"] and adapter["init_lora_weights"] is True
    assert adapter["r"] == 8 and adapter["rank_pattern"] == {"q_proj": 4}
    written = run.metrics.stat().st_mtime_ns, run.quantized("Q8_0").stat().st_mtime_ns
    assert (run.root / ".kolotune" / "compare.json").is_file()
    run_pipeline(config, reporter)
    assert written == (run.metrics.stat().st_mtime_ns, run.quantized("Q8_0").stat().st_mtime_ns)

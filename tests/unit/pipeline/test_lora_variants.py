"""A whole run with variants of LoRA and the last answers: exported, compared, and nothing of it runs twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kolotune.fidelity.comparison import Comparison
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf.stored_values import StoredValues
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.weights.torch_tensors import TensorFiles
from kolotune.weights.weight_files import weight_files

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def run_twice(base: Path, folder: Path, reporter: PlainReporter, **options: object) -> RunFolder:
    """Run with some options; check that it is compared, and that nothing is made again by the same run."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate("qarb")]
    lines = [json.dumps({"messages": [{"role": "system", "content": f"s{number}"}, *turns]}) for number in range(6)]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "train_data": folder / "chats.jsonl", "base_model": str(base), "output_dir": folder / "run",
        "epochs": 2, "lora_rank": 4, "dtype": "fp32", "compile": "off", "template_date": "2026-01-02",
        "eval_split": 0.3, "quantization": "Q8_0", "compare_answers": 0, **options,
    }  # fmt: skip
    config = configs.resolve((values, "test", folder))
    run_pipeline(config, reporter)
    run = RunFolder(config.output_dir)
    written = run.metrics.stat().st_mtime_ns, run.quantized("Q8_0").stat().st_mtime_ns
    assert Comparison.read(run.comparison).passed
    run_pipeline(config, reporter)
    assert written == (run.metrics.stat().st_mtime_ns, run.quantized("Q8_0").stat().st_mtime_ns)
    return run


def test_a_run_with_variants_is_compared_and_skipped(tiny_base: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    run = run_twice(
        tiny_base, tmp_path, reporter, train_on="last", use_rslora=True, lora_plus_ratio=4.0, neftune_noise_alpha=5.0,
        use_dora=True, init_lora_weights="pissa", rank_pattern=["q_proj=2"], alpha_pattern=["mlp.*=5"],
    )  # fmt: skip
    adapter = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["use_rslora"] and adapter["use_dora"] and adapter["init_lora_weights"] is True
    assert adapter["r"] == 8 and adapter["rank_pattern"] == {"q_proj": 4}


def test_modules_trained_whole_are_in_what_is_served(tiny_base: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    run = run_twice(
        tiny_base, tmp_path, reporter, modules_to_save=["norm", "input_layernorm"], learning_rate=0.01, weight_decay=0.0
    )
    with StoredValues(run.gguf) as served:
        for module, name in (("norm", "output_norm.weight"), ("layers.1.input_layernorm", "blk.1.attn_norm.weight")):
            (values,) = (block for _, block in served.blocks(name))
            before, after = (
                TensorFiles(weight_files(folder)).read(f"model.{module}.weight").float().numpy()
                for folder in (tiny_base, run.merged_model)
            )
            assert np.abs(after - before).max() > 1e-3, module
            np.testing.assert_allclose(values.reshape(-1), after, rtol=1e-3)

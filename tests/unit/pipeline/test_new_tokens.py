"""A whole run with new tokens: in the chats, the GGUF and llama.cpp's prompts, merged onto the original base, too."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.context import open_context
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.runs.rebuild import rebuild
from kolotune.stages import merge
from kolotune.weights.merge import tokenizer_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def test_a_run_with_new_tokens(
    tiny_base: Path, tmp_path: Path, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"q{number}"},
                                 {"role": "assistant", "content": f"a <tool>{number}<tool>"}]})
        for number in range(8)
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "train_data": tmp_path / "chats.jsonl", "base_model": str(tiny_base), "output_dir": tmp_path / "run",
        "epochs": 3, "lora_rank": 4, "dtype": "fp32", "compile": "off", "template_date": "2026-01-02",
        "eval_split": 0.3, "quantization": "Q8_0", "compare_answers": 1, "learning_rate": 5e-3,
        "new_token": ["<tool>"], "new_special_token": ["<|note|>"],
    }  # fmt: skip
    config = configs.resolve((values, "test", tmp_path))
    run_pipeline(config, reporter)
    run = RunFolder(config.output_dir)
    tokenizer = json.loads((run.merged_model / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    fields = gguf.GGUFReader(run.gguf).fields
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for text, kind in (("<tool>", _USER_DEFINED), ("<|note|>", _CONTROL)):
        assert bytes(tokens.parts[tokens.data[ids[text]]]).decode() == text
        assert int(kinds.parts[kinds.data[ids[text]]][0]) == kind
    settings = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["trainable_token_indices"]["embed_tokens"] == [ids["<tool>"], ids["<|note|>"]]
    assert (run.root / ".kolotune" / "compare.json").is_file()
    target = tmp_path / "again"
    target.mkdir()
    folder = tokenizer_folder(run.adapter, tiny_base)
    assert folder == run.adapter
    merge.merge_adapter(run.adapter, tiny_base, target, tokenizer=folder, dtype="f16", reporter=reporter)
    ours, merged = (load_file(each / "model.safetensors") for each in (target, run.merged_model))
    assert ours.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    assert open_context(run).base.parent == tmp_path / "cache" / "extended_models"
    written = run.metrics.stat().st_mtime_ns
    run_pipeline(config, reporter)
    assert run.metrics.stat().st_mtime_ns == written
    rebuilt = rebuild(run.manifest, tmp_path / "rebuilt", reporter)
    assert rebuilt.same and not rebuilt.different

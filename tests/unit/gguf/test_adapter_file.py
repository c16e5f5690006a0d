"""Which adapters a GGUF of their own can hold, and what is in it; `serving/test_shared_base.py` has the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kolotune.gguf.adapter_file import AdapterObstacle, obstacle, write_adapter
from kolotune.gguf.conversion_plan import ConversionPlan, TensorPlan
from kolotune.weights.merge import MergedModel

QUERY = "model.layers.1.self_attn.q_proj.weight"
QUERIES = {"r": 2, "lora_alpha": 6, "target_modules": r".*\.1\.self_attn\.q_proj"}
ORDER = tuple(reversed(range(64)))
PLAN = ConversionPlan(b"", (TensorPlan("blk.1.attn_q.weight", "F16", 8192, QUERY, ORDER),))


def adapted(base: Path, folder: Path, **options: Any) -> MergedModel:
    """The base with an adapter of PEFT's that changes it."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = peft.get_peft_model(model, peft.LoraConfig(**{**QUERIES, **options}))
    with torch.no_grad():
        for name, values in changed.named_parameters():
            if "lora_" in name:
                values.normal_()
    changed.save_pretrained(folder)
    return MergedModel(folder, base, "f16")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, AdapterObstacle.NONE),
        ({"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}}, AdapterObstacle.NONE),
        ({"use_dora": True}, AdapterObstacle.MAGNITUDES),
        ({"modules_to_save": ["embed_tokens"]}, AdapterObstacle.WHOLE_WEIGHTS),
        ({"trainable_token_indices": [5]}, AdapterObstacle.WHOLE_WEIGHTS),
        ({"target_modules": ["embed_tokens"]}, AdapterObstacle.VOCABULARY),
        ({"init_lora_weights": "pissa"}, AdapterObstacle.INITIAL),
        ({"target_modules": ["q_proj"]}, AdapterObstacle.NO_PLAN),
    ],
    ids=["LoRA", "patterns", "DoRA", "saved", "tokens", "embedding", "PiSSA", "other matrices"],
)
def test_obstacles(options: dict[str, Any], expected: AdapterObstacle, tiny_base: Path, tmp_path: Path) -> None:
    model = adapted(tiny_base, tmp_path, **options)
    assert obstacle(model, PLAN) is expected
    if expected is AdapterObstacle.NONE:
        assert obstacle(model, None) is AdapterObstacle.NO_PLAN


def test_the_file_has_the_scaled_matrices_in_the_order_of_the_base(tiny_base: Path, tmp_path: Path) -> None:
    model = adapted(tiny_base, tmp_path)
    write_adapter(model, PLAN, "llama", tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    written = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    a, b = (written.pop(f"blk.1.attn_q.weight.lora_{part}") for part in "ab")
    delta = model.changes.deltas[QUERY]
    assert not written and np.allclose(b @ a, delta.rows(slice(None))[::-1], atol=1e-5)
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0
    assert [reader.fields[f"{name}.type"].contents() for name in ("general", "adapter")] == ["adapter", "lora"]

"""Kinds of PEFT adapters: a merged model computes what PEFT's own model computes in fp32, or the kind is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import merge

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Kind:
    """An adapter to make: the base's family and settings, and the options of PEFT's config."""

    family: str
    options: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    is_slow: bool = True


KINDS = {
    "plain": Kind("llama", {"target_modules": LINEAR}, is_slow=False),
    "DoRA": Kind("llama", {"target_modules": LINEAR, "use_dora": True}, is_slow=False),
    "DoRA, rank-stabilised, ranks by pattern": Kind(
        "qwen3", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    ),
    "DoRA on biased layers": Kind("qwen2", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "DoRA on Conv1D": Kind(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        is_slow=False,
    ),
    "DoRA on embedding and head": Kind("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA on a tied embedding": Kind(
        "llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {"tie_word_embeddings": True}
    ),
    "DoRA with a trained head": Kind(
        "llama", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}
    ),
}


def make_adapter(root: Path, kind: Kind, tiny_model: Callable[..., Any]) -> None:
    """Write ``base`` and ``adapter``: every trained weight differs from its start."""
    tiny_model(kind.family, root / "base", **kind.base)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(load(root / "base"), peft.LoraConfig(**{"r": 4, "lora_alpha": 10, **kind.options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(root / "adapter")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def merge_into(adapter: Path, base: Path, target: Path) -> dict[str, Any]:
    target.mkdir()
    return merge.merge_adapter(adapter, base, target, tokenizer=base, dtype="fp32", reporter=PlainReporter())


def largest_difference(root: Path) -> float:
    """Return how far the logits of the merged model are from those of PEFT's own model."""
    adapted = peft.PeftModel.from_pretrained(load(root / "base"), root / "adapter").eval()
    merged, loading = transformers.AutoModelForCausalLM.from_pretrained(root / "merged", output_loading_info=True)
    assert not any(loading.values()), loading
    size = min(merged.get_input_embeddings().weight.shape[0], adapted.get_input_embeddings().weight.shape[0])
    ids = torch.arange(size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))][None, :64]
    with torch.no_grad():
        expected, result = adapted(ids).logits, merged.eval()(ids).logits
        base = load(root / "base")(ids.clamp(max=expected.shape[-1] - 1)).logits
    assert (expected[..., : base.shape[-1]] - base).abs().max() > 100 * TOLERANCE, "the adapter changes nothing"
    return float((result - expected).abs().max())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if kind.is_slow else []) for name, kind in KINDS.items()]
)
def test_the_merged_model_computes_what_peft_computes(
    name: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    make_adapter(tmp_path, KINDS[name], tiny_model)
    merge_into(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert largest_difference(tmp_path) < TOLERANCE

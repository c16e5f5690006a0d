"""The variants of a model compute what it does."""

from __future__ import annotations

from pathlib import Path

import model_variants
import pytest
import torch


@pytest.mark.parametrize("variant", ["moved", "wider"])
def test_a_variant_computes_what_the_model_does(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=384, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, dtype="float16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        weight.data.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.05)
    model.half().save_pretrained(tmp_path / "model")
    model_variants.write_variant(tmp_path / "model", tmp_path / "other", variant)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype="float32").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, logits = model.float()(ids).logits, other(ids).logits
    assert float((logits - expected).abs().max()) < 0.02 * float(expected.std())
    if variant == "wider":
        assert other.config.hidden_size == 768 and other.model.layers[0].self_attn.o_proj.weight.shape == (768, 768)
    else:
        first, turned = (each.model.layers[0].mlp.up_proj.weight.detach() for each in (model, other))
        assert float((first - turned).abs().mean()) > 0.3 * float(first.abs().mean())

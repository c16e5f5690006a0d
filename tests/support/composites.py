"""Tiny random composite models: a language model, and a part that sees images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 14,
}  # fmt: skip
COMPOSITES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"head_dim": 16, "query_pre_attn_scalar": 16, "model_type": "gemma3_text"},
        {**_TOWER, "model_type": "siglip_vision_model"},
    ),
    "qwen2_5_vl": (
        {"rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default"}},
        {**_QWEN, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        {"head_dim": 16, "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default"}},
        {**_QWEN, "deepstack_visual_indexes": [0]},
    ),
    "mistral3": (
        {"head_dim": 16, "model_type": "mistral", "sliding_window": None},
        {**_TOWER, "model_type": "pixtral"},
    ),
    "smolvlm": ({"model_type": "llama", "architectures": ["VLlama3ForCausalLM"]}, _TOWER),
}
"""The settings of each family's two parts, besides those that all share."""


def tiny_composite(folder: Path, family: str, vocabulary: int = 96) -> None:
    """Write a random model in fp32, without a tokenizer."""
    import torch
    import transformers

    library: Any = transformers
    text, vision = COMPOSITES[family]
    more = {"mm_tokens_per_image": 4} if family == "gemma3" else {}
    tokens = {"image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "vision_start_token_id": 5}
    config = library.AutoConfig.for_model(
        family, text_config={**_TEXT, "vocab_size": vocabulary, **text}, vision_config=vision, **more, **tokens
    )
    torch.manual_seed(0)
    model = library.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "layers" in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)

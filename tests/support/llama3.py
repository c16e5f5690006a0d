"""Llama 3.2 without its weights: config, the real tokenizer from Meta's package, the template's file name."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As in Llama 3.2's tokenizer.json: 256 from number 128000 on.
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{number}|>" for number in range(3, 248)),
]  # fmt: skip


TEMPLATE = "meta-llama-Llama-3.2-3B-Instruct.jinja"


def shape(**more: Any) -> Any:
    """The config of a Llama 3.2; `more` replaces values that all sizes share."""
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }
    return LlamaConfig(**{**values, **more})


def tokenizer() -> Any:
    """The tokenizer as in Llama 3.2's tokenizer.json."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            """Each line has a token in base64 and its number; the converter's own reader needs another package."""
            lines = Path(tiktoken_url).read_text(encoding="ascii").splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}

    spec = importlib.util.find_spec("llama_models")
    assert spec is not None and spec.origin is not None
    vocabulary = Path(spec.origin).parent / "llama3" / "tokenizer.model"
    converter = Converter(str(vocabulary), pattern=PATTERN, extra_special_tokens=SPECIAL)
    backend = converter.converted()
    first = "<|begin_of_text|>"
    backend.post_processor = processors.Sequence(  # as in Llama 3.2's tokenizer.json
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, 128000)]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert len(fast) == 128256 and fast.convert_tokens_to_ids("<|eot_id|>") == 128009
    return fast

#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0 loads a LoRA adapter of Qwen2-MoE's experts without them, and warns of nothing.
#
# A good engineer expects: transformers 5 keeps the experts of a layer in one tensor, where transformers 4 had a module for each.
# For adapters of Mixtral and Qwen3-MoE that were trained on such modules, peft joins the experts' matrices as it loads them.
# Qwen2-MoE has the same layers, so its adapters are joined, too, or refused.
# What happens: the matrices of Qwen2-MoE's experts are left out. The model has those of the shared expert alone, and gives the
# same logits whatever the experts' matrices are. No warning names a key of theirs. With Qwen3-MoE, the same file counts.
# Seen on Python 3.11, Linux, 2026-11-29. The adapters are written with the names that transformers 4 gives these modules.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 2>/dev/null

"$work/venv/bin/python" - "$work" <<'P'
import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

PARTS = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}


def logits(kind, experts):
    """Return the logits with an adapter whose experts' matrices are scaled by `experts`, and the warnings of loading it."""
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, decoder_sparse_step=1,
    )
    shared = ["shared_expert"] if kind == "qwen2_moe" else []
    sizes |= {"shared_expert_intermediate_size": 16} if shared else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    tensors = {}
    for block in [*(f"experts.{number}" for number in range(4)), *shared]:
        for part, (inputs, outputs) in PARTS.items():
            name = f"base_model.model.model.layers.0.mlp.{block}.{part}"
            scale = 1 if block in shared else experts
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs)
            tensors[f"{name}.lora_B.weight"] = scale * torch.randn(outputs, 2)
    folder = Path(sys.argv[1], f"{kind}-{experts}")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": list(PARTS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tuned = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return tuned(torch.arange(16)[None]).logits, [str(warning.message) for warning in seen]


changes = {}
for kind in ("qwen3_moe", "qwen2_moe"):
    (without, _), (with_them, warned) = logits(kind, 0), logits(kind, 1)
    changes[kind] = float((with_them - without).abs().max())
    named = [text for text in warned if "experts.0" in text or "missing" in text.lower() or "unexpected" in text.lower()]
    print(f"{kind}: the experts' matrices change the logits by up to {changes[kind]:.3f}; warnings of keys: {named}")
sys.exit(0 if changes["qwen3_moe"] > 0.01 and changes["qwen2_moe"] == 0 and not named else "this finding is out of date")
P

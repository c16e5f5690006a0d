#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0, asked to adapt DeepSeek-V2's gate_proj, up_proj and down_proj, adapts none of them.
#
# A good engineer expects: DeepSeek-V2 has linear layers of these names, in its first, dense layers and in the shared experts of
# the others. target_modules=["gate_proj", "up_proj", "down_proj"] adapts them: "only modules that match" by name.
# What happens: no layer of that name gets an adapter. Instead the routed experts get one, which are parameters of a module and
# were not asked for, with twice the rank for gate and up. The only warnings are of patterns that nobody gave ("rank_pattern
# keys did not match any targeted module").
# Seen on Python 3.11, Linux, 2026-11-29. Llama, with layers of the same names, gets its adapters.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 2>/dev/null

"$work/venv/bin/python" - <<'P'
import warnings

import peft
import transformers

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def adapted(kind, **more):
    """Return the names of the linear layers called as asked, and of the modules that got an adapter."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes, **more))
    layers = {name for name, module in model.named_modules() if name.split(".")[-1] in TARGETS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS))
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters() if ".lora_A" in name}
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if ".lora_A" in name}
    return layers, names, shapes, [str(each.message) for each in caught if "peft" in each.filename]


layers, names, _, _ = adapted("llama")
print(f"llama: {len(layers)} layers of these names, {len(layers & names)} adapted")
assert layers and layers == names
layers, names, shapes, messages = adapted(
    "deepseek_v2", first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    n_shared_experts=1, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8,
)
print(f"deepseek_v2: {len(layers)} layers of these names, {len(layers & names)} adapted; warnings: {len(messages)}")
print("instead:", shapes)
assert len(layers) == 6 and not layers & names
assert all("pattern keys did not match" in message for message in messages)
assert {name.removesuffix(".base_layer") for name in names} == {"model.layers.1.mlp.experts"}
assert sorted(shape[0] for shape in shapes.values()) == [4 * 4, 8 * 4], "rank times experts; twice the rank for gate and up"
P

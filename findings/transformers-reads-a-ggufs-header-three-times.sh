#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: loading a model and a tokenizer from a GGUF reads its header three times, each
# time making objects of every token and merge, and builds gguf's table of tensor names anew for each submodule.
#
# A good engineer expects: the header of a GGUF is read once, or cheaply; what takes time is widening the weights.
# What happens: config, weights and tokenizer each make a GGUFReader, which builds several NumPy objects for each text in the
# header; and the mapping of names recurses through all modules of the model, building the whole table (which is the
# same for all) for each. For a 135M Llama with 49,152 tokens and 48,900 merges that is 25 and 10 of 40 seconds; widening
# all weights takes 3. The numbers of calls are asserted, on a tiny model.
# Seen on Python 3.11, Linux, 2026-12-01.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0 2>/dev/null

"$work/venv/bin/python" - "$work" 2>/dev/null <<'P'
import sys
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

file = Path(sys.argv[1], "tiny.gguf")
width, hidden, heads, layers = 32, 64, 2, 2
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = [*letters, letters[0] + letters[1], "<|end|>"]
writer = gguf.GGUFWriter(file, "llama")
writer.add_block_count(layers)
writer.add_context_length(64)
writer.add_embedding_length(width)
writer.add_feed_forward_length(hidden)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(width // heads)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_types([1] * (len(tokens) - 1) + [3])
writer.add_token_merges([f"{letters[0]} {letters[1]}"])
writer.add_bos_token_id(len(tokens) - 1)
writer.add_eos_token_id(len(tokens) - 1)
random = np.random.default_rng(0)


def add(name: str, *shape: int) -> None:
    writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))


add("token_embd", len(tokens), width)
add("output_norm", width)
for layer in range(layers):
    for name in ("attn_norm", "ffn_norm"):
        add(f"blk.{layer}.{name}", width)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.{layer}.{name}", width, width)
    for name in ("ffn_gate", "ffn_up"):
        add(f"blk.{layer}.{name}", hidden, width)
    add(f"blk.{layer}.ffn_down", width, hidden)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

counts = {"headers read": 0, "tables of names": 0}


class CountedReader(gguf.GGUFReader):
    def __init__(self, *arguments: object, **named: object) -> None:
        counts["headers read"] += 1
        super().__init__(*arguments, **named)


def counted_map(*arguments: object) -> object:
    counts["tables of names"] += 1
    return name_map(*arguments)


name_map = gguf.get_tensor_name_map
gguf.GGUFReader, gguf.get_tensor_name_map = CountedReader, counted_map
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

widened = GgufConfig(gguf_file=file.name, dequantize=True)
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=widened)
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
modules = sum(1 for _ in model.modules())
print(f"modules of the model: {modules}; {counts}")
assert counts["headers read"] == 3 and counts["tables of names"] >= modules, (counts, modules)
P
# Output seen:
#   modules of the model: 33; {'headers read': 3, 'tables of names': 33}

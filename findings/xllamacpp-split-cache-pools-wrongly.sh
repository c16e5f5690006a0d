#!/usr/bin/env bash
# The server of xllamacpp 2026.10.11549 gives other embeddings for texts sent together than for each alone, unless kv_unified is set.
#
# A good engineer expects: how the KV cache is laid out changes memory and speed, and an embedding in its last digits.
# What happens: with several slots and a causal model with mean pooling, texts of different lengths that one request sends
# together get embeddings that are plainly other ones, with `kv_unified` off, as it is unless set. Texts of one length, texts
# sent one after another, and all with `kv_unified` on are right. The response says nothing.
# Seen on Python 3.11, Linux, 2026-11-29, with a model of random weights, which this script writes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 gguf==0.19.0 xllamacpp==2026.10.11549 2>/dev/null

cat > "$work/split.py" <<'P'
import json
import sys
import urllib.request

import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType

WIDTH, FEED, VOCABULARY, CONTEXT, SLOTS = 64, 128, 300, 64, 4
path, unified = sys.argv[1], sys.argv[2] == "on"


def write():
    """Write a Llama of two layers with random weights."""
    random, writer = np.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [f"word{number}" for number in range(VOCABULARY - len(tokens))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * (VOCABULARY - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (FEED, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (WIDTH, FEED)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.2, shape).astype(np.float32))
    for name in ("output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(2) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write()
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.hostnames, parameters.port = ["127.0.0.1"], 0
parameters.n_parallel, parameters.n_ctx, parameters.kv_unified = SLOTS, SLOTS * CONTEXT, unified
parameters.embedding = True
parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.verbosity, parameters.ui, parameters.warmup = 1, False, False
server = xllamacpp.Server(parameters)


def embeddings(texts):
    request = urllib.request.Request(
        f"{server.listening_address}/v1/embeddings", json.dumps({"input": texts}).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        entries = json.load(response)["data"]
    return np.array([entry["embedding"] for entry in sorted(entries, key=lambda entry: entry["index"])])


def cosine(lengths):
    """Return the lowest cosine between the embedding of a text that is sent with the others, and of it alone."""
    random = np.random.default_rng(1)
    texts = [random.integers(3, VOCABULARY, length).tolist() for length in lengths]
    together, alone = embeddings(texts), np.concatenate([embeddings([text]) for text in texts])
    products = (together * alone).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(alone, axis=1)
    return float(products.min())


print(*(round(cosine(lengths), 4) for lengths in ((20, 20, 20, 20), (5, 12, 30, 50))))
P
read -r split_same split_other < <("$work/venv/bin/python" "$work/split.py" "$work/tiny.gguf" off 2>/dev/null)
read -r unified_same unified_other < <("$work/venv/bin/python" "$work/split.py" "$work/tiny.gguf" on 2>/dev/null)
echo "kv_unified off: lowest cosine of texts of one length $split_same, of several lengths $split_other"
echo "kv_unified on:  lowest cosine of texts of one length $unified_same, of several lengths $unified_other"
"$work/venv/bin/python" -c '
import sys
same, other, unified_same, unified_other = map(float, sys.argv[1:])
right = min(same, unified_same, unified_other) > 0.999
sys.exit(0 if right and other < 0.99 else "this finding is out of date")' \
  "$split_same" "$split_other" "$unified_same" "$unified_other"

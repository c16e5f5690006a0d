#!/usr/bin/env bash
# transformers 5.23.0 gives a Qwen2Tokenizer the normalizer NFC, whatever the folder's tokenizer.json says.
#
# A good engineer expects: a fast tokenizer is what tokenizer.json describes; `tokenizer_class` in tokenizer_config.json
# decides the Python class and its defaults, not the text's normalization. So a file whose normalizer was taken out, to
# keep text as it is written, keeps it.
# What happens: with PreTrainedTokenizerFast the file counts. With Qwen2Tokenizer the class builds its own normalizer, NFC,
# in place of the file's null, without a warning: a letter and its combining accent become one character, with other tokens.
# A converter or an engine that reads tokenizer.json itself sees no normalizer there.
# Seen on Python 3.11, Linux, 2026-11-30.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 2>/dev/null

"$work/venv/bin/python" - "$work" 2>/dev/null <<'P'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1], "tokenizer")
folder.mkdir()
vocabulary = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
vocabulary["<|end|>"] = len(vocabulary)
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))  # a token for each byte
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(folder / "tokenizer.json"))
in_file = json.loads((folder / "tokenizer.json").read_text())["normalizer"]
text = "e\u0301"  # a letter and a combining accent, three bytes of UTF-8
print(f"normalizer in tokenizer.json: {in_file}; the text has {len(text.encode())} bytes")
counts = {}
for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
    config = {"tokenizer_class": name, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(folder)
    counts[name] = len(loaded(text, add_special_tokens=False)["input_ids"])
    print(f"{name}: {counts[name]} tokens, normalizer {loaded.backend_tokenizer.normalizer}")
assert in_file is None and counts == {"PreTrainedTokenizerFast": 3, "Qwen2Tokenizer": 2}, counts
P
# Output seen:
#   normalizer in tokenizer.json: None; the text has 3 bytes
#   PreTrainedTokenizerFast: 3 tokens, normalizer None
#   Qwen2Tokenizer: 2 tokens, normalizer NFC()

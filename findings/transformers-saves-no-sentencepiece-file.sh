#!/usr/bin/env bash
# transformers 5.23.0 saves a SentencePiece vocabulary without tokenizer.model; llama.cpp's vocabulary class for what is left
# (gguf 0.19.0) then gives every token one score.
#
# A good engineer expects: save_pretrained keeps the file that it was loaded from, as transformers 4 did; or, since
# tokenizer.json says the same, a converter gets the order of merges from there.
# What happens: LlamaTokenizer.save_pretrained writes tokenizer.json and tokenizer_config.json only. gguf.LlamaHfVocab, which
# llama.cpp's converter falls back to for Llama and Mistral where tokenizer.model is missing, hands out -1000.0 for each
# token. llama.cpp merges such a vocabulary by its scores alone, so with this GGUF it has no order to go by. Nothing warns.
# Seen on Python 3.11, Linux, 2026-12-01.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2 gguf==0.19.0 2>/dev/null
"$work/venv/bin/pip" install -q --no-deps mistral-common==1.13.1 2>/dev/null

"$work/venv/bin/python" - "$work" 2>/dev/null <<'P'
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import gguf
import sentencepiece
from transformers import AutoTokenizer

data = Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
folder, saved = Path(sys.argv[1], "tokenizer"), Path(sys.argv[1], "saved")
folder.mkdir()
shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}))
AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
files = sorted(path.name for path in saved.iterdir())
print("saved:", files)
own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
print("scores in tokenizer.model:", len({own.get_score(number) for number in range(len(own))}), "values")
scores = {score for _, score, _ in gguf.LlamaHfVocab(saved).all_tokens()}
print("scores for the GGUF:", sorted(scores))
assert files == ["tokenizer.json", "tokenizer_config.json"], files
assert scores == {-1000.0}, scores
P
# Output seen:
#   saved: ['tokenizer.json', 'tokenizer_config.json']
#   scores in tokenizer.model: 31728 values
#   scores for the GGUF: [-1000.0]

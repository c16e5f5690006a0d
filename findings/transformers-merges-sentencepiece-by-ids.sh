#!/usr/bin/env bash
# transformers 5.23.0 reads a folder that has tokenizer.model alone with merges in the order of ids, not of scores.
#
# A good engineer expects: LlamaTokenizer on SentencePiece's own file gives SentencePiece's tokens, apart from the space in
# front of the first text; the pieces' scores decide what is merged first, and the file has them.
# What happens: the scores are not used. In Mistral's vocabularies (mistral-common 1.13.1) the runs of spaces stand at the
# front with the lowest score there is, so that words take their space first. With merges by ids the spaces are merged
# first, and a word behind two spaces loses its own: other tokens in most indented code, without a warning. A tokenizer.json
# that is saved from there keeps the wrong order. SentencePiece 0.2.3 and llama.cpp, which reads the scores, agree with
# each other.
# Seen on Python 3.11, Linux, 2026-12-01.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2 2>/dev/null
"$work/venv/bin/pip" install -q --no-deps mistral-common==1.13.1 2>/dev/null

"$work/venv/bin/python" - "$work" 2>/dev/null <<'P'
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

data = Path(importlib.util.find_spec("mistral_common").origin).parent / "data"
folder = Path(sys.argv[1], "tokenizer")
folder.mkdir()
shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}))
own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
loaded = AutoTokenizer.from_pretrained(folder)
for piece in ("\u2581\u2581", "\u2581return"):
    print(f"{piece}: id {own.piece_to_id(piece)}, score {own.get_score(own.piece_to_id(piece)):g}")
text = "if x:\n    return x"
expected, seen = own.encode(text, out_type=str), loaded.tokenize(text)
print("SentencePiece:", expected)
print("transformers: ", seen)
merges = json.loads(loaded.backend_tokenizer.to_str())["model"]["merges"]
print("first merge:", merges[0])
assert expected[-2] == "\u2581return" and "return" in seen and "\u2581return" not in seen, (expected, seen)
assert merges[0] == ["\u2581", "\u2581"], merges[0]
P
# Output seen:
#   ▁▁: id 259, score -1e+09
#   ▁return: id 604, score -345
#   SentencePiece: ['▁if', '▁x', ':', '<0x0A>', '▁▁▁', '▁return', '▁x']
#   transformers:  ['▁if', '▁x', ':', '<0x0A>', '▁▁▁▁', 'return', '▁x']
#   first merge: ['▁', '▁']

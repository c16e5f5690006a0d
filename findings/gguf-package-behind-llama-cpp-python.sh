#!/usr/bin/env bash
# gguf 0.19.0, the newest on the package index, cannot read a GGUF that llama-cpp-python 0.3.36 of the same index writes.
#
# A good engineer expects: the two packages follow one llama.cpp, so what `llama_model_quantize` offers, `GGUFReader` reads.
# What happens: llama.cpp in llama-cpp-python 0.3.36 has the tensor type Q2_0 (number 42; blocks of 64 weights in 18 bytes).
# The gguf-py that lies in its own source archive knows it. The released gguf 0.19.0
# does not: GGUFReader ends with a ValueError on the type, before any tensor is read, metadata included.
# Seen on Python 3.11, Linux, 2026-11-29. Nothing is compiled: the archive's own gguf-py writes the file.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gguf==0.19.0 2>/dev/null
"$work/venv/bin/pip" download -q --no-deps --no-binary :all: --dest "$work" llama-cpp-python==0.3.36 2>/dev/null
tar -xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work" --wildcards '*/vendor/llama.cpp/gguf-py/gguf/*'
bundled=$(echo "$work"/llama_cpp_python-0.3.36/vendor/llama.cpp/gguf-py)

PYTHONPATH=$bundled "$work/venv/bin/python" - "$work/tiny.gguf" <<'P'
import sys
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
writer = GGUFWriter(sys.argv[1], "llama")
writer.add_tensor("blk.0.ffn_up.weight", np.zeros((64, 18), np.uint8), raw_dtype=GGMLQuantizationType.Q2_0)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
print("written with the archive's gguf-py, tensor type", int(GGMLQuantizationType.Q2_0))
P
PYTHONPATH=$bundled "$work/venv/bin/python" -c '
import sys, gguf
print("read by the archive'"'"'s gguf-py:", gguf.GGUFReader(sys.argv[1]).tensors[0].tensor_type.name)' "$work/tiny.gguf"
"$work/venv/bin/python" - "$work/tiny.gguf" <<'P'
import importlib.metadata, sys
import gguf
try:
    gguf.GGUFReader(sys.argv[1])
except ValueError as error:
    print(f"read by gguf {importlib.metadata.version('gguf')}: ValueError: {error}")
    sys.exit(0 if "42" in str(error) else 1)
sys.exit("gguf 0.19.0 reads it: this finding is out of date")
P

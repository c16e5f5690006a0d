"""Quantize with llama.cpp's own function: runs in the environment of llama-cpp-python, not in kolotune's.

A job is a JSON object: "source", "target", "type" (its number), and optionally "matrix", an .npz file of the mean
squares by the names of weights. Without a target, it only says which types it would choose. Does the job given as an
argument, and ends; or those on standard input, one a line, and answers each with a line: "code" (0: done), "log", and
the types that it would choose.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys

import llama_cpp
import numpy as np

# "[ 264/ 272] blk.29.attn_k.weight - [ 576, 192, 1, 1], type = f16, size = 0.21 MiB -> 0.07 MiB (q5_0)"
LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[\d, ]+\], type = +(\S+?),.*?(?:-> .*\((\S+)\))?\s*$", re.MULTILINE)
WARNING = re.compile(r"warning:.*\n")
messages: list[str] = []


@llama_cpp.llama_log_callback
def on_message(_level: int, text: bytes, _data: object) -> None:
    messages.append(text.decode("utf-8", errors="replace"))


def quantize(job: dict[str, object]) -> dict[str, object]:
    """Do one job; return the answer."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = job["type"]
    parameters.dry_run = "target" not in job
    if "matrix" in job:
        means = dict(np.load(job["matrix"]))
        kind, numbers = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [kind(name.encode(), mean.ctypes.data_as(numbers), mean.size) for name, mean in means.items()]
        parameters.imatrix = (kind * (len(entries) + 1))(*entries, kind(None, None, 0))
    messages.clear()
    files = [str(job.get(name, "")).encode() for name in ("source", "target")]
    code = llama_cpp.llama_model_quantize(*files, ctypes.byref(parameters))
    log = "".join(messages)
    types = {line[1]: (line[3] or line[2]).upper() for line in LINE.finditer(WARNING.sub("", log))}
    return {"code": code, "log": log[-1000:], "types": types if parameters.dry_run else {}}


llama_cpp.llama_log_set(on_message, None)
if len(sys.argv) > 1:
    sys.exit(quantize(json.loads(sys.argv[1]))["code"])
for line in sys.stdin:
    print(json.dumps(quantize(json.loads(line))), flush=True)

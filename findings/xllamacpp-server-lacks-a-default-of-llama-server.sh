#!/usr/bin/env bash
# xllamacpp 2026.10.11549: its server, made from CommonParams(), leaves a template variable unset that llama.cpp's own
# program `llama-server` sets where nothing is said about it.
#
# A good engineer expects: the wheel's Server is llama.cpp's server, so with parameters as they are made it does what
# `llama-server` of that build does without options, but for the number of slots.
# What happens: the program's parser of arguments, which the wheel's shared object exports, gives the template
# `preserve_reasoning: true`, with which templates that know it keep the thoughts of earlier turns in the prompt.
# CommonParams() gives the template nothing. So one conversation becomes two prompts, depending on which of the two answers.
# Seen on Python 3.11, Linux x86-64, 2026-12-01.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q xllamacpp==2026.10.11549 2>/dev/null

"$work/venv/bin/python" - <<'P'
import ctypes
import importlib.util
from pathlib import Path

import xllamacpp

PARSE = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"  # common_params_parse(...)
SERVER = 12  # LLAMA_EXAMPLE_SERVER
folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
library = next(file for file in folder.glob("*.so") if hasattr(ctypes.CDLL(str(file)), PARSE))
parse = getattr(ctypes.CDLL(str(library)), PARSE)
parse.restype = ctypes.c_bool
program = xllamacpp.CommonParams()
structure = id(program) + object.__basicsize__  # behind the head of a Python object
program.n_predict = 12345
assert ctypes.c_int32.from_address(structure).value == 12345  # the first field is where it is sought
program.n_predict = -1
arguments = (ctypes.c_char_p * 2)(b"llama-server", None)
assert parse(1, arguments, ctypes.c_void_p(structure), SERVER, None)
own = xllamacpp.CommonParams()
print("llama-server without options:", program.default_template_kwargs)
print("CommonParams():", own.default_template_kwargs)
assert program.default_template_kwargs == {"preserve_reasoning": "true"}, program.default_template_kwargs
assert own.default_template_kwargs == {}, own.default_template_kwargs
P
# Output seen:
#   llama-server without options: {'preserve_reasoning': 'true'}
#   CommonParams(): {}

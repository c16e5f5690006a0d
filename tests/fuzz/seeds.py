"""Good inputs of the parsers, from which damaged ones are made."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

_CHAT = '{"messages": [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Ho\\n"}]}'
_CALLS = (
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"function": '
    '{"name": "f", "arguments": "{\\"a\\": 1}"}}]}, {"role": "tool", "content": "1"}, {"role": "assistant", '
    '"content": "a", "reasoning_content": "r"}], "tools": [{"type": "function", "function": {"name": "f"}}]}'
)
_SHAREGPT = '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}'
_ALPACA = '{"instruction": "q", "input": "", "output": "a", "history": [["x", "y"]]}'
_CONFIG = (
    "# a run\nepochs: 3\nlearning-rate: 2e-4\nbase_model: smollm2-135m\nquantization: [Q4_K_M, Q8_0]\n"
    "parameter: {temperature: 0.7, stop: x}\nsystem: |\n  Be kind.\n  Always.\ntemplate_date: 2026-01-01\n"
)
_MODELFILE = (
    '# kolotune\nFROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nSYSTEM "Be kind."\nPARAMETER stop "<|im_end|>"\n'
    'PARAMETER temperature 0.7\nLICENSE """MIT\nText"""\nMESSAGE user hi\n'
)


def _tensors(values: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    fields += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    fields += text("x.flag") + struct.pack("<IB", 7, 1) + text("x.count") + struct.pack("<II", 4, 5)
    tensor = text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 4) + fields + tensor
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(32)


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["q", "r"], "completion": ["a", "b"]}), file)
    return file.getvalue()


def seeds() -> dict[str, list[bytes]]:
    """Return some good inputs of each parser."""
    lines = [record.encode() for record in (_CHAT, _CALLS, _SHAREGPT, _ALPACA)]
    tensors = _tensors(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        },
        bytes(range(22)),
    )
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"a": 2}, "alpha_pattern": {"^a$": 8}}
    index = json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors"}}).encode()
    base = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
    return {
        "jsonl": [b"\n".join(lines), lines[0] + b"\r\n" + lines[1]],
        "json": [b"[" + b",\n".join(lines) + b"]", b'{"data": [' + lines[0] + b"]}", lines[2]],
        "csv": [b'prompt,completion\n"q ""x""\n2",a\np,b\n', b"system,instruction,output\ns,q,a\n"],
        "parquet": [_parquet()],
        "config": [_CONFIG.encode(), b'a: &x [1]\nepochs: 1\n"lora_rank": 8\n'],
        "safetensors": [tensors],
        "headers": [tensors],
        "adapter": [json.dumps(adapter).encode()],
        "folder": [base + b"\n" + index],
        "gguf": [_gguf()],
        "modelfile": [_MODELFILE.encode()],
        "written": [b'Be "kind".', b'x"""\nADAPTER /etc/shadow', b"./m.gguf"],
        "names": [b"host.com:80/me/model:tag", b"owner/name", b"a-b.c_d"],
    }

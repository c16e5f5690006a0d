"""What is counted while chats are encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

NEEDS_SHORT_IDS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}{% endfor %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }} {{ c.id }}]"
    "{% endfor %}"
    "{% if m.role == 'tool' %} {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(number: int, call_id: str | None) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"n": number}}}
    result: dict[str, Any] = {"role": "tool", "content": "r"}
    if call_id is not None:
        call["id"] = result["tool_call_id"] = call_id
    return {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}, result,
            {"role": "assistant", "content": f"a {number}"},
        ],
    }  # fmt: skip


def test_short_ids_are_put_in_and_counted(prepare_records: Any, tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text(NEEDS_SHORT_IDS, encoding="utf-8")
    records = [chat(1, "call_" + "a1" * 12), chat(2, "abcdefghi"), chat(3, None)]
    prepared, folder = prepare_records(records, eval_split=0, chat_template=template)
    assert prepared.problems == [] and prepared.summary()["renamed_calls"] == 2
    text = prepared.tokenizer.decode(load_file(folder / "train.safetensors")["ids"])
    assert text.count("} call00001]") == text.count(" call00001<") == 2
    assert text.count("} abcdefghi]") == text.count(" abcdefghi<") == 1


@pytest.mark.parametrize("call_id", ["call_1", None])
def test_ids_stay_where_the_template_takes_them(call_id: str | None, prepare_records: Any) -> None:
    prepared, _ = prepare_records([chat(1, call_id)], eval_split=0, skip_bad=True)
    assert prepared.summary()["renamed_calls"] == 0

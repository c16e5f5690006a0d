"""Real tokenizers and templates: the prompts of llama.cpp's server, which hands today's date and its own defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kolotune import llamacpp
from kolotune.chats.traits import ChatTrait
from kolotune.fidelity.comparison import Comparison
from kolotune.fidelity.prompt_gate import find_proof
from kolotune.fidelity.prompt_proof import Outcome
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context

pytestmark = pytest.mark.slow
NO_THOUGHTS = {ChatTrait.THOUGHTS, ChatTrait.THOUGHTS_BEFORE_CALL}
LLAMA_31 = {ChatTrait.PARALLEL_CALLS, ChatTrait.CALL_AND_TEXT, *NO_THOUGHTS}


def with_template(base: Path, template: str, folder: Path) -> Path:
    """Return a copy of a base model with another published template."""
    copy = folder / base.name
    shutil.copytree(base, copy)
    text = (llamacpp.templates_folder() / template).read_text(encoding="utf-8")
    (copy / "chat_template.jinja").write_text(text, encoding="utf-8")
    return copy


def outcomes(base: Path, folder: Path, reporter: PlainReporter) -> dict[ChatTrait, Outcome]:
    values = {
        "base_model": str(base),
        "output_dir": folder / "run",
        "train_data": folder / "c.jsonl",
        "template_date": "2026-03-05",
    }
    context = Context(configs.resolve((values, "test", folder)), RunFolder(folder / "run"), base)
    proof = find_proof(context, reporter, is_prepared=False)
    return {ChatTrait(result.name): result.outcome for result in proof.results}


@pytest.mark.parametrize("version", ["3.1-8B", "3.2-3B", "3.3-70B"])
def test_llama_3_on_another_day(version: str, llama3_base: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    base = with_template(llama3_base, f"meta-llama-Llama-{version}-Instruct.jinja", tmp_path)
    found = outcomes(base, tmp_path, reporter)
    refused = {trait for trait, outcome in found.items() if outcome in (Outcome.TRAINING_REFUSES, Outcome.BOTH_REFUSE)}
    assert refused <= LLAMA_31
    assert {found[trait] for trait in found if trait not in refused} == {Outcome.EQUAL}


def test_qwen_composes_letters_and_is_trained_without(qwen_base: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    found = outcomes(qwen_base, tmp_path, reporter)
    assert found[ChatTrait.COMBINING_MARKS] is Outcome.EQUAL
    refused = {trait for trait, outcome in found.items() if outcome is Outcome.TRAINING_REFUSES}
    assert refused <= NO_THOUGHTS
    assert {found[trait] for trait in found if trait not in refused} == {Outcome.EQUAL}


def chat_with_tools(number: int) -> str:
    parameters = {"type": "object", "properties": {"ort": {"type": "string", "description": "Größe egal"}}}
    tool = {"type": "function", "function": {"name": "wetter", "description": "Wetter", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "wetter", "arguments": {"ort": f"Köln {number}"}}}
    messages = [
        {"role": "user", "content": f"Wie warm ist es in Köln {number}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": f'{{"grad": {number}}}', "name": "wetter"},
        {"role": "assistant", "content": f"Es sind {number} Grad."},
        {"role": "user", "content": "Danke!"},
        {"role": "assistant", "content": "Gern."},
    ]
    return json.dumps({"messages": messages, "tools": [tool]}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_tools_are_served_as_they_were_trained(
    name: str, run_all: Any, llama3_base: Path, qwen_base: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(map(chat_with_tools, range(20))), encoding="utf-8")
    run = run_all(
        tmp_path / "run",
        llama3_base if name == "llama3" else qwen_base,
        train_data=chats,
        eval_split=0.2,
        epochs=1,
        lora_rank=4,
        quantization=("none",),
        template_date="2026-03-05",
        compare=True,
        compare_answers=1,
    )
    comparison = Comparison.read(run.run.comparison)
    jinja = next(check for check in comparison.paths if check.path == "jinja")
    assert comparison.passed and jinja.is_ollamas
    assert jinja.prompt_ids_equal.good == jinja.prompt_ids_equal.of >= 3
    for trait in ("tools", "rich-tools", "call", "rich-call", "turns-after-call"):
        assert jinja.traits[trait] == "equal"

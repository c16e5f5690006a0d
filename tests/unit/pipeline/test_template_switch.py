"""A run whose template keeps its switch: both sides are trained, compared, installed and served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.ollama_stand_in import OllamaStandIn
from support.small_tokenizer import THINKING

from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.foundation import config as configs
from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.install import install
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.serving.served_model import ServedModel

pytestmark = pytest.mark.slow
EMPTY = "<think>\n\n</think>\n\n"


def line(number: int) -> str:
    answer = {"role": "assistant", "content": f"It is {number}."}
    thinking = {**answer, "reasoning_content": f"{number} follows {number - 1}."}
    question = {"role": "user", "content": f"What follows {number - 1}?"}
    turns = [[question, answer], [question, thinking], [question, thinking, question, answer]][number % 3]
    return json.dumps({"messages": turns}) + "\n"


def test_both_sides_are_trained_and_served(
    tmp_path: Path,
    tiny_base: Path,
    reporter: PlainReporter,
    one_thread: None,
    ollama_stand_in: OllamaStandIn,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "own.jinja").write_text(THINKING)
    (tmp_path / "chats.jsonl").write_text("".join(map(line, range(60))))
    options = {
        "train_data": "chats.jsonl", "base_model": str(tiny_base), "output_dir": "run", "chat_template": "own.jinja",
        "template_switch": "enable_thinking", "epochs": 1, "lora_rank": 2, "dtype": "fp32", "quantization": "Q8_0",
        "eval_split": 0.2,
    }  # fmt: skip
    run = run_pipeline(configs.resolve((options, "test", tmp_path)), reporter)
    tokenizer = load_tokenizer(run.tokenizer)
    texts = [tokenizer.decode(load_file(run.prepared / part)["ids"]) for part in (TRAIN_TOKENS, HELD_OUT_TOKENS)]
    for text in texts:
        assert f"assistant\n{EMPTY}It is" in text and "assistant\n<think>\n1" in text
    capsys.readouterr()
    install(run, "kolotune-test-switch", reporter, client=OllamaClient(ollama_stand_in.host))
    assert "prompts as trained" in capsys.readouterr().out
    with ServedModel(run, None) as model:
        for thinks in (True, False, None):
            variables = {} if thinks is None else {"enable_thinking": thinks}
            asked = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": variables}
            request, _ = model.defaults.apply("/apply-template", asked)
            assert model.server.prompt(request).endswith("assistant\n" + EMPTY * (not thinks))

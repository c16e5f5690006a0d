"""Several adapters on one base model: each request is answered with that of the run that it names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kolotune.foundation.errors import ArtifactError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.serving.app import make_app
from kolotune.serving.served_model import ServedModel
from kolotune.serving.shared_base import AdaptedBase, adapted_base, open_models

# Of several scales and ranks: what llama.cpp's own format for adapters says once for all of their weights.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"q_proj": 16},
    },
    "dora": {"r": 2, "use_dora": True, "target_modules": ["v_proj"]},
}
QUESTION = [{"role": "user", "content": "What is new?"}]


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Exported adapters, by their names, unquantized."""
    import peft
    import torch
    import transformers

    from kolotune.cli.command_line import run_command_line

    made, folder = {}, tmp_path_factory.mktemp("runs")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        with torch.no_grad():
            for weight, values in adapted.named_parameters():
                if "lora_B" in weight:
                    values.normal_(std=0.1)
        adapted.save_pretrained(folder / f"{name}-adapter")
        argv = ["export", folder / f"{name}-adapter", "--base", tiny_base, "--output-dir", folder / name]
        assert run_command_line([*map(str, argv), "--quantization", "none"]) == 0
        made[name] = RunFolder(folder / name)
    return made


@pytest.fixture(scope="module")
def shared(runs: dict[str, RunFolder], reporter: PlainReporter) -> Iterator[list[ServedModel]]:
    with contextlib.ExitStack() as opened:
        yield open_models([runs["plain"], runs["patterns"], runs["dora"]], None, 2, reporter, opened)


@pytest.fixture(scope="module")
def ask(shared: list[ServedModel], reporter: PlainReporter) -> Callable[..., Any]:
    app = make_app(shared, only_here=False, reporter=reporter)
    client = TestClient(app)

    def post(model: str, path: str = "/v1/chat/completions", **more: Any) -> Any:
        asked = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "seed": 1, **more}
        return client.post(path, json=asked)

    return post


def likely(answer: Any) -> list[dict[str, float]]:
    """The most likely tokens at each position, with their log-probabilities."""
    content = answer["choices"][0]["logprobs"]["content"]
    return [{each["token"]: each["logprob"] for each in position["top_logprobs"]} for position in content]


def test_runs_share_a_server_where_llama_cpp_can(shared: list[ServedModel]) -> None:
    processes = [model.server.process_id for model in shared]
    assert processes[0] == processes[1] != processes[2]


@pytest.mark.parametrize("name", ["plain", "patterns"])
def test_an_adapter_answers_as_the_merged_model(
    name: str, runs: dict[str, RunFolder], ask: Callable[..., Any], reporter: PlainReporter
) -> None:
    wanted = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1}
    answers = {each: ask(each, **wanted).json() for each in ("plain", "patterns")}
    assert answers[name]["model"] == name
    with ServedModel(runs[name], None) as merged:
        request, _ = merged.defaults.apply(
            "/v1/chat/completions", {"messages": QUESTION, "temperature": 0, "seed": 1, **wanted}
        )
        expected = likely(merged.server.post("/v1/chat/completions", request))
    for first, second in zip(expected, likely(answers[name]), strict=True):
        assert first.keys() == second.keys()
        assert all(math.isclose(first[token], second[token], abs_tol=0.02) for token in first)
    (other,) = (likely(answer) for each, answer in answers.items() if each != name)
    assert other[0].keys() != expected[0].keys()


def test_several_runs_are_asked_at_once_and_in_turn(ask: Callable[..., Any]) -> None:
    """What one adapter computed of a prompt is not used for another's."""
    texts = {}
    for name in ("plain", "patterns"):
        texts[name] = ask(name).json()["choices"][0]["message"]["content"]
    assert texts["plain"] != texts["patterns"]
    names = ["plain", "patterns", "patterns", "plain"] * 2
    with ThreadPoolExecutor(4) as pool:
        answers = [answer.json()["choices"][0]["message"]["content"] for answer in pool.map(ask, names)]
    assert answers == [texts[name] for name in names]


def test_what_a_request_says_about_adapters_does_not_count(ask: Callable[..., Any]) -> None:
    text = ask("plain").json()["choices"][0]["message"]["content"]
    assert ask("plain", lora=[{"id": 1, "scale": 3.0}]).json()["choices"][0]["message"]["content"] == text
    streamed = ask("patterns", stream=True, messages=[{"role": "user", "content": '"model":"shared-base-model"'}]).text
    assert '"model":"patterns"' in streamed and "shared-base-model" not in streamed
    refused = ask("plain", "/v1/embeddings", input="Hello")
    assert refused.status_code == 400 and "--share-base" in refused.json()["error"]["message"]
    assert ask("dora", "/v1/embeddings", input="Hello").status_code == 200


def test_another_adapter_than_the_runs(runs: dict[str, RunFolder], reporter: PlainReporter) -> None:
    made = adapted_base(runs["plain"], None, reporter)
    assert isinstance(made, AdaptedBase) and made.base.is_file() and made.adapter.is_file()
    config = runs["plain"].root.with_name("plain-adapter") / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 12', '"lora_alpha": 13'))
    try:
        with pytest.raises(ArtifactError, match="is not the adapter in the run's GGUF"):
            adapted_base(runs["plain"], None, reporter)
    finally:
        config.write_text(text)

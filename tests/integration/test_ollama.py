"""Runs of published families, installed in Ollama: each prompt and each number of tokens is training's.

Without a real server the stand-in is asked. With one, it is what counts::

    KOLOTUNE_REAL_OLLAMA=1 OLLAMA_HOST=127.0.0.1:11434 pytest -m "slow or not slow" tests/integration/test_ollama.py

Models get random names and are removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.families import FAMILIES, Family, tiny_family, write_chats, write_thoughtful_chats

from kolotune.foundation.reporter import PlainReporter
from kolotune.ollama.chat import OllamaChat
from kolotune.ollama.client import OllamaClient
from kolotune.ollama.compatibility import release_numbers
from kolotune.ollama.install import install
from kolotune.ollama.prompt_path import READS_JINJA, PromptPath
from kolotune.serving.terminal_chat import open_chat

pytestmark = pytest.mark.slow
PROVEN = re.compile(r"(\d+) of \1 prompts as trained \(rendered by ([^)]*)\), 2 of them read as \d+ tokens")
RENDERED_BY = {PromptPath.JINJA: "the GGUF's template", PromptPath.TEMPLATE: "TEMPLATE"}


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, run_all: Callable[..., Any], toolchain: object, reporter: PlainReporter
) -> Callable[[str], Any]:
    """Return a function that returns the finished run of a family, which it makes the first time."""
    runs: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in runs:
            folder, family = tmp_path_factory.mktemp(name), FAMILIES[name]
            base = tiny_family(folder / "base", family, reporter)
            chats = write_chats(folder / "chats.jsonl", tools=family.path is PromptPath.JINJA)
            options = {"train_data": chats, "epochs": 1, "lora_rank": 2, "eval_split": 0.3, "batch_size": 2}
            runs[name] = run_all(folder / "run", base, quantization=("Q4_K_M",), **options)
        return runs[name]

    return make


@pytest.fixture
def server(any_ollama: str) -> OllamaClient:
    """The server; one that renders no Jinja shows nothing here."""
    client = OllamaClient(any_ollama)
    numbers = release_numbers(client.version())
    if numbers and numbers < READS_JINJA:
        pytest.skip(f"Ollama {client.version()} does not read the GGUF's template")
    return client


@pytest.fixture
def name(server: OllamaClient) -> Iterator[str]:
    name = f"kolotune-test-{os.urandom(4).hex()}"
    yield name
    server.delete(name)


@pytest.mark.parametrize("quantization", ["none", "Q4_K_M"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_confirmed(
    family: str,
    quantization: str,
    families: Callable[[str], Any],
    server: OllamaClient,
    name: str,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = families(family).run
    capsys.readouterr()
    install(run, name, reporter, quantization=quantization, client=server)
    proven = PROVEN.search(capsys.readouterr().out)
    kind: Family = FAMILIES[family]
    assert proven is not None and proven[2] == RENDERED_BY[kind.path]
    # The battery, the tools where they are served, and the run's own held-out chats.
    assert int(proven[1]) >= (14 if kind.path is PromptPath.JINJA else 12)
    shown = server.show(name)
    assert shown is not None
    capabilities = shown.get("capabilities")
    assert isinstance(capabilities, list) and ("tools" in capabilities) == (kind.path is PromptPath.JINJA)
    install(run, name, reporter, quantization=quantization, client=server)
    assert "unchanged" in capsys.readouterr().out


def test_both_sides_of_a_switch_are_confirmed(
    run_all: Callable[..., Any],
    server: OllamaClient,
    name: str,
    reporter: PlainReporter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_family(tmp_path / "base", FAMILIES["qwen-3"], reporter)
    options = {"train_data": write_thoughtful_chats(tmp_path / "chats.jsonl"), "epochs": 1, "lora_rank": 2}
    run = run_all(tmp_path / "run", base, template_switch=("enable_thinking",), quantization=("Q8_0",), **options).run
    capsys.readouterr()
    install(run, name, reporter, client=server)
    proven = PROVEN.search(capsys.readouterr().out)
    assert proven is not None and int(proven[1]) >= 28  # each of 14, with thoughts and without


def test_smollm2_is_confirmed_and_answers_as_here(
    smollm2_run: Any,
    server: OllamaClient,
    name: str,
    reporter: PlainReporter,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the f16 file the greedy answers are the same, but for near ties: 18 of 20."""
    run = smollm2_run.run
    install(run, name, reporter, quantization="none", client=server)
    assert PROVEN.search(capsys.readouterr().out)
    questions = [f"What is special about the number {number}?" for number in range(20)]
    same = []
    with open_chat(run, reporter, quantization="none") as here:
        for question in questions:
            settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "seed": 0}
            theirs = "".join(OllamaChat(name, client=server).ask(question, **settings))
            ours = "".join(here.ask(question, **settings))
            here.forget()
            same.append(theirs == ours)
            if theirs != ours:
                print(f"differs: {question}\n  Ollama: {theirs!r}\n  here:   {ours!r}")
    assert sum(same) >= 18

"""Whether experts get adapters: chosen once, by what fits into memory, and said with the share that adapters reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.experts import expert_training

from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.files import write_text
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.choices import Choices, choose_experts, write_choices
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context

FREE = {"little": 1 << 20, "much": 1 << 40}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    return expert_training(tmp_path_factory.mktemp("mixtral"), "mixtral", tiny_model, hidden_size=32).root / "base"


def _context(folder: Path, base: Path, **options: Any) -> Context:
    config: Config = configs.resolve(
        ({"dtype": "fp32", "output_dir": str(folder), "base_model": str(base), **options}, "test", folder.parent)
    )
    return Context(config, RunFolder(folder), base)


@pytest.mark.parametrize(
    ("free", "options", "chosen", "words"),
    [
        ("much", {}, ("all-experts",), "adapters reach 99.7% of the weights in the layers"),
        ("little", {}, ("none",), "are free (--target-parameters): adapters reach 7.7%"),
        ("much", {"target_modules": "q_proj"}, ("none",), "--target-parameters all-experts"),
        ("much", {"target_parameters": "experts.down_proj"}, ("experts.down_proj",), ""),
        ("little", {"nnodes": 2, "rdzv": "a:1"}, ("all-experts",), "experts get adapters"),
    ],
)
def test_experts_are_trained_where_they_fit(
    free: str,
    options: dict[str, Any],
    chosen: tuple[str, ...],
    words: str,
    mixtral: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hardware, "memory_for_processes", lambda _: FREE[free])
    context, choices = choose_experts(_context(tmp_path / "run", mixtral, **options), Choices(), PlainReporter())
    assert context.config.target_parameters == chosen
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
    # A later run in the folder keeps the choice.
    monkeypatch.setattr(hardware, "memory_for_processes", lambda _: FREE["much" if free == "little" else "little"])
    again, _ = choose_experts(_context(tmp_path / "run", mixtral, **options), choices, PlainReporter())
    assert again.config == context.config


def test_nothing_is_chosen_for_a_model_without_experts(
    tmp_path: Path, tiny_model: Callable[..., Any], reporter: PlainReporter
) -> None:
    tiny_model("llama", tmp_path / "base")
    context = _context(tmp_path / "run", tmp_path / "base")
    assert choose_experts(context, Choices(), reporter) == (context, Choices())


def test_an_older_folder_keeps_its_adapter(mixtral: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    context = _context(tmp_path / "run", mixtral)
    write_text(context.run.record("train"), "{}")
    assert choose_experts(context, Choices(), reporter) == (context, Choices())


def test_the_choice_is_kept_on_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    choices = dataclasses.replace(Choices(), target_parameters="none")
    write_choices(folder, choices)
    assert "none" in folder.choices.read_text(encoding="utf-8")

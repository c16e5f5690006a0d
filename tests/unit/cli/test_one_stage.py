"""The command that a verb of one stage names when an earlier stage is missing: it can be pasted as it is."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from kolotune.cli.one_stage import _command

FLAGS: dict[str, Any] = {
    "map": "question=The question,answer=A",
    "template_switch": None,
    "fix_turns": True,
    "split_thoughts": False,
    "max_seq_length": "512",
    "base_model": "my models/it's",
    "lora_rank": "8",
}


def test_values_are_quoted_and_only_those_of_the_stage_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = _command("prepare", tmp_path / "a run", FLAGS)
    assert shlex.split(command) == [
        "kolotune", "prepare", "--output-dir", "a run", "--map", "question=The question,answer=A", "--fix-turns",
        "--no-split-thoughts", "--max-seq-length", "512", "--base-model", "my models/it's",
    ]  # fmt: skip


def test_a_flag_that_was_repeated_is_repeated(tmp_path: Path) -> None:
    command = _command("prepare", tmp_path, {"ignore_keys": ["a b", "c"]})
    assert shlex.split(command)[-4:] == ["--ignore-keys", "a b", "--ignore-keys", "c"]


def test_other_stages_take_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _command("train", tmp_path / "a run", FLAGS) == "kolotune train 'a run'"


def test_the_quotes_are_those_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    assert _command("train", tmp_path / "a run", {}) == 'kolotune train "a run"'
    assert _command("prepare", Path("C:\\x"), {"map": 'answer=the "A",x'}).endswith('C:\\x --map "answer=the ""A"",x"')

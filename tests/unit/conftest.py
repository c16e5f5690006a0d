"""A finished run with a tiny model: SmolLM2's tokenizer, which llama.cpp knows, and random weights."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny import chat_line, tiny_model, tiny_weights

from kolotune.cli import run_command_line
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Path:
    """A random Llama of 2 layers with SmolLM2's tokenizer and template; do not change it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model(folder, reporter)
    return folder


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the same shapes as `tiny_base`'s, with other values."""
    folder = tmp_path_factory.mktemp("other")
    tiny_weights(folder, seed=1)
    return folder / "model.safetensors"


@pytest.fixture
def write_chats(tmp_path: Path) -> Callable[..., Path]:
    """Write good chats: ``write_chats(count=3, name="chats.jsonl", first=0)``."""

    def write(count: int = 3, name: str = "chats.jsonl", first: int = 0) -> Path:
        path = tmp_path / name
        path.write_text("".join(chat_line(first + each) for each in range(count)), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, reporter: PlainReporter) -> Config:
    """The config of a finished run, from chats to Modelfiles; do not change its folder."""
    folder = tmp_path_factory.mktemp("finished")
    chats = folder / "chats.jsonl"
    chats.write_text("".join(chat_line(each) for each in range(3)), encoding="utf-8")
    options = {
        "train_data": chats,
        "base_model": str(tiny_base),
        "output_dir": folder / "run",
        "epochs": 1,
        "lora_rank": 2,
        "checkpoint_steps": 0,
        "dtype": "fp32",
        "template_date": "2026-01-02",
        "compare": False,
    }
    config = configs.resolve((options, "test", folder))
    run_pipeline(config, reporter)
    return config


@pytest.fixture(scope="session")
def finished_gguf(finished: Config) -> tuple[Path, str]:
    """The quantized GGUF of the finished run, and its SHA-256."""
    path = RunFolder(finished.output_dir).quantized("Q4_K_M")
    return path, hash_file(path)


@pytest.fixture
def run_copy(finished: Config, tmp_path: Path) -> RunFolder:
    """A copy of the finished run, to change; its config names the copy and a copy of the chats."""
    folder = tmp_path / "run"
    shutil.copytree(finished.output_dir, folder)
    shutil.copyfile(finished.train_data[0], tmp_path / "chats.jsonl")
    moved = configs.resolve(
        (configs.load_file(folder / "config.yaml"), "copy", tmp_path),
        ({"output_dir": folder, "train_data": tmp_path / "chats.jsonl"}, "copy", tmp_path),
    )
    (folder / "config.yaml").write_text(configs.dump(moved), encoding="utf-8")
    return RunFolder(folder)


@pytest.fixture
def kolotune(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Call the command line in this process: ``code, output = kolotune("status", folder)``."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*arguments: Any) -> tuple[int, str]:
        capfd.readouterr()
        code = run_command_line([str(each) for each in arguments])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)

"""What is known before training of a quantization: that it can't hold this model's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune import config as configs
from kolotune import llamacpp
from kolotune.errors import ConfigError
from kolotune.layout import RunFolder
from kolotune.records import Context
from kolotune.reporter import PlainReporter
from kolotune.stages import quantize


def context_of(base: Path, *quantizations: str) -> Context:
    folder = base.parent / "run"
    config = configs.resolve(({"quantization": quantizations, "output_dir": folder}, "test", base.parent))
    return Context(config, RunFolder(folder), base)


def test_a_model_whose_rows_are_no_whole_blocks_is_refused(
    tiny_model: Callable[..., Any], toolchain: llamacpp.Toolchain, tmp_path: Path, reporter: PlainReporter
) -> None:
    tiny_model("llama", tmp_path / "base")  # rows of 64 and 96
    context = context_of(tmp_path / "base", "Q4_K_M", "Q1_0")
    with pytest.raises(ConfigError, match=r"Q1_0: needs rows of a multiple of 128 .* has (64|96)"):
        quantize.preflight(context, reporter)
    quantize.preflight(
        dataclasses.replace(context, config=dataclasses.replace(context.config, quantization=("Q4_K_M",))), reporter
    )


def test_whole_blocks_are_taken(
    tiny_model: Callable[..., Any], toolchain: llamacpp.Toolchain, tmp_path: Path, reporter: PlainReporter
) -> None:
    tiny_model("llama", tmp_path / "base", hidden_size=128, intermediate_size=256)
    quantize.preflight(context_of(tmp_path / "base", "Q1_0"), reporter)

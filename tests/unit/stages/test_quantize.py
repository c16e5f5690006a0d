"""Quantizations that are refused before training, and the importance matrix that they are made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune import llamacpp
from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.stages import quantize


def context_of(base: Path, *quantizations: str) -> Context:
    folder = base.parent / "run"
    config = configs.resolve(({"quantization": quantizations, "output_dir": folder}, "test", base.parent))
    return Context(config, RunFolder(folder), base)


def test_rows_that_are_not_whole_blocks_are_refused(
    tiny_model: Callable[..., Any], toolchain: llamacpp.Toolchain, tmp_path: Path, reporter: PlainReporter
) -> None:
    tiny_model("llama", tmp_path / "base")  # rows of 64 and 96
    context = context_of(tmp_path / "base", "Q4_K_M", "Q1_0")
    with pytest.raises(ConfigError, match=r"Q1_0: needs a multiple of 128 .* has (64|96)"):
        quantize.preflight(context, reporter)
    quantize.preflight(
        dataclasses.replace(context, config=dataclasses.replace(context.config, quantization=("Q4_K_M",))), reporter
    )


def test_whole_blocks_are_accepted(
    tiny_model: Callable[..., Any], toolchain: llamacpp.Toolchain, tmp_path: Path, reporter: PlainReporter
) -> None:
    tiny_model("llama", tmp_path / "base", hidden_size=128, intermediate_size=256)
    quantize.preflight(context_of(tmp_path / "base", "Q1_0"), reporter)


def test_quantizations_that_need_a_matrix_are_refused_without_chats(
    toolchain: llamacpp.Toolchain, tiny_base: Path, tmp_path: Path, reporter: PlainReporter
) -> None:
    context = dataclasses.replace(context_of(tiny_base, "Q2_K", "IQ2_S"), source=tiny_base)
    with pytest.raises(ConfigError, match=r"IQ2_S: needs an importance matrix,.* trained elsewhere"):
        quantize.preflight(context, reporter)
    config = dataclasses.replace(context.config, quantization=("Q2_K",))
    quantize.preflight(dataclasses.replace(context, config=config), reporter)  # needs none


def test_a_matrix_is_made_once_for_the_same_model_and_chats(
    run_copy: RunFolder, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = configs.resolve((configs.load_file(run_copy.config), "test", run_copy.root))
    config = dataclasses.replace(saved, quantization=("Q4_K_M", "IQ2_XS", "Q3_K_M"))
    run_pipeline(config, reporter)
    record = read_record(run_copy, "quantize")
    assert record is not None and run_copy.relative(run_copy.importance_matrix) in record.outputs
    made = record.facts["made"]
    digest = record.facts["importance_matrix"]["sha256"]
    assert digest == hash_file(run_copy.importance_matrix)
    assert {name: each.get("importance_matrix") for name, each in made.items()} == {
        "Q4_K_M": None, "IQ2_XS": digest, "Q3_K_M": digest,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("the model reads training chats") == 1 and "quantizing to Q4_K_M" not in printed
    run_pipeline(config, reporter)
    assert "quantize: done before" in capsys.readouterr().out
    run_pipeline(dataclasses.replace(config, quantization=("IQ2_XS",)), reporter)
    printed = capsys.readouterr().out
    assert "quantizing to" not in printed and "reads training chats" not in printed
    run_pipeline(dataclasses.replace(config, quantization=("Q3_K_M",), importance_matrix="never"), reporter)
    assert "quantizing to Q3_K_M" in capsys.readouterr().out and not run_copy.importance_matrix.exists()
    record = read_record(run_copy, "quantize")
    assert record is not None and record.facts["made"]["Q3_K_M"]["sha256"] != made["Q3_K_M"]["sha256"]

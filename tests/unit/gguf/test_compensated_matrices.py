"""Which matrices of a model are compensated: fused ones are, those that few tokens reach stay as ggml made them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import compensation, convert
from kolotune.gguf.compensation import CompensationJob
from kolotune.gguf.model_skeleton import read_skeleton
from kolotune.gguf.quantize import quantize_file
from kolotune.gguf.run_compensation import check_possible
from kolotune.gguf.stored_values import StoredValues
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context

FUSED = "attn_qkv", "attn_output", "ffn_up", "ffn_down"
pytestmark = [pytest.mark.usefixtures("one_thread")]


def sentencepiece(folder: Path) -> None:
    """Write a tokenizer of the kind that some families' converters read."""
    import sentencepiece as library

    text = folder / "text"
    text.write_text("\n".join(f"{number} keepers of {number * 7} lights" for number in range(300)), encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=100, minloglevel=2
    )
    text.unlink()


def job_of(model: Path, target: Path, rows: list[list[int]], reporter: PlainReporter) -> CompensationJob:
    """Convert a model and quantize it to Q4_0; return how it is compensated."""
    log, source = target.with_suffix(".log"), target.with_suffix(".f16")
    plans = list(convert.tensor_plans(read_skeleton(model), "f16", log, reporter).values())
    convert.convert_folder(model, source, log, reporter, exact=False)
    quantize_file(source, target, "Q4_0", log, reporter)
    return CompensationJob(str(source), str(target), str(model), rows, plans)


def changed(job: CompensationJob) -> set[str]:
    """Compensate; return the names of the tensors that are no longer what ggml made."""
    target = Path(job.target)
    plain = target.with_suffix(".plain")
    shutil.copyfile(target, plain)
    compensation.compensate(job)
    with StoredValues(plain) as before, StoredValues(target) as after:
        return {name for name in before.tensors if before.digest(name) != after.digest(name)}


def rows_of(count: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, 90, (count, tokens)).tolist()


@pytest.mark.slow
def test_fused_matrices_are_compensated(
    tiny_model: Callable[..., Any], reporter: PlainReporter, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_model("phi3", folder, dtype="float16", pad_token_id=2, vocab_size=100)
    sentencepiece(folder)
    job = job_of(folder, tmp_path / "target.gguf", rows_of(8, 32), reporter)
    matrices = {f"blk.{layer}.{name}.weight" for layer in range(2) for name in FUSED}
    assert changed(job) == matrices


@pytest.mark.slow
def test_a_matrix_that_few_tokens_reach_stays(tiny_base: Path, reporter: PlainReporter, tmp_path: Path) -> None:
    """As many as a quarter of the columns reach those with 64, but not those with 128; so it is with a rare expert."""
    names = changed(job_of(tiny_base, tmp_path / "target.gguf", rows_of(1, 24), reporter))
    assert "blk.0.attn_q.weight" in names and "blk.1.ffn_up.weight" in names
    assert not {name for name in names if "ffn_down" in name or not name.startswith("blk.")}, "nor a tied embedding"


@pytest.mark.slow
def test_stacked_experts_are_refused_with_the_way_out(
    tiny_model: Callable[..., Any], finished: Config, reporter: PlainReporter, tmp_path: Path
) -> None:
    """Their converter stacks experts that are single matrices in the file, so there is no conversion plan."""
    folder = tmp_path / "model"
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 100}
    tiny_model("qwen2_moe", folder, dtype="bfloat16", shared_expert_intermediate_size=32, **experts)
    sentencepiece(folder)
    plans = convert.tensor_plans(read_skeleton(folder), "bf16", tmp_path / "log", reporter)
    context = Context(dataclasses.replace(finished, quantizer="compensated"), RunFolder(tmp_path), folder)
    with pytest.raises(ToolchainError, match="conversion plan") as refused:
        check_possible(context, list(plans.values()), tmp_path / "log")
    assert "--quantizer ggml" in refused.value.hint

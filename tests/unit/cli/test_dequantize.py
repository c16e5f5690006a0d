"""A quantized GGUF as a base: made by a command, trained in its blocks, and compared with itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kolotune.cli.command_line import run_command_line
from kolotune.fidelity.comparison import Comparison
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import convert
from kolotune.gguf.quantize import quantize_file
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import read_metrics
from kolotune.weights import stored_blocks


@pytest.mark.slow
def test_a_run_on_a_gguf_passes_the_comparison(
    tiny_base: Path, tmp_path: Path, write_chats: Callable[..., Path], reporter: PlainReporter
) -> None:
    convert.convert_folder(tiny_base, tmp_path / "whole.gguf", tmp_path / "log", reporter)
    quantize_file(tmp_path / "whole.gguf", tmp_path / "q.gguf", "Q4_K_M", tmp_path / "log", reporter)
    base, run = tmp_path / "base", RunFolder(tmp_path / "run")
    argv = ["dequantize", tmp_path / "q.gguf", "--base", tiny_base, "--out", base]
    assert run_command_line([*map(str, argv)]) == 0
    assert stored_blocks.has_blocks(base)
    assert run_command_line([*map(str, argv)]) != 0, "nothing is overwritten"
    options = ["--load-in-4bit", "--epochs", "1", "--quantization", "Q8_0", "--dtype", "fp32", "--eval-split", "0.3"]
    argv = ["run", write_chats(12), "--base-model", base, "--output-dir", run.root, *options]
    assert run_command_line([*map(str, argv)]) == 0
    compared = Comparison.read(run.comparison)
    first = next(line for line in read_metrics(run.metrics) if line.held_out_loss is not None)
    assert compared.base_loss == pytest.approx(first.held_out_loss, abs=1e-4), "trained on the weights that it merges"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    argv = ["dequantize", str(tmp_path / "no.gguf"), "--base", "smollm2-135m", "--out", str(tmp_path / "out")]
    assert run_command_line(argv) != 0

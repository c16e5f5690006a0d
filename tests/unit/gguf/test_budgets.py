"""Quantizing to a budget: the file keeps to it, what was chosen is kept, and nothing is measured twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import budgets, header, quantize
from kolotune.gguf.budgets import read_mixtures
from kolotune.gguf.conversion_source import check_budgets
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import read_manifest
from kolotune.run_folder.stage import Context
from kolotune.runs.verify import verify


def config_of(run: RunFolder, *quantizations: str, quantizer: str = "ggml") -> Config:
    saved = configs.resolve((configs.load_file(run.config), "test", run.root))
    changed = {"quantizer": quantizer, "quantization": quantizations}
    return dataclasses.replace(saved, **changed)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["ggml", "compensated"])
def test_a_file_within_a_size(
    quantizer: str, run_copy: RunFolder, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_copy.gguf.stat().st_size
    name = f"AUTO-{whole * 0.45 / 1e6:.3f}MB".rstrip("0")
    config = config_of(run_copy, name, quantizer=quantizer)
    run_pipeline(config, reporter)
    gguf = run_copy.quantized(name)
    assert 0.9 * 0.45 * whole < gguf.stat().st_size <= 0.45 * whole
    mixtures = read_mixtures(run_copy)
    assert mixtures is not None and mixtures.chosen[name].size == gguf.stat().st_size
    types = {tensor: info.type for tensor, info in header.read(gguf).tensors.items()}
    assert mixtures.chosen[name].types.items() <= types.items() and len(set(types.values())) > 2
    assert mixtures.curve[mixtures.knee].kl > mixtures.curve[-1].kl >= 0
    model = ExactGguf(gguf, 8)
    assert model.log_probabilities([5, 6, 7], [1, 2]).max() <= 0
    model.close()
    assert run_copy.relative(run_copy.tensor_types) in read_manifest(run_copy.manifest).artifacts
    assert verify(run_copy).differences == []
    capsys.readouterr()
    run_pipeline(config, reporter)
    assert "quantize: done before" in capsys.readouterr().out
    written, chosen = gguf.read_bytes(), run_copy.tensor_types.read_bytes()
    gguf.unlink()
    run_pipeline(config, reporter)
    assert gguf.read_bytes() == written and run_copy.tensor_types.read_bytes() == chosen
    assert "measuring what each type costs" not in capsys.readouterr().out
    run_copy.tensor_types.write_bytes(chosen.replace(b"Q8_0", b"Q4_0"))
    run_pipeline(config, reporter)
    assert gguf.read_bytes() == written and run_copy.tensor_types.read_bytes() == chosen
    run_pipeline(config_of(run_copy, "Q8_0"), reporter)
    assert not run_copy.tensor_types.exists() and not run_copy.sensitivity.exists()


@pytest.mark.slow
def test_a_file_within_a_divergence(run_copy: RunFolder, reporter: PlainReporter) -> None:
    run_pipeline(config_of(run_copy, "Q4_0"), reporter)
    tokens, log = run_copy.prepared / "train.safetensors", run_copy.log("quantize")
    bound = budgets.mean_divergence(run_copy.gguf, run_copy.quantized("Q4_0"), tokens, log)
    name = f"AUTO-KL{bound:.6f}".rstrip("0")
    run_pipeline(config_of(run_copy, name), reporter)
    mixtures = read_mixtures(run_copy)
    assert mixtures is not None
    chosen = mixtures.chosen[name]
    assert chosen.measured_kl is not None and chosen.measured_kl <= bound + 1e-6
    again = budgets.mean_divergence(run_copy.gguf, run_copy.quantized(name), tokens, log)
    assert again == pytest.approx(chosen.measured_kl)


@pytest.mark.slow
def test_a_killed_quantization_measures_nothing_twice(
    run_copy: RunFolder, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(run_copy, "AUTO-6BPW")
    real = quantize.quantize_file

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize_file", killed)
    with pytest.raises(Exception, match="stopped during quantize"):
        run_pipeline(config, reporter)
    assert run_copy.sensitivity.is_file() and not run_copy.quantized("AUTO-6BPW").exists()
    monkeypatch.setattr(quantize, "quantize_file", real)
    measured = run_copy.sensitivity.stat().st_mtime_ns
    run_pipeline(config, reporter)
    assert run_copy.sensitivity.stat().st_mtime_ns == measured
    assert run_copy.quantized("AUTO-6BPW").is_file()


def test_what_can_not_be_kept_is_refused_before_training(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    config = config_of(run_copy, "AUTO-1MB")
    context, log = Context(config, run_copy, Path(config.base_model)), tmp_path / "log"
    check_budgets(context, ["Q4_K_M"], log, reporter)
    check_budgets(context, ["AUTO-8BPW", "AUTO-KL0.1"], log, reporter)
    with pytest.raises(ConfigError, match=r"AUTO-1MB: is 1\.0 MB, and the smallest file") as raised:
        check_budgets(context, ["AUTO-1MB"], log, reporter)
    assert "auto:" in raised.value.hint and "bpw" in raised.value.hint
    with pytest.raises(ConfigError, match="trained elsewhere"):
        budgets.check_possible(dataclasses.replace(context, source=tmp_path), ["AUTO-8BPW"], [], b"", log)
    with pytest.raises(ToolchainError, match="conversion plan"):
        budgets.check_possible(context, ["AUTO-8BPW"], [], b"", log)

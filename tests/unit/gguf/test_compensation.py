"""Compensated quantization of a run: the same types and size, closer to the tuned model, and read back whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import compensation, error_feedback, header, run_compensation
from kolotune.gguf.calibration import MOST_TOKENS, ROW, calibration_rows, compensation_rows
from kolotune.gguf.conversion_source import find_compensation
from kolotune.gguf.error_feedback import InputStatistics
from kolotune.gguf.stored_values import StoredValues
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.results import quantize_facts
from kolotune.run_folder.stage import Context


def config_of(run: RunFolder, quantizer: str, *quantizations: str) -> Config:
    saved = configs.resolve((configs.load_file(run.config), "test", run.root))
    changed = {"quantizer": quantizer, "quantization": quantizations}
    return dataclasses.replace(saved, **changed)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_is_quantized_with_feedback(
    run_copy: RunFolder, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(config_of(run_copy, "ggml", "Q4_0"), reporter)
    gguf = run_copy.quantized("Q4_0")
    plain, plain_types = gguf.read_bytes(), header.read(gguf).tensors
    capsys.readouterr()
    run_pipeline(config_of(run_copy, "compensated", "Q4_0"), reporter)
    assert "quantizing to Q4_0" in capsys.readouterr().out
    written = gguf.read_bytes()
    assert len(written) == len(plain) and header.read(gguf).tensors == plain_types
    assert quantize_facts(read_record(run_copy, "quantize")).made["Q4_0"].calibration
    with StoredValues(run_copy.gguf) as source, StoredValues(gguf) as after:
        start = min(after.position(name) for name in after.tensors)
        assert written[:start] == plain[:start]
        for name, tensor in after.tensors.items():
            position = after.position(name)
            is_same = written[position : position + tensor.size] == plain[position : position + tensor.size]
            assert is_same == (not (name.startswith("blk.") and tensor.type == "Q4_0")), name
        name = "blk.0.ffn_down.weight"
        exact = np.concatenate([block for _, block in source.blocks(name)])
        rounded = np.concatenate([block for _, block in after.blocks(name)])
        assert np.abs(exact - rounded).max() < 0.3 * np.abs(exact).max()
    model = ExactGguf(gguf, 8)
    assert np.isfinite(model.log_probabilities([5, 6, 7], [1, 2])).all()
    model.close()
    run_pipeline(config_of(run_copy, "compensated", "Q4_0"), reporter)
    assert "quantize: done before" in capsys.readouterr().out
    gguf.unlink()
    run_pipeline(config_of(run_copy, "compensated", "Q4_0"), reporter)
    assert gguf.read_bytes() == written
    run_pipeline(config_of(run_copy, "ggml", "Q4_0"), reporter)
    assert gguf.read_bytes() == plain


def test_calibration_is_chats_and_the_text(run_copy: RunFolder) -> None:
    rows = calibration_rows(run_copy.prepared, run_copy.tokenizer)
    assert {len(row) for row in rows} == {ROW} and len(rows) > 18
    assert rows == calibration_rows(run_copy.prepared, run_copy.tokenizer)
    some = compensation_rows(run_copy.prepared, run_copy.tokenizer)
    assert len(some) <= MOST_TOKENS / ROW and len(some) < len(rows) and all(row in rows for row in some)
    assert some[-1] in rows[-18:], "the text"
    with pytest.raises(ArtifactError, match="is missing"):
        calibration_rows(run_copy.root / "none", run_copy.tokenizer)


def test_what_was_not_written_is_noticed(
    run_copy: RunFolder, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(run_copy, "compensated", "Q4_0")
    context = Context(config, run_copy, Path(config.base_model))
    found = find_compensation(context, tmp_path / "log", reporter)
    assert found is not None
    run_pipeline(config_of(run_copy, "ggml", "Q4_0"), reporter)
    target = run_copy.quantized("Q4_0")
    job = compensation.CompensationJob(
        str(run_copy.gguf), str(target), str(found.config), found.rows[:1], list(found.tensors)
    )
    monkeypatch.setattr(StoredValues, "digest", lambda self, name: "another")
    with pytest.raises(ArtifactError, match="is not what was written"):
        compensation.compensate(job)
    assert torch.is_grad_enabled()
    incomplete = [plan for plan in found.tensors if plan.name != "blk.1.attn_q.weight"]
    with pytest.raises(ToolchainError, match=r"layer by layer: .*layers\.1\.self_attn\.q_proj"):
        compensation.check(dataclasses.replace(job, tensors=incomplete))


def test_what_was_trained_elsewhere_is_refused(run_copy: RunFolder, tmp_path: Path) -> None:
    context = Context(config_of(run_copy, "compensated", "Q4_0"), run_copy, tmp_path, source=run_copy.adapter)
    with pytest.raises(ConfigError, match="trained elsewhere"):
        run_compensation.check_possible(context, [], tmp_path / "log")
    with pytest.raises(ToolchainError, match="conversion plan"):
        run_compensation.check_possible(dataclasses.replace(context, source=None), [], tmp_path / "log")


@pytest.mark.slow
def test_a_killed_one_resumes_behind_the_finished_matrices(
    run_copy: RunFolder, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(run_copy, "compensated", "Q4_0")
    found = find_compensation(Context(config, run_copy, Path(config.base_model)), tmp_path / "log", reporter)
    assert found is not None
    run_pipeline(config_of(run_copy, "ggml", "Q4_0"), reporter)
    plain, target = run_copy.quantized("Q4_0").read_bytes(), tmp_path / "target.gguf"
    journal = tmp_path / "journal"
    job = compensation.CompensationJob(
        str(run_copy.gguf), str(target), str(found.config), found.rows[:2], list(found.tensors), str(journal), "key"
    )
    rounded: list[str] = []
    real, dies_at = error_feedback.round_with_feedback, 0

    def counted(weight: torch.Tensor, kind: str, statistics: InputStatistics) -> tuple[np.ndarray, torch.Tensor]:
        if len(rounded) == dies_at:
            raise KeyboardInterrupt
        rounded.append(kind)
        return real(weight, kind, statistics)

    monkeypatch.setattr(error_feedback, "round_with_feedback", counted)
    files = []
    for dies_at in (99, 5, 99):  # undisturbed; killed; once more
        target.write_bytes(plain)
        rounded.clear()
        if dies_at == 5:
            with pytest.raises(KeyboardInterrupt):
                compensation.compensate(job)
        else:
            compensation.compensate(job)
        files.append((target.read_bytes(), len(rounded)))
        if len(files) == 1:
            journal.unlink()
    (whole, count), (half, _), (again, rest) = files
    assert again == whole and half not in (whole, plain)
    assert rest == count - 5 > 0


@pytest.mark.slow
def test_a_killed_one_leaves_nothing(
    run_copy: RunFolder, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pipeline(config_of(run_copy, "ggml", "Q8_0"), reporter)
    before = {path.name for path in run_copy.root.iterdir()}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_compensation.Compensation, "apply", killed)
    with pytest.raises(Exception, match="stopped during quantize"):
        run_pipeline(config_of(run_copy, "compensated", "Q4_0"), reporter)
    left = {path.name for path in run_copy.root.iterdir()} - before
    assert not {name for name in left if name.endswith(".gguf")} and not run_copy.quantized("Q4_0").exists()

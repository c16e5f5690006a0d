"""What is predicted for a type is what the model loses when a matrix is rounded to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import conversion_source, header, sensitivity
from kolotune.gguf.budgets import choice_basis
from kolotune.gguf.rounding_effects import rounding_errors
from kolotune.gguf.sensitivity import SensitivityJob
from kolotune.gguf.type_choices import read_sensitivity
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context

_PLACES = {
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    "token_embd.weight": "model.embed_tokens.weight",
}


def job_of(run: RunFolder, target: Path, reporter: PlainReporter, *, is_compensated: bool = False) -> SensitivityJob:
    saved = configs.resolve((configs.load_file(run.config), "test", run.root))
    context = Context(saved, run, Path(saved.base_model))
    plans = list(conversion_source.tensor_plans(context, target.with_suffix(".log"), reporter).values())
    rows = choice_basis(context, plans).some_rows[-2:]  # of the text: a few chats that repeat are no test
    return SensitivityJob(str(run.gguf), str(target), str(context.base), rows, plans, "", is_compensated, "key")


def divergence(model: Any, rows: list[list[int]], name: str, kind: str) -> float:
    """Return the mean KL of the model with a rounded matrix from the model as it is."""
    import torch

    ids, parameter = torch.tensor(rows), model.get_parameter(name)
    with torch.no_grad():
        before = torch.log_softmax(model(ids).logits, dim=-1)
        exact = parameter.clone()
        parameter += rounding_errors(exact.float(), kind, None)
        after = torch.log_softmax(model(ids).logits, dim=-1)
        parameter.copy_(exact)
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


@pytest.mark.slow
def test_the_prediction_is_the_divergence(run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path) -> None:
    import transformers

    library: Any = transformers
    job = job_of(run_copy, tmp_path / "measured.safetensors", reporter)
    sensitivity.measure(job)
    measured = read_sensitivity(Path(job.target), header.read(run_copy.gguf), "key")
    assert measured is not None
    model = library.AutoModelForCausalLM.from_pretrained(run_copy.merged_model, dtype="float64")
    for name, place in _PLACES.items():
        for kind in ("Q4_0", "Q5_1"):
            exact = divergence(model, job.rows, place, kind)
            assert measured.predicted({name: kind}) == pytest.approx(exact, rel=0.5), (name, kind)
    first = Path(job.target).read_bytes()
    sensitivity.measure(job)
    assert Path(job.target).read_bytes() == first
    assert read_sensitivity(Path(job.target), header.read(run_copy.gguf), "another") is None
    Path(job.target).write_bytes(first[:100])
    assert read_sensitivity(Path(job.target), header.read(run_copy.gguf), "key") is None


@pytest.mark.slow
def test_error_feedback_makes_the_predictions_smaller(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    summary, predicted = header.read(run_copy.gguf), []
    for is_compensated in (False, True):
        job = job_of(run_copy, tmp_path / f"{is_compensated}.safetensors", reporter, is_compensated=is_compensated)
        sensitivity.measure(job)
        measured = read_sensitivity(Path(job.target), summary, "key")
        assert measured is not None
        predicted.append(measured.predicted({"blk.1.ffn_down.weight": "Q4_0"}))
    assert 0 < predicted[1] < predicted[0]


def test_a_model_with_unknown_parameters_is_refused(
    run_copy: RunFolder, reporter: PlainReporter, tmp_path: Path
) -> None:
    job = job_of(run_copy, tmp_path / "measured.safetensors", reporter)
    sensitivity.check(job)
    del job.tensors[3]
    with pytest.raises(ToolchainError, match="layer by layer"):
        sensitivity.check(job)

"""Variants of LoRA: PEFT trains and merges the same, and an interrupted training gives the same bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.experts import expert_training
from support.packed_models import compare, pair_of
from support.reference_training import held_out_loss, plain_loop
from support.training import branching_chats

from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent
from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.stages import merge
from kolotune.weights.adapter import read_adapter
from kolotune.weights.model_shape import AdapterShape, read_shape

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
MakeTraining = Callable[..., Any]
CHATS = {"chats": branching_chats(9, 1), "held_out": branching_chats(4, 2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True, "lora_rank": 8},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": ["q_proj=2", "layers.0.mlp.*=6"], "alpha_pattern": ["(v|k)_proj=3"]},
    "LoRA+": {"lora_plus_ratio": 4.0, "learning_rate": 2e-3, "weight_decay": 0.1},
}

OTHERS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora", "early_stopping": 1},
}


class _Stop(Exception):
    pass


def losses(job: TrainJob) -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gemma"])  # the packed step, and transformers' model
def test_a_training_equals_pefts(kind: str, variant: str, make_training: MakeTraining) -> None:
    folder = make_training(kind, **CHATS)
    options = {"batch_size": 3, "epochs": 3, **VARIANTS[variant]}
    job, initial = folder.job(**options), folder.job("initial", **{**options, "epochs": 0})
    training.train(initial)
    training.train(job)
    curve, trained = plain_loop(job, Path(initial.adapter))
    assert len(curve) == 9 and curve[0] - min(curve) > 0.1, "nothing was learnt, so the comparison proves nothing"
    assert losses(job) == pytest.approx(curve, abs=1e-4)
    for name, tensor in weights(Path(job.adapter)).items():
        torch.testing.assert_close(tensor, trained[name], atol=2e-3, rtol=1e-3)
    wanted = held_out_loss(folder.root / "base", Path(job.adapter), Path(job.data))
    assert held_out_losses(read_metrics(Path(job.metrics)))[-1][1] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_interrupted_gives_the_same_bits(
    options: dict[str, Any], make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_training(**CHATS)
    options = {"epochs": 3, "batch_size": 3, "checkpoint_steps": 2, "lora_dropout": 0.1, **options}
    if "use_dora" in options:
        options["lora_dropout"] = 0.0
    whole, broken = folder.job("whole", **options), folder.job("broken", **options)
    training.train(whole)

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            raise _Stop

    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(events, "emit", emit)
        training.train(broken)
    training.train(dataclasses.replace(broken, resume=True))
    assert losses(broken) == losses(whole)
    ours, theirs = weights(Path(broken.adapter)), weights(Path(whole.adapter))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_rank_stabilised_step_equals_that_of_transformers(compiled: bool, make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(compile=compiled, use_rslora=True, lora_rank=9)
    packed, plain = pair_of(job)
    assert {pair.scale for pair in packed.adapters.values()} == {8 / 3}
    compare(job, packed, plain)


def test_the_rank_stabilised_adapter_merges_as_in_peft(
    tmp_path: Path, tiny_model: Callable[..., Any], make_training: MakeTraining
) -> None:
    for name, folder, targets in (
        ("llama", make_training(**CHATS), []),
        ("experts", expert_training(tmp_path / "experts", "qwen3_moe", tiny_model), ["all-experts"]),
    ):
        job = folder.job(use_rslora=True, target_parameters=targets, epochs=3)
        training.train(job)
        config = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 4, 8)
        assert {delta.scale for delta in read_adapter(Path(job.adapter)).deltas.values()} == {4.0}
        assert_merges_as_in_peft(folder, job, tmp_path / name)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_an_adapter_with_magnitudes_merges_as_in_peft(kind: str, tmp_path: Path, make_training: MakeTraining) -> None:
    folder = make_training(kind, **CHATS)
    job = folder.job(use_dora=True, epochs=3)
    training.train(job)
    read = read_adapter(Path(job.adapter))
    assert read.config.has_magnitudes and all(delta.magnitude is not None for delta in read.deltas.values())
    assert_merges_as_in_peft(folder, job, tmp_path / "merged")


PATTERNS = {"rank_pattern": ["(q|o)_proj=6", r"1\.mlp\.down_proj=1"], "alpha_pattern": ["v_proj=3", "q_proj=2.5"]}


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_ranks_and_alphas_by_pattern(
    variant: dict[str, Any], tmp_path: Path, make_training: MakeTraining, compiled: bool
) -> None:
    """In both steps, in PEFT's merge, and with the sizes that were planned."""
    folder = make_training("qwen2", **CHATS)
    job = folder.job(compile=compiled, epochs=3, **PATTERNS, **variant)
    packed, plain = pair_of(job)
    ranks = {name: len(pair.lora_A) for name, pair in packed.adapters.items()}
    assert {rank for name, rank in ranks.items() if name.endswith(("q_proj", "o_proj"))} == {6}
    assert ranks["model.layers.1.mlp.down_proj"] == 1 and ranks["model.layers.0.mlp.down_proj"] == 4
    adapter = AdapterShape.of_options(read_shape(folder.root / "base"), job)
    assert adapter.weight_count == packed.flat.parameter.numel()
    compare(job, packed, plain)
    training.train(job)
    assert_merges_as_in_peft(folder, job, tmp_path / "merged")


def test_experts_have_ranks_by_pattern_as_in_peft(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    folder = expert_training(tmp_path / "experts", "qwen3_moe", tiny_model)
    job = folder.job(target_parameters=["all-experts"], epochs=3, rank_pattern=["experts.down_proj=2", "q_proj=3"])
    training.train(job)
    assert_merges_as_in_peft(folder, job, tmp_path / "merged")


def assert_merges_as_in_peft(folder: Any, job: TrainJob, target: Path) -> None:
    """Check that the merged model computes what PEFT computes, and something else than the base."""
    adapter = Path(job.adapter)
    base = folder.root / "base"
    target.mkdir(parents=True, exist_ok=True)
    merge.merge_adapter(adapter, base, target, tokenizer=base, dtype="fp32", reporter=PlainReporter())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).eval().merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] % 96
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        wanted = merged(ids).logits
        assert (wanted - before).abs().max() > 0.05
        torch.testing.assert_close(ours(ids).logits, wanted, atol=1e-5, rtol=1e-5)

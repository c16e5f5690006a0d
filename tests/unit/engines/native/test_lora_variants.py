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

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
MakeTraining = Callable[..., Any]
CHATS = {"chats": branching_chats(9, 1), "held_out": branching_chats(4, 2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True, "lora_rank": 8},
    "LoRA+": {"lora_plus_ratio": 4.0, "learning_rate": 2e-3, "weight_decay": 0.1},
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


@pytest.mark.parametrize("options", [*VARIANTS.values(), {"neftune_noise_alpha": 5.0}], ids=[*VARIANTS, "NEFTune"])
def test_interrupted_gives_the_same_bits(
    options: dict[str, Any], make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_training(**CHATS)
    options = {"epochs": 3, "batch_size": 3, "checkpoint_steps": 2, "lora_dropout": 0.1, **options}
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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_rank_stabilised_adapter_merges_as_in_peft(
    family: str, tmp_path: Path, tiny_model: Callable[..., Any], make_training: MakeTraining
) -> None:
    if family == "llama":
        folder, targets = make_training(**CHATS), []
    else:
        folder, targets = expert_training(tmp_path / "experts", family, tiny_model), ["all-experts"]
    job = folder.job(use_rslora=True, target_parameters=targets, epochs=3)
    training.train(job)
    adapter = Path(job.adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 4, 8)
    assert {delta.scale for delta in read_adapter(adapter).deltas.values()} == {4.0}
    base = folder.root / "base"
    target = tmp_path / "merged"
    target.mkdir()
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

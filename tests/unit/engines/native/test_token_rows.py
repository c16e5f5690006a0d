"""Rows of new tokens: losses, gradients and trainings are PEFT's, with embedding and head tied or not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.packed_models import chats_of, gradients
from support.reference_training import plain_training, weights_of
from support.training import TrainingFolder, branching_chats, random_pairs

from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent
from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.model import PackedModel
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.stages import merge

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
MakeTraining = Callable[..., TrainingFolder]
TOKENS = [40, 41, 42]
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
CHATS: dict[str, Any] = {"chats": branching_chats(9, 1), "held_out": branching_chats(4, 2)}


def peft_model(job: TrainJob, tied: bool, **options: Any) -> Any:
    """Return PEFT's model with the same settings; its layers' adapters are new."""
    base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        trainable_token_indices={name: TOKENS for name in modules}, **options,
    )  # fmt: skip
    return peft.get_peft_model(base, config)


def job_of(folder: TrainingFolder, name: str = "run", **options: Any) -> TrainJob:
    return folder.job(name, target_modules=["q_proj", "down_proj"], new_tokens=TOKENS, **options)


def start_alike(model: PackedModel, theirs: Any) -> None:
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, pair in model.adapters.items():
            for part in ("lora_A", "lora_B"):
                if hasattr(pair, part):
                    if part == "lora_B":
                        getattr(pair, part).normal_(std=0.05)
                    named[f"base_model.model.{name}.{part}.default.weight"].copy_(getattr(pair, part))
    model.updated()


@TIES
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])  # also with factors of embeddings and logits
@pytest.mark.parametrize("device", [False, True], ids=["", "device"])
def test_losses_and_gradients_equal_those_of_peft(
    kind: str, device: bool, tied: bool, make_training: MakeTraining, compiled: bool
) -> None:
    folder = make_training(kind, chats=chats_of(1, 6, 12, 30), tie_word_embeddings=tied)
    job = job_of(folder, compile=compiled)
    model, theirs = PackedModel(job, operations=DeviceOperations() if device else None), peft_model(job, tied).eval()
    start_alike(model, theirs)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    loss, found = 0.0, {}
    for group in model.groups(tokens, range(len(tokens))):
        loss += float(model.backward(tokens, group, 0.1))
    total = torch.zeros(())
    for number in range(len(tokens.offsets) - 1):
        ids, labels = tokens.sequence(number)
        logits = theirs(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        total = total + (losses * weights_of(tokens, number)[1:]).sum()
    (0.1 * total).backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    found = {name: each.trainable_tokens_delta for name, each in model.adapters.items() if name.endswith("adapter")}
    assert len(found) == (1 if tied else 2)
    for name, rows in found.items():
        wanted = dict(theirs.named_parameters())[f"base_model.model.{name}.trainable_tokens_delta.default"]
        torch.testing.assert_close(rows.detach(), wanted.detach())
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(rows.grad, wanted.grad, atol=1e-5 * scale, rtol=1e-4, msg=name)
        assert (wanted.grad.abs().amax(1) > 0).sum() > 1


@TIES
def test_a_training_equals_pefts_and_merges(tied: bool, make_training: MakeTraining, tmp_path: Path) -> None:
    folder = make_training(tie_word_embeddings=tied, **CHATS)
    options = {"batch_size": 3, "epochs": 3, "use_dora": True}
    job, start = job_of(folder, **options), job_of(folder, "start", **{**options, "epochs": 0})
    training.train(start)
    training.train(job)
    base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, start.adapter, is_trainable=True).train()
    curve = plain_training(job, model)
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(curve, abs=1e-4)
    assert curve[0] - min(curve) > 0.1
    target = tmp_path / "merged"
    target.mkdir()
    merge.merge_adapter(
        Path(job.adapter), folder.root / "base", target, tokenizer=folder.root / "base", dtype="fp32",
        reporter=PlainReporter(),
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, job.adapter).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = torch.tensor([[3, 40, 41, 42, 7, 9, 40]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=5e-5, rtol=1e-5)
    stored = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    before = load_file(folder.root / "base" / "model.safetensors")["model.embed_tokens.weight"]
    changed = (stored != before).any(1).nonzero().flatten().tolist()
    assert changed == TOKENS


def test_an_interrupted_training_gives_the_same_bits(
    make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_training(**CHATS)
    options = {"epochs": 3, "batch_size": 3, "checkpoint_steps": 2, "early_stopping": 2}
    whole, broken = job_of(folder, "whole", **options), job_of(folder, "broken", **options)
    training.train(whole)

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(events, "emit", emit)
        training.train(broken)
    training.train(dataclasses.replace(broken, resume=True))
    ours, theirs = (load_file(Path(job.adapter) / "adapter_model.safetensors") for job in (broken, whole))
    assert ours.keys() == theirs.keys() and any("trainable_tokens" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_preferences_are_compared_with_the_base(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(8, 1), held_out=random_pairs(4, 2))
    job = folder.preference_job("dpo", new_tokens=[10, 11, 12])
    training.train(job)
    losses = [loss for _, loss in held_out_losses(read_metrics(Path(job.metrics)))]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.69


def test_rows_are_trained_beside_a_base_in_4_bits(make_training: MakeTraining) -> None:
    job = job_of(make_training(tie_word_embeddings=False, **CHATS), load_in_4bit=True)
    model = PackedModel(job)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    _, found = gradients(model, tokens, range(len(tokens)), 0.1)
    rows = {name: each for name, each in found.items() if "trainable" in name}
    assert len(rows) == 2 and all(float(each.abs().max()) > 0 for each in rows.values())

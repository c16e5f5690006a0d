"""A training that starts from an adapter: it continues from its weights, resumes, and has it as its reference."""

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
from safetensors.torch import load_file, save_file
from support.training import TrainingFolder, random_pairs

from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent
from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.engines.native.preference_trainer import PreferenceTrainer
from kolotune.engines.native.trainer import Trainer
from kolotune.foundation.errors import TrainingError

MakeTraining = Callable[..., TrainingFolder]


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def started(job: TrainJob, first: TrainJob) -> TrainJob:
    return dataclasses.replace(job, start_from=first.adapter, start_sha256="s")


def held_out_losses(job: TrainJob) -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gpt2", {}), ("llama", {"use_dora": True})])
def test_the_second_training_begins_where_the_first_ended(
    kind: str, options: dict[str, Any], make_training: MakeTraining
) -> None:
    """For the packed step, and for a model that transformers computes."""
    folder = make_training(kind, chats=10, held_out=4)
    first = folder.job("first", epochs=2, **options)
    second = started(folder.job("second", epochs=1, seed=99, **options), first)
    training.train(first)
    training.train(second)
    assert held_out_losses(second)[0] == pytest.approx(held_out_losses(first)[-1], abs=1e-6)
    before, after = adapter(first), adapter(second)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    still = started(folder.job("still", epochs=0, **options), first)
    training.train(still)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter(still).items())


def test_an_adapter_that_peft_saved(make_training: MakeTraining, tmp_path: Path) -> None:
    folder = make_training(held_out=3)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder.root / "base", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "theirs")
    trainer = Trainer(
        folder.job(target_modules=["q_proj", "v_proj"], start_from=str(tmp_path / "theirs"), start_sha256="s")
    )
    ids, labels = trainer.tokens.sequence(0)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
    assert float(trainer.model.loss(trainer.tokens, [0])) == pytest.approx(float(wanted), abs=1e-4)


def test_it_resumes_to_the_same_bits(make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_training(chats=10, held_out=4)
    first = folder.job("first", epochs=1)
    training.train(first)
    whole, broken = (started(folder.job(name, epochs=2, checkpoint_steps=2), first) for name in ("whole", "broken"))
    training.train(whole)

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(events, "emit", emit)
        with pytest.raises(KeyboardInterrupt):
            training.train(broken)
    training.train(dataclasses.replace(broken, resume=True))
    one, other = adapter(whole), adapter(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(TrainingError, match="start_sha256"):
        training.train(dataclasses.replace(broken, resume=True, start_sha256="another"))


def test_preferences_are_compared_with_the_adapter_that_they_start_from(make_training: MakeTraining) -> None:
    """The first loss of DPO is log 2 again; and a reference that is lost is computed with that adapter."""
    folder = make_training(chats=random_pairs(8, 1), held_out=random_pairs(4, 2))
    first = folder.preference_job("dpo", "first", epochs=2)
    training.train(first)
    second = started(folder.preference_job("dpo", "second", epochs=1), first)
    training.train(second)
    assert held_out_losses(first)[-1] < 0.69 < held_out_losses(second)[0] == pytest.approx(0.693147, abs=1e-5)
    content = Path(second.reference).read_bytes()
    assert content != Path(first.reference).read_bytes()
    Path(second.reference).unlink()
    trainer = PreferenceTrainer(second)
    trainer.prepare(lambda _: None)
    assert Path(second.reference).read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "other layers"])
def test_an_adapter_of_another_form_is_refused(damage: str, make_training: MakeTraining) -> None:
    folder = make_training()
    first = folder.job("first", epochs=1)
    training.train(first)
    file = Path(first.adapter) / "adapter_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        save_file({name: each for name, each in adapter(first).items() if "q_proj" in name}, file)
    with pytest.raises(TrainingError, match="can't be read" if damage == "cut" else "not those of an adapter"):
        training.train(started(folder.job("second"), first))

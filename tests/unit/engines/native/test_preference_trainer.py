"""Preference objectives: losses and gradients are those of the published formulas by autograd, and runs resume."""

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
from support.killed_training import kill_after
from support.training import Preference, TrainingFolder, random_chats, random_pairs, rated_answers

from kolotune.engines.job import TrainJob
from kolotune.engines.native import lora, training
from kolotune.engines.native import trainer as trainer_module
from kolotune.engines.native.checkpointer import TENSORS
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.preference_trainer import PreferenceTrainer
from kolotune.foundation.errors import TrainingError
from kolotune.foundation.objectives import OBJECTIVES as ALL_OBJECTIVES

MakeTraining = Callable[..., TrainingFolder]
PAIRED = ("dpo", "ipo", "simpo", "orpo")
OBJECTIVES = (*PAIRED, "kto")
assert set(OBJECTIVES) == {name for name, each in ALL_OBJECTIVES.items() if each.has_preferences}


def adapter_of(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def metrics(job: TrainJob) -> list[dict[str, float]]:
    """Return the lines of the metrics without what differs between runs."""
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    volatile = ("time", "tokens_per_second", "memory_mb")
    return [{name: value for name, value in line.items() if name not in volatile} for line in lines]


class Plain:
    """The objective's loss by transformers, PEFT and autograd, one sequence at a time, without packing or sharing."""

    def __init__(self, job: TrainJob, chats: list[Preference]) -> None:
        base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(base, job.adapter, is_trainable=True).eval()
        self.chats = chats
        assert job.preference is not None
        self.settings = job.preference

    def log_p(self, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
        """Return the sum of the log-probabilities of the labels, and their number."""
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        mask = torch.tensor(labels[1:])
        logs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        return (logs * mask).sum(), int(mask.sum())

    def answers(self, chat: Preference) -> list[tuple[torch.Tensor, torch.Tensor, int] | None]:
        """Return log-probability, that of the base, and number of labels of the preferred and the rejected answer."""
        sides: list[tuple[torch.Tensor, torch.Tensor, int] | None] = []
        for sequences in (chat[chat.rejected :], chat[: chat.rejected]):
            if not sequences:
                sides.append(None)
                continue
            policy = [self.log_p(*each) for each in sequences]
            with torch.no_grad(), self.model.disable_adapter():
                reference = sum((self.log_p(*each)[0] for each in sequences), torch.zeros(()))
            sides.append((sum((log for log, _ in policy), torch.zeros(())), reference, sum(n for _, n in policy)))
        return sides

    def kl(self) -> torch.Tensor:
        """Return KTO's estimate: each chat's last prompt with the next chat's last answer."""
        prompts = [chat[-1][0][: chat[-1][1].index(1)] for chat in self.chats]
        answers = [chat[-1][0][chat[-1][1].index(1) :] for chat in self.chats]
        longest = max(len(ids) for chat in self.chats for ids, _ in chat)
        gains = []
        with torch.no_grad():
            for prompt, answer in zip(prompts, [*answers[1:], answers[0]], strict=True):
                ids = (prompt + answer)[:longest]
                labels = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
                policy, _ = self.log_p(ids, labels)
                with self.model.disable_adapter():
                    gains.append(policy - self.log_p(ids, labels)[0])
        return torch.stack(gains).mean().clamp(min=0)

    def loss(self) -> torch.Tensor:
        """Return the mean loss of all chats."""
        beta, objective = self.settings.beta, self.settings.objective
        sigmoid, softplus = torch.sigmoid, torch.nn.functional.softplus
        all_answers = [self.answers(chat) for chat in self.chats]
        if objective == "kto":
            kl, losses = self.kl(), []
            for preferred, rejected in all_answers:
                if preferred:
                    gain = preferred[0] - preferred[1]
                    losses.append(self.settings.desirable_weight * (1 - sigmoid(beta * (gain - kl))))
                if rejected:
                    gain = rejected[0] - rejected[1]
                    losses.append(self.settings.undesirable_weight * (1 - sigmoid(beta * (kl - gain))))
            return torch.stack(losses).mean()
        losses, nll, labels = [], torch.zeros(()), 0
        for preferred, rejected in all_answers:
            assert preferred and rejected
            (log, base, count), (log_r, base_r, count_r) = preferred, rejected
            nll, labels = nll - log, labels + count
            if objective == "dpo":
                losses.append(softplus(-beta * ((log - log_r) - (base - base_r))))
            elif objective == "ipo":
                losses.append((((log - base) / count - (log_r - base_r) / count_r) - 1 / (2 * beta)) ** 2)
            elif objective == "simpo":
                losses.append(softplus(-(beta * (log / count - log_r / count_r) - self.settings.simpo_gamma)))
            else:
                p, p_r = (log / count).exp(), (log_r / count_r).exp()
                losses.append(beta * softplus(-(torch.log(p / (1 - p)) - torch.log(p_r / (1 - p_r)))))
        return torch.stack(losses).mean() + (nll / labels if objective == "orpo" else 0)

    def gradients(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the loss and its gradient with respect to each of the adapter's matrices, under PEFT's names."""
        loss = self.loss()
        loss.backward()
        named = self.model.named_parameters()
        return float(loss.detach()), {
            name.replace(".default", ""): each.grad
            for name, each in named
            if each.requires_grad and each.grad is not None
        }


def with_trained_adapter(folder: TrainingFolder, job: TrainJob) -> PreferenceTrainer:
    """Return a trainer whose adapter is no longer the base, and write that adapter."""
    trainer = PreferenceTrainer(job)
    trainer.prepare(lambda _: None)
    torch.manual_seed(1)
    with torch.no_grad():
        for pair in trainer.adapters.values():
            pair.lora_B.normal_(std=0.05)
    trainer.model.updated()
    training._save(trainer)
    return trainer


def chats_for(objective: str, count: int, seed: int) -> list[Preference]:
    if objective == "kto":
        return rated_answers(count, seed)
    return random_pairs(count, seed, system=12, several=True)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gradients_equal_the_published_formulas(
    objective: str, kind: str, compiled: bool, make_training: MakeTraining
) -> None:
    chats = chats_for(objective, 9, 3)
    folder = make_training(kind, chats=chats)
    trainer = with_trained_adapter(folder, folder.preference_job(objective, compile=compiled, batch_size=9))
    found = float(trainer._accumulate(range(9)))
    loss, wanted = Plain(trainer.job, chats).gradients()
    assert found == pytest.approx(loss, abs=1e-5, rel=1e-6)
    gradients = {
        f"base_model.model.{name}.{part}.weight": getattr(pair, part).grad
        for name, pair in trainer.adapters.items()
        for part in ("lora_A", "lora_B")
    }
    assert gradients.keys() == wanted.keys()
    assert max(float(each.abs().max()) for each in wanted.values()) > 1e-4, "nothing is compared"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_step_of_other_devices_has_the_same_gradients(
    make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would compute, on the CPU: attention with branches that share their prompt, in plain PyTorch."""
    folder = make_training(chats=chats_for("dpo", 9, 3))
    trainers = [with_trained_adapter(folder, folder.preference_job("dpo", batch_size=9))]
    monkeypatch.setattr(trainer_module, "open_model", lambda job, *_: PackedModel(job, "cpu", DeviceOperations()))
    trainers.append(with_trained_adapter(folder, folder.preference_job("dpo", "other", batch_size=9)))
    losses = [float(trainer._accumulate(range(9))) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(trainers[0].parameter.grad, trainers[1].parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_groups_change_nothing(objective: str, make_training: MakeTraining) -> None:
    """What is computed at once does not change the step, nor does how memory limits it."""
    folder = make_training(chats=chats_for(objective, 7, 5))
    trainer = with_trained_adapter(folder, folder.preference_job(objective, batch_size=7))
    whole = float(trainer._accumulate(range(7)))
    gradient, figures = trainer.parameter.grad.clone(), trainer.figures
    trainer.parameter.grad.zero_()
    trainer.state.halvings = [0, 0, 0]
    trainer._apply_backoff()
    assert len(trainer._groups(trainer.tokens, range(7))) == 7
    assert float(trainer._accumulate(range(7))) == pytest.approx(whole, abs=1e-6, rel=1e-6)
    torch.testing.assert_close(trainer.parameter.grad, gradient, atol=1e-5, rtol=1e-4)
    assert trainer.figures == pytest.approx(figures, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_preferred_answers_win(objective: str, make_training: MakeTraining) -> None:
    """A training raises accuracy and margin, of the step and of the held-out chats."""
    folder = make_training(chats=chats_for(objective, 40, 1), held_out=chats_for(objective, 20, 2))
    job = folder.preference_job(objective, epochs=6, batch_size=4)
    training.train(job)
    lines = metrics(job)
    held_out = [line for line in lines if "held_out_loss" in line]
    steps = [line for line in lines if "loss" in line]
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert held_out[-1]["held_out_accuracy"] >= 0.9 > held_out[0]["held_out_accuracy"]
    assert held_out[-1]["held_out_margin"] > held_out[0]["held_out_margin"]
    assert held_out[-1]["held_out_chosen_reward"] > held_out[-1]["held_out_rejected_reward"]
    if objective != "kto":  # whose steps may have answers of one side only
        assert all({"accuracy", "margin", "chosen_reward", "rejected_reward"} <= line.keys() for line in steps)
    assert all(("kl" in line) == (objective == "kto") for line in steps)


@pytest.mark.parametrize(("good", "absent"), [(True, "rejected_reward"), (False, "chosen_reward")])
def test_a_step_without_answers_of_one_side_has_no_reward_of_it(
    good: bool, absent: str, make_training: MakeTraining
) -> None:
    """A reward of 0 would say that these answers had gained nothing."""
    chats = [chat for chat in rated_answers(9, 1) if len(chat) == 1 and (chat.rejected == 0) == good]
    folder = make_training(chats=chats, held_out=rated_answers(6, 2))
    trainer = PreferenceTrainer(folder.preference_job("kto"))
    trainer.prepare(lambda _: None)
    trainer.step(range(len(chats)), 1e-3)
    present = {"chosen_reward", "rejected_reward"} - {absent}
    assert trainer.figures.keys() == {"accuracy", "kl", *present}
    assert trainer.evaluate() is not None
    assert {"held_out_margin", f"held_out_{absent}"} <= trainer.figures.keys()


def test_the_first_step_is_at_the_reference(make_training: MakeTraining) -> None:
    """Without an adapter yet, no answer has gained anything, so that the loss of DPO is log 2."""
    folder = make_training(chats=random_pairs(6, 1), held_out=random_pairs(4, 2))
    trainer = PreferenceTrainer(folder.preference_job("dpo"))
    trainer.prepare(lambda _: None)
    assert trainer.evaluate() == pytest.approx(0.693147, abs=1e-5)
    assert trainer.figures["held_out_margin"] == pytest.approx(0, abs=1e-5)
    assert trainer.step(range(6), 1e-3) == pytest.approx(0.693147, abs=1e-5)


def test_the_answers_own_loss_is_recorded(make_training: MakeTraining) -> None:
    """The mean cross-entropy of the preferred answers, which `compare` measures again."""
    held_out = random_pairs(5, 2)
    folder = make_training(chats=random_pairs(6, 1), held_out=held_out)
    trainer = with_trained_adapter(folder, folder.preference_job("dpo"))
    trainer.evaluate()
    plain = Plain(trainer.job, held_out)
    sides = [plain.answers(chat)[0] for chat in held_out]
    mean = -sum(float(side[0].detach()) for side in sides if side) / sum(side[2] for side in sides if side)
    assert trainer.figures["held_out_answer_loss"] == pytest.approx(mean, abs=1e-5)


def test_a_base_in_4_bits(make_training: MakeTraining) -> None:
    """Its own log-probabilities are the reference, so that the first loss is log 2 again; and it learns."""
    folder = make_training(chats=random_pairs(12, 1), held_out=random_pairs(4, 2))
    job = folder.preference_job("dpo", epochs=2, load_in_4bit=True, learning_rate=1e-2)
    training.train(job)
    losses = [line["held_out_loss"] for line in metrics(job) if "held_out_loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < 0.6


# --- the reference


def test_the_reference_is_computed_once(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(6, 1))
    job = folder.preference_job("dpo")
    said: list[str] = []
    PreferenceTrainer(job).prepare(said.append)
    content = Path(job.reference).read_bytes()
    PreferenceTrainer(job).prepare(said.append)
    assert len(said) == 1 and Path(job.reference).read_bytes() == content
    with_trained_adapter(folder, dataclasses.replace(job, data_sha256="other")).prepare(said.append)
    assert len(said) == 1, "it was computed for the other data before the adapter changed"


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_reference_is_computed_again(damage: str, make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(6, 1))
    job = folder.preference_job("dpo")
    trainer = with_trained_adapter(folder, job)
    path = Path(job.reference)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    trainer.prepare(said.append)
    assert said and path.read_bytes() == content, "the adapter is off while it is computed"


def test_objectives_without_a_reference_write_none(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(6, 1))
    for objective in ("simpo", "orpo"):
        training.train(folder.preference_job(objective, objective, epochs=1))
        assert not (folder.root / objective / "reference.safetensors").exists()


# --- resuming


JOB: dict[str, Any] = {"epochs": 3, "lora_dropout": 0.1, "checkpoint_steps": 2, "early_stopping": 9}


def damage_checkpoint(job: TrainJob) -> None:
    """Cut the newest checkpoint."""
    newest = max(Path(job.checkpoints).iterdir()) / TENSORS
    newest.write_bytes(newest.read_bytes()[:-20])


def damage_reference(job: TrainJob) -> None:
    """Flip a bit of the reference's log-probabilities, if the objective has some."""
    path = Path(job.reference)
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kills_and_damages_cost_steps_only(objective: str, make_training: MakeTraining) -> None:
    """Killed twice, with a damaged checkpoint, then a damaged reference, the same bits come out."""
    folder = make_training(chats=chats_for(objective, 12, 1), held_out=chats_for(objective, 6, 2))
    whole, broken = (folder.preference_job(objective, name, **JOB) for name in ("whole", "broken"))
    training.train(whole)
    for step, damage in ((4, damage_checkpoint), (11, damage_reference)):
        kill_after(dataclasses.replace(broken, resume=True), step)
        damage(broken)
    training.train(dataclasses.replace(broken, resume=True))
    one, other = adapter_of(broken), adapter_of(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(broken) == metrics(whole) and len(metrics(whole)) == 22
    has_reference = ALL_OBJECTIVES[objective].has_reference
    assert Path(whole.reference).exists() == Path(broken.reference).exists() == has_reference
    if has_reference:
        assert Path(broken.reference).read_bytes() == Path(whole.reference).read_bytes()


def test_another_objective_is_refused_on_resume(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_pairs(6, 1))
    training.train(folder.preference_job("dpo", epochs=1))
    with pytest.raises(TrainingError, match="preference"):
        training.train(folder.preference_job("dpo", beta=0.3, epochs=1, resume=True))


def test_accuracy_decides_what_is_kept(make_training: MakeTraining) -> None:
    """The kept adapter is that of the best accuracy, and among equals that of the lowest loss."""
    folder = make_training(chats=random_pairs(20, 1), held_out=random_pairs(12, 9))
    job = folder.preference_job("dpo", epochs=6, early_stopping=6, learning_rate=2e-2)
    training.train(job)
    evaluations = [line for line in metrics(job) if "held_out_loss" in line]
    best = max(evaluations, key=lambda line: (line["held_out_accuracy"], -line["held_out_loss"]))
    trainer = PreferenceTrainer(folder.preference_job("dpo", "other"))
    trainer.prepare(lambda _: None)
    lora.load_tensors(trainer.adapters, adapter_of(job))
    trainer.model.updated()
    assert trainer.evaluate() == pytest.approx(best["held_out_loss"], rel=1e-6)
    assert trainer.accuracy == best["held_out_accuracy"]


# --- what is refused


def test_chats_without_a_rejected_answer_are_refused(make_training: MakeTraining) -> None:
    folder = make_training(chats=random_chats(6, 1))
    with pytest.raises(TrainingError, match="no pairs"):
        PreferenceTrainer(folder.preference_job("dpo"))


def test_a_model_that_transformers_computes_is_refused(make_training: MakeTraining) -> None:
    folder = make_training("gpt2", chats=random_pairs(6, 1))
    with pytest.raises(TrainingError, match="packed step only"):
        PreferenceTrainer(folder.preference_job("dpo"))

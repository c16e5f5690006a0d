"""Losses and gradients of the preference objectives, compared with TRL's own trainers in their environment.

``KOLOTUNE_TRL`` names the Python of an environment with ``bench/peers/trl.txt``; by default it is the one that the
benchmarks have made.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from safetensors.torch import load_file
from support.training import Preference, TrainingFolder, random_pairs, rated_answers

from kolotune.engines.native import training
from kolotune.engines.native.preference_trainer import PreferenceTrainer

MakeTraining = Callable[..., TrainingFolder]
_PEER = Path(__file__).parents[4] / "bench" / "peers" / "trl_preferences.py"
_MADE = Path(platformdirs.user_cache_dir("kolotune-bench", appauthor=False), "trl", "bin", "python")
_PYTHON = Path(os.environ.get("KOLOTUNE_TRL", _MADE))


def split(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the prompt and the answer of a sequence."""
    return ids[: labels.index(1)], ids[labels.index(1) :]


def pair_of(chat: Preference) -> dict[str, list[int]]:
    """Return a pair of one sequence each, as TRL has it: both answers follow one prompt."""
    (rejected_prompt, rejected), (prompt, chosen) = (split(list(ids), list(labels)) for ids, labels in chat)
    assert prompt == rejected_prompt
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rated(chats: list[Preference]) -> list[dict[str, Any]]:
    """Return labelled answers, each with that of the next chat, with which the divergence is estimated."""
    parts = [split(list(chat[0][0]), list(chat[0][1])) for chat in chats]
    longest = max(len(prompt) + len(answer) for prompt, answer in parts)
    others = [answer for _, answer in parts[1:]] + [parts[0][1]]
    return [
        {
            "prompt": prompt, "completion": answer, "kl_completion": other[: longest - len(prompt)],
            "label": chat.rejected == 0,
        }
        for chat, (prompt, answer), other in zip(chats, parts, others, strict=True)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not _PYTHON.is_file(), reason="TRL's environment is not there")
@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_loss_and_gradients_are_those_of_trl(objective: str, make_training: MakeTraining, tmp_path: Path) -> None:
    if objective == "kto":
        chats = [chat for chat in rated_answers(14, 3) if len(chat) == 1]
        described = rated(chats)
    else:
        chats = random_pairs(8, 3, system=12)
        described = [pair_of(chat) for chat in chats]
    folder = make_training(chats=chats)
    trainer = PreferenceTrainer(folder.preference_job(objective, batch_size=len(chats)))
    trainer.prepare(lambda _: None)
    torch.manual_seed(1)
    with torch.no_grad():
        for pair in trainer.adapters.values():
            pair.lora_B.normal_(std=0.05)
    trainer.model.updated()
    training._save(trainer)
    loss = float(trainer._accumulate(range(len(chats))))
    settings = trainer.job.preference
    assert settings is not None
    task = {
        "base": trainer.job.base_model,
        "adapter": trainer.job.adapter,
        "objective": objective,
        "beta": settings.beta,
        "gamma": settings.simpo_gamma,
        "desirable_weight": settings.desirable_weight,
        "undesirable_weight": settings.undesirable_weight,
        "chats": described,
        "out": str(tmp_path / "gradients.safetensors"),
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([_PYTHON, "-I", _PEER, tmp_path / "task.json"], check=True, env=environment)
    wanted = load_file(tmp_path / "gradients.safetensors")
    assert loss == pytest.approx(json.loads((tmp_path / "gradients.json").read_text())["loss"], abs=1e-5)
    gradients = {
        f"base_model.model.{name}.{part}.weight": getattr(pair, part).grad
        for name, pair in trainer.adapters.items()
        for part in ("lora_A", "lora_B")
    }
    assert gradients.keys() == wanted.keys()
    assert max(float(each.abs().max()) for each in wanted.values()) > 1e-4, "nothing is compared"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)

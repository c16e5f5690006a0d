"""Modules that are trained whole beside the adapters: equal to PEFT's, tied ones too, and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.lora_parity import measure_parity
from support.training import TrainingFolder, branching_chats

from kolotune.engines.native import training
from kolotune.engines.native.lora_variants import check_variant
from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError

MakeTraining = Callable[..., TrainingFolder]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("modules", "is_tied"), [(["lm_head"], True), (["norm", "embed_tokens"], True), (["embed_tokens"], False)]
)
def test_embedding_and_head(modules: list[str], is_tied: bool, make_training: MakeTraining, tmp_path: Path) -> None:
    """Training is compared with PEFT's in `test_lora_variants`; here it is what becomes of weights that are tied."""
    folder = make_training(chats=branching_chats(6, 1), tie_word_embeddings=is_tied)
    job = folder.job(batch_size=3, epochs=2, learning_rate=2e-3, modules_to_save=modules)
    found = measure_parity(job, tmp_path)
    assert found.changed > 1e-2 and max(found.forward, found.merge) < 2e-5, found
    config = json.loads((Path(job.adapter) / "adapter_config.json").read_text("utf-8"))
    # Names by which PEFT finds these and no others: "norm" would be all norms.
    named = ["model.norm", "embed_tokens"] if "norm" in modules else ["embed_tokens"]
    assert sorted(config["modules_to_save"]) == sorted(named) and config.get("ensure_weight_tying", False) is is_tied
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in merged) is not is_tied


def test_a_resumed_training_ends_the_same(make_training: MakeTraining) -> None:
    folder = make_training(chats=branching_chats(6, 1), held_out=branching_chats(3, 2))
    options: dict[str, Any] = {
        "batch_size": 3,
        "modules_to_save": ["norm", "lm_head"],
        "learning_rate": 2e-3,
        "scheduler_type": "constant",
        "warmup_steps": 0,
    }
    whole, first = folder.job("whole", epochs=2, **options), folder.job("parts", epochs=1, **options)
    training.train(whole)
    training.train(first)
    training.train(folder.job("parts", epochs=2, resume=True, **options))
    tensors = [load_file(Path(job.adapter) / "adapter_model.safetensors") for job in (whole, first)]
    assert "base_model.model.model.norm.weight" in tensors[0] and tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["nothing"]}, "the base has no such module"),
        ({"modules_to_save": ["q_proj"]}, "it gets an adapter"),
        ({"modules_to_save": ["norm"], "objective": "dpo"}, "preferences"),
        ({"modules_to_save": ["norm"], "load_in_4bit": True}, "load-in-4bit"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tiny_base: Path, tmp_path: Path) -> None:
    config = configs.resolve((options, "test", tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_variant(config, tiny_base, is_sharded=False)

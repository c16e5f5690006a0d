"""Options are translated to torchtune's config; options that it does not have are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.training import TrainingFolder

from kolotune.engines.torchtune import recipe_config
from kolotune.engines.torchtune.architecture import CONFIGS, Llama
from kolotune.engines.torchtune.recipe_config import AdaptedLayers
from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError

TINY = Llama(96, 2, 4, 2, 64, 96, 512, 1e-6, 10000.0, 1.0, True)
UNTIED = Llama(96, 2, 4, 2, 64, 96, 512, 1e-6, 10000.0, 1.0, False)
EIGHT_B, THREE_B, ONE_B = CONFIGS
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]


def config_of(**options: Any) -> Any:
    return configs.resolve(({"engine": "torchtune", **options}, "test", Path("/")))


@pytest.mark.parametrize(
    ("names", "attention", "mlp"),
    [
        (["all-linear"], ALL, True),
        (
            ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            ["q_proj", "v_proj", "output_proj"],
            True,
        ),
        (["k_proj"], ["k_proj"], False),
    ],
)
def test_targets(names: list[str], attention: list[str], mlp: bool) -> None:
    assert recipe_config.adapted_layers(names, TINY) == AdaptedLayers(attention, mlp, False)


def test_the_head_of_an_untied_model() -> None:
    assert recipe_config.adapted_layers(["q_proj", "lm_head"], UNTIED) == AdaptedLayers(["q_proj"], False, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scheduler_type": "linear"}, "cosine"),
        ({"scheduler_type": "constant"}, "cosine"),
        ({"early_stopping": 2}, "early-stopping"),
        ({"use_rslora": True}, "alpha / rank"),
        ({"use_dora": True}, "plain LoRA"),
        ({"init_lora_weights": "olora"}, "as nothing"),
        ({"rank_pattern": ["q_proj=8"]}, "one rank"),
        ({"lora_plus_ratio": 4}, "one learning rate"),
        ({"neftune_noise_alpha": 5}, "noise"),
        ({"target_modules": "gate_proj,up_proj,down_proj"}, "q_proj, k_proj, v_proj, o_proj"),
        ({"target_modules": "q_proj,gate_proj"}, "together or not at all"),
        ({"target_modules": "q_proj,c_attn"}, "c_attn"),
        ({"target_modules": "q_proj,lm_head"}, "embedding"),
        ({"load_in_4bit": True}, "16384"),
    ],
)
def test_unsupported_options_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        recipe_config.check(config_of(**change), TINY)
    assert reason in raised.value.cause and raised.value.hint


def test_several_processes_always_shard_the_base() -> None:
    assert config_of(nproc=2).sharding == "auto"
    with pytest.raises(ConfigError, match="sharding"):
        config_of(nproc=2, sharding="off")


def test_a_4_bit_base_is_sharded_in_whole_blocks() -> None:
    recipe_config.check(config_of(nproc=2), ONE_B)
    recipe_config.check(config_of(nproc=3), TINY)
    with pytest.raises(ConfigError, match=r"4 bits.* over 3 processes"):
        recipe_config.check(config_of(nproc=3), ONE_B)


@pytest.mark.parametrize("shape", [TINY, UNTIED, ONE_B, THREE_B, EIGHT_B])
def test_the_defaults_are_accepted(shape: Llama) -> None:
    recipe_config.check(config_of(), shape)


def test_every_option_reaches_torchtune(tmp_path: Path) -> None:
    job = TrainingFolder(tmp_path).job(
        epochs=5, learning_rate=3e-4, weight_decay=0.02, batch_size=6, gradient_accumulation=7, max_grad_norm=0.5,
        seed=11, lora_rank=12, lora_alpha=13.5, lora_dropout=0.14, dtype="bf16",
    )  # fmt: skip
    found = recipe_config.make_config(job, TINY, warmup_steps=15)
    assert {name: found[name] for name in ("epochs", "batch_size", "gradient_accumulation_steps", "seed", "dtype")} == {
        "epochs": 5, "batch_size": 6, "gradient_accumulation_steps": 7, "seed": 11, "dtype": "bf16",
    }  # fmt: skip
    assert (found["optimizer"]["lr"], found["optimizer"]["weight_decay"]) == (3e-4, 0.02)
    assert (found["clip_grad_norm"], found["lr_scheduler"]["num_warmup_steps"]) == (0.5, 15)
    model = found["model"]
    assert (model["lora_rank"], model["lora_alpha"], model["lora_dropout"]) == (12, 13.5, 0.14)
    assert model["_component_"].endswith("lora_llama3_2") and model["scale_factor"] == 1.0
    # Options that are always the same.
    assert found["dataset"]["packed"] is False and found["enable_activation_checkpointing"] is True
    assert found["optimizer"]["_component_"] == "torch.optim.AdamW"
    assert found["loss"]["_component_"].endswith("CEWithChunkedOutputLoss")


def test_no_clipping_is_none_in_torchtunes_config(tmp_path: Path) -> None:
    assert recipe_config.make_config(TrainingFolder(tmp_path).job(max_grad_norm=0.0), TINY, 0)["clip_grad_norm"] is None


def test_torchtunes_own_config_is_used_where_it_has_one(tmp_path: Path) -> None:
    job = TrainingFolder(tmp_path).job(target_modules=["q_proj", "o_proj"])
    for shape in (ONE_B, THREE_B, EIGHT_B):
        model = recipe_config.make_config(job, shape, 0)["model"]
        assert model["lora_attn_modules"] == ["q_proj", "output_proj"]
        assert "_component_" not in model and "quantize_base" not in model and "vocab_size" not in model
    assert recipe_config.make_config(job, UNTIED, 0)["model"]["_component_"].endswith("llama3_1.lora_llama3_1")


def test_the_config_contains_no_text_of_the_user(tmp_path: Path) -> None:
    planted = "${oc.env:PATH}"
    names = ("base_model", "base_name", "base_sha256", "data", "data_sha256", "adapter", "checkpoints", "metrics")
    job = TrainingFolder(tmp_path).job(**{name: f"/{planted}/{name}" for name in names})
    for shape in (TINY, UNTIED, ONE_B):
        assert "${" not in json.dumps(recipe_config.make_config(job, shape, 0))

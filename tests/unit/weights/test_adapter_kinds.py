"""Adapters that can't be merged are refused by the name of their method, and the hint is one that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from kolotune.foundation.errors import ModelError
from kolotune.weights.adapter_config import read_adapter_config
from kolotune.weights.adapter_kinds import METHODS, Instead, refused_initialisation

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def refusal(folder: Path, **config: Any) -> ModelError:
    """Return the error; no weights exist, so it comes before anything else is read."""
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        read_adapter_config(folder)
    return caught.value


@pytest.mark.parametrize("method", sorted(peft.PeftType, key=str), ids=lambda method: method.value)
def test_every_method_of_peft_is_merged_or_refused_by_name(method: peft.PeftType, tmp_path: Path) -> None:
    if method is peft.PeftType.LORA:
        return
    error = refusal(tmp_path, peft_type=method.value)
    assert METHODS[method.value].name in error.cause
    assert ("merge_and_unload" in error.hint) == (METHODS[method.value].instead is Instead.PEFT)


def test_where_peft_is_named_it_can_merge() -> None:
    """The methods of which PEFT's model has nothing to merge are those that are said to have nothing."""
    assert set(METHODS) >= {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"LORA"}
    prompts = {
        kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
    }
    others = PEFT_TYPE_TO_TUNER_MAPPING.items()
    unmergeable = {kind.value for kind, tuner in others if not hasattr(tuner, "merge_and_unload")}
    nothing = {kind for kind, method in METHODS.items() if method.instead is Instead.NOTHING}
    assert prompts | unmergeable <= nothing


@pytest.mark.parametrize(
    ("initialisation", "name", "words"),
    [
        ("pissa_niter_16", "PiSSA", "path_initial_model_for_weight_conversion"),
        ("corda", "CorDA", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "LoRA-GA", "path_initial_model_for_weight_conversion"),
        ("loftq", "LoftQ", "merge_and_unload"),
        ("of next year", "of next year", "merge_and_unload"),
    ],
)
def test_an_initialisation_that_changes_the_base(initialisation: str, name: str, words: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, init_lora_weights=initialisation)
    assert name in error.cause and words in error.hint


@pytest.mark.parametrize(
    "initialisation", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora"]
)
def test_an_initialisation_that_leaves_the_base_alone_or_can_be_computed_again(initialisation: Any) -> None:
    assert refused_initialisation(initialisation) is None


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("use_qalora", True, "QA-LoRA"),
        ("kasa_config", {"beta": 1e-4}, "KaSA"),
        ("layer_replication", [[0, 2], [1, 2]], "replicated layers"),
        ("megatron_config", {"hidden_size": 1}, "Megatron"),
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
    ],
)
def test_a_variant_of_lora(option: str, value: Any, name: str, tmp_path: Path) -> None:
    assert name in refusal(tmp_path, **{option: value}).cause


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM"])
def test_an_adapter_of_another_task(task: str, tmp_path: Path) -> None:
    assert task in refusal(tmp_path, task_type=task).cause


def test_every_variant_of_lora_is_known() -> None:
    """A field of PEFT's config that this list does not have may change what an adapter computes."""
    assert {field for field in peft.LoraConfig.__dataclass_fields__} == {
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
        "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size",
        "r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
    }  # fmt: skip

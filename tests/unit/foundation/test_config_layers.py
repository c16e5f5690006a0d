"""Defaults that depend on other options: of an engine and of an objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.configs import HERE, flags, write_yaml

from kolotune.foundation.config import OPTIONS, Config, dump, load_file, plain_values, resolve
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.objectives import LOSS_OPTIONS, OBJECTIVES


def test_torchtune_has_the_defaults_of_the_scripts_it_replaces() -> None:
    found = resolve(flags(engine="torchtune"))
    original = {
        "epochs": 3, "batch_size": 1, "gradient_accumulation": 1, "lora_rank": 16, "lora_alpha": 16.0,
        "learning_rate": 1e-4, "warmup_steps": 100, "scheduler_type": "cosine", "weight_decay": 0.01,
        "max_grad_norm": 0.0, "checkpoint_steps": 0,
        "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip
    assert {name: getattr(found, name) for name in original} == original
    rest = set(OPTIONS) - set(original) - {"engine"}
    assert {name: getattr(found, name) for name in rest} == {name: getattr(resolve(), name) for name in rest}


@pytest.mark.parametrize("name", sorted(ENGINES["torchtune"].defaults))
def test_explicit_values_override_the_defaults_of_an_engine(name: str) -> None:
    native = getattr(Config(), name)
    if native is not None:  # the native default, given explicitly
        assert getattr(resolve(flags(engine="torchtune", **{name: native})), name) == native


def test_the_engine_may_come_from_any_layer() -> None:
    assert resolve(({"engine": "torchtune"}, "file", HERE), flags(epochs=1)).batch_size == 1
    assert resolve(({"engine": "torchtune"}, "file", HERE), flags(engine="native")).batch_size is None


def test_changing_the_engine_of_a_saved_run_changes_only_the_engine(tmp_path: Path) -> None:
    """A saved config has every option, so the rest stays as it was."""
    saved = resolve(flags(engine="native", warmup_steps=7, batch_size=3))
    layer = (load_file(write_yaml(tmp_path, dump(saved))), "saved", tmp_path)
    changed = resolve(layer, flags(engine="torchtune"))
    assert changed == dataclasses.replace(saved, engine="torchtune")
    layer = (load_file(write_yaml(tmp_path, dump(changed))), "saved", tmp_path)
    assert resolve(layer) == changed and resolve(layer, flags(engine="native")) == saved


def test_automatic_values_become_those_of_the_new_engine() -> None:
    """They have no value that a saved config could give."""
    layer = ({"engine": "native", "lora_rank": 4}, "saved", HERE)
    native, torchtune = resolve(layer), resolve(layer, flags(engine="torchtune"))
    assert (native.warmup_steps, native.batch_size) == (None, None)
    assert (torchtune.warmup_steps, torchtune.batch_size, torchtune.lora_rank) == (100, 1, 4)


# --- objectives


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beta": 0.1}, "beta: objective sft has no such number"),
        ({"objective": "dpo", "simpo_gamma": 1.0}, "train with objective simpo"),
        ({"objective": "simpo", "desirable_weight": 2.0}, "desirable-weight: objective simpo"),
        ({"objective": "orpo", "undesirable_weight": 0.0}, "train with objective kto"),
        ({"objective": "kto", "simpo_gamma": 0.0}, "simpo-gamma: objective kto"),
        ({"objective": "kto", "desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing would be learned"),
        ({"objective": "dpo", "split_thoughts": True}, "split-thoughts: preferences"),
        ({"objective": "kto", "train_on": "last"}, "train-on: preferences"),
        ({"objective": "text", "train_on": "last"}, "train-on: a plain text has no answers"),
        ({"objective": "text", "fix_turns": True}, "fix-turns: a plain text has no turns"),
        ({"objective": "text", "system": "Be brief."}, "system: a model of plain text"),
        ({"objective": "text", "beta": 0.1}, "beta: objective text has no such number"),
        ({"objective": "text", "map": "question=title"}, "map: objective text reads nothing but a text"),
        ({"map": "text=body"}, "map: only objective text"),
    ],
)
def test_options_that_an_objective_has_not_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(flags(**given))
    assert said in raised.value.cause


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_options_of_an_objective_are_taken_and_defaults_are_no_mistake(objective: str) -> None:
    values = {"beta": 0.3, "simpo_gamma": 0.0, "desirable_weight": 0.0, "undesirable_weight": 2.0}
    own = {name: values[name] for name in OBJECTIVES[objective].loss_options}
    config = resolve(flags(objective=objective, **own))
    assert all(getattr(config, name) == value for name, value in own.items())
    resolve(({**plain_values(resolve(), LOSS_OPTIONS), "objective": objective}, "saved", HERE))
    assert set(own) <= set(LOSS_OPTIONS)


def test_another_objective_drops_the_numbers_that_it_has_not() -> None:
    """A saved config gives them, and nothing on a command line could take back a beta."""
    saved = ({"objective": "kto", "beta": 0.3, "desirable_weight": 2.0}, "saved", HERE)
    assert resolve(saved, flags(objective="sft")) == resolve()
    config = resolve(saved, flags(objective="dpo"))
    assert (config.beta, config.desirable_weight) == (0.3, 1.0)
    assert resolve(saved, flags(objective="kto")).desirable_weight == 2.0
    with pytest.raises(ConfigError, match="desirable-weight: objective dpo"):
        resolve(saved, flags(objective="dpo", desirable_weight=2.0))

"""`--start-from`: what the adapter decides, what is refused, and a whole run after another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from kolotune.cli.options import resolve_flags
from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, KolotuneError, ModelError
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.choices import follow_start
from kolotune.pipeline.run import run_pipeline
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record
from kolotune.run_folder.stage import Context
from kolotune.runs.verify import verify
from kolotune.stages import train
from kolotune.sweeping.space import with_values
from kolotune.weights.starting_adapter import read_starting_adapter


def write_adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    names = [f"base_model.model.model.layers.0.self_attn.{leaf}.lora_{part}.weight"
             for leaf in ("v_proj", "q_proj") for part in "AB"]  # fmt: skip
    save_file({name: torch.ones(8, 8) for name in names}, folder / "adapter_model.safetensors")
    return folder


def config_of(folder: Path, **options: Any) -> Config:
    return configs.resolve((options, "test", folder))


def followed(config: Config, folder: Path) -> Config:
    return follow_start(Context(config, RunFolder(folder / "run"), folder / "base")).config


def test_rank_alpha_and_layers_come_from_the_adapter(tmp_path: Path) -> None:
    start = write_adapter(tmp_path / "adapter")
    config = followed(config_of(tmp_path, start_from="adapter"), tmp_path)
    assert config.start_from == start
    assert (config.lora_rank, config.lora_alpha, config.target_modules) == (8, 12.0, ("q_proj", "v_proj"))
    assert config.target_parameters == ("none",)
    assert followed(config, tmp_path) == config, "the saved options are no contradiction"
    assert followed(config_of(tmp_path), tmp_path) == config_of(tmp_path)


def test_the_variant_comes_from_the_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "stabilised", use_rslora=True)
    write_adapter(tmp_path / "magnitudes", use_dora=True)
    write_adapter(tmp_path / "plain")
    config = followed(config_of(tmp_path, start_from="stabilised"), tmp_path)
    assert config.use_rslora and followed(config, tmp_path) == config
    assert followed(config_of(tmp_path, start_from="magnitudes"), tmp_path).use_dora
    write_adapter(tmp_path / "patterns", rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3.5})
    config = followed(config_of(tmp_path, start_from="patterns"), tmp_path)
    assert (config.rank_pattern, config.alpha_pattern) == (("q_proj=4",), ("v_proj=3.5",))
    assert followed(config, tmp_path) == config
    with pytest.raises(ConfigError, match="the adapter's rank-pattern is none"):
        followed(config_of(tmp_path, start_from="plain", rank_pattern=["q_proj=4"]), tmp_path)
    with pytest.raises(ConfigError, match="the adapter's use-rslora is off"):
        followed(config_of(tmp_path, start_from="plain", use_rslora=True), tmp_path)


def test_a_run_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outputs" / "adapter")
    assert config_of(tmp_path, start_from="outputs").start_from == tmp_path / "outputs" / "adapter"


@pytest.mark.parametrize(
    "given",
    [
        {"lora_rank": 4}, {"lora_alpha": 3.0}, {"target_modules": "q_proj"}, {"target_parameters": "all-experts"},
        # What nobody would have had to give is no less a wish.
        {"lora_rank": 16}, {"lora_alpha": 32.0}, {"use_rslora": False}, {"target_modules": "all-linear"},
    ],
)  # fmt: skip
def test_other_forms_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", use_rslora="use_rslora" in given)
    with pytest.raises(ConfigError, match="start-from: the adapter's") as caught:
        followed(config_of(tmp_path, start_from="adapter", **given), tmp_path)
    (name,) = given
    assert f"--{name.replace('_', '-')}" in caught.value.hint


def test_what_agrees_may_be_given(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    given = {"lora_rank": 8, "target_modules": "v_proj,q_proj", "target_parameters": "auto"}
    config = followed(config_of(tmp_path, start_from="adapter", **given), tmp_path)
    assert config == followed(config_of(tmp_path, start_from="adapter"), tmp_path)


def test_what_nobody_gave_is_no_wish_wherever_it_was_saved(tmp_path: Path) -> None:
    """A config for another machine, one of a run, and the trials of a sweep."""
    write_adapter(tmp_path / "adapter")
    config = config_of(tmp_path, start_from="adapter")
    for saved in (config, followed(config, tmp_path)):
        again = configs.resolve((yaml.safe_load(configs.dump(saved)), "saved", tmp_path))
        assert followed(again, tmp_path) == followed(config, tmp_path)
    assert followed(with_values(config, {"epochs": 2}), tmp_path).lora_rank == 8
    with pytest.raises(ConfigError, match="lora-rank is 8"):
        followed(with_values(config, {"lora_rank": 16}), tmp_path)


def test_an_earlier_run_in_the_folder_is_no_wish(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(configs.dump(config_of(tmp_path)), encoding="utf-8")
    flags = {"start_from": str(tmp_path / "adapter")}
    config = followed(resolve_flags(flags, saved=tmp_path / "config.yaml"), tmp_path)
    assert (config.lora_rank, config.lora_alpha) == (8, 12.0)
    with pytest.raises(ConfigError, match="lora-rank is 8"):
        followed(resolve_flags({**flags, "lora_rank": "16"}, saved=tmp_path / "config.yaml"), tmp_path)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained whole"),
        ({"trainable_token_indices": [1]}, "rows of its embeddings"),
        ({"init_lora_weights": "olora"}, "PiSSA, OLoRA"),
    ],
)
def test_adapters_that_are_more_than_plain_lora_are_refused(
    setting: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", **setting)
    with pytest.raises(KolotuneError, match=reason):
        read_starting_adapter(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no adapter"):
        read_starting_adapter(tmp_path / "empty")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    write_adapter(tmp_path / "adapter", base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    config = config_of(tmp_path, start_from="adapter", base_model="smollm2-135m")
    with pytest.raises(ConfigError, match=r"was trained on Qwen/Qwen2\.5-0\.5B, not on smollm2-135m"):
        train.check(Context(config, RunFolder(tmp_path / "run"), tiny_base))


@pytest.mark.slow
def test_a_run_after_a_run(tmp_path: Path, tiny_base: Path, reporter: PlainReporter) -> None:
    """The second run starts from the first one's adapter, is exported as usual, and passes the gate."""
    chats = [
        {"messages": [{"role": "user", "content": f"number {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    options = {
        "train_data": tmp_path / "chats.jsonl", "base_model": str(tiny_base), "eval_split": 0.2, "dtype": "fp32",
        "compile": "off", "lora_rank": 4, "lora_alpha": 6.0, "epochs": 1, "learning_rate": 1e-3, "compare_answers": 1,
    }  # fmt: skip
    run_pipeline(config_of(tmp_path, output_dir=tmp_path / "first", **options), reporter)
    more = {name: value for name, value in options.items() if not name.startswith("lora")}
    second = config_of(tmp_path, output_dir=tmp_path / "second", start_from=tmp_path / "first", **more)
    run = run_pipeline(second, reporter)
    first_record, record = (read_record(RunFolder(tmp_path / name), "train") for name in ("first", "second"))
    assert first_record is not None and record is not None
    assert record.facts["first_held_out_loss"] == pytest.approx(first_record.facts["held_out_loss"], abs=1e-5)
    assert record.options["lora_rank"] == 4 and train.START_INPUT in record.inputs
    assert (run.root / "MergedQ4_K_M.gguf").is_file() and run.comparison.is_file()
    assert verify(run).differences == []
    (tmp_path / "first" / "adapter" / "adapter_model.safetensors").write_bytes(b"changed")
    assert verify(run).differences != []

"""The train stage: fingerprint and preflight depend on the engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.training import write_tokens

from kolotune.engines.engine import get_engine
from kolotune.engines.job import TrainJob
from kolotune.engines.torchtune import environment
from kolotune.foundation import config as configs
from kolotune.foundation import hardware
from kolotune.foundation.errors import ConfigError, ModelError
from kolotune.run_folder.layout import TRAIN_TOKENS, RunFolder
from kolotune.run_folder.stage import Context
from kolotune.stages import train

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip


def context_of(folder: Path, base: dict[str, Any], **options: Any) -> Context:
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(base), encoding="utf-8")
    config = configs.resolve((options, "test", folder))
    return Context(config, RunFolder(folder / "run"), folder / "base")


def test_the_fingerprint_names_torchtunes_environment_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    native, torchtune = (configs.resolve(({"engine": name}, "test", tmp_path)) for name in ("native", "torchtune"))
    assert "torchtune_environment" not in train.options(native)
    assert train.options(torchtune)["torchtune_environment"] == environment.pinned()
    assert not list(tmp_path.iterdir()), "only looked at"


@pytest.mark.parametrize(
    ("base", "options", "kind", "reason"),
    [
        ({**LLAMA, "architectures": ["Qwen2ForCausalLM"]}, {}, ModelError, "Qwen2ForCausalLM"),
        ({**LLAMA, "attention_bias": True}, {}, ModelError, "attention_bias"),
        (LLAMA, {"scheduler_type": "linear"}, ConfigError, "cosine"),
        (LLAMA, {"early_stopping": 1}, ConfigError, "early-stopping"),
        (LLAMA, {"objective": "dpo"}, ConfigError, "objective dpo: torchtune's recipe"),
        (LLAMA, {"target_modules": "q_proj,up_proj"}, ConfigError, "together"),
    ],
)
def test_what_torchtune_cannot_do_is_refused_before_its_environment_is_made(
    base: dict[str, Any],
    options: dict[str, Any],
    kind: type[Exception],
    reason: str,
    tmp_path: Path,
    reporter: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(kind, match=reason):
        train.preflight(context_of(tmp_path, base, engine="torchtune", **options), reporter)
    assert not (tmp_path / "cache").exists()


def test_the_native_engine_does_not_need_torchtune(tmp_path: Path, reporter: Any) -> None:
    options = {"scheduler_type": "linear", "early_stopping": 1, "target_modules": "up_proj"}
    train.preflight(context_of(tmp_path, {**LLAMA, "attention_bias": True}, **options), reporter)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dtype_that_the_processor_is_slow_in_is_warned_of(
    dtype: str, tmp_path: Path, reporter: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(hardware, "_cpu_words", lambda: {"avx2"})
    monkeypatch.setattr(hardware, "best_device", lambda: "cpu")
    train.preflight(context_of(tmp_path, LLAMA | {"model_type": "llama"}, dtype=dtype), reporter)
    printed = capsys.readouterr()
    assert ("leave --dtype out" in printed.out + printed.err) == (dtype == "bf16")


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        ({**LLAMA, "model_type": "llama"}, {"nproc": 2, "sharding": "on"}, "sharded"),
        ({**LLAMA, "model_type": "gpt2"}, {}, "its architecture is gpt2"),
    ],
)
def test_preferences_that_transformers_would_compute_are_refused(
    base: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    context = context_of(tmp_path, base, objective="dpo", **options)
    with pytest.raises(ConfigError, match=reason) as raised:
        get_engine("native").check(context.config, context.base)
    assert raised.value.hint is not None and ("--sharding off" in raised.value.hint) == (reason == "sharded")


def test_the_job_has_the_numbers_of_its_objective(tmp_path: Path) -> None:
    """Beta has a default of each objective, and jobs for chats are those of earlier versions."""
    chats = train.make_job(context_of(tmp_path, LLAMA, batch_size=1))
    assert chats.preference is None and "preference" not in chats.identity()
    for name, given, beta in (("dpo", {}, 0.1), ("simpo", {}, 2.0), ("kto", {"beta": 0.4}, 0.4)):
        (tmp_path / name).mkdir()
        job = train.make_job(context_of(tmp_path / name, LLAMA, batch_size=1, objective=name, **given))
        assert job.preference is not None and (job.preference.objective, job.preference.beta) == (name, beta)
        assert job.identity()["preference"] == dataclasses.asdict(job.preference)
        job.write(tmp_path / name / "job.json")
        assert TrainJob.read(tmp_path / name / "job.json") == job


def test_the_fingerprint_has_the_objective_only_where_it_is_not_the_default(tmp_path: Path) -> None:
    names = {"objective", "beta", "simpo_gamma", "desirable_weight", "undesirable_weight"}
    assert not names & train.options(configs.resolve(({}, "test", tmp_path))).keys()
    options = train.options(configs.resolve(({"objective": "ipo", "beta": 0.2}, "test", tmp_path)))
    assert (options["objective"], options["beta"]) == ("ipo", 0.2)


def test_an_explicit_batch_size_is_kept(tmp_path: Path) -> None:
    assert train.make_job(context_of(tmp_path, LLAMA, batch_size=7)).batch_size == 7


def test_weights_between_0_and_1_are_refused_for_torchtune(tmp_path: Path, reporter: Any) -> None:
    context = context_of(tmp_path, LLAMA, engine="torchtune")
    write_tokens(context.run.prepared / TRAIN_TOKENS, [([1, 2, 3], [0, 0.5, 1])])
    with pytest.raises(ConfigError, match="weights between 0 and 1"):
        train.run(context, reporter)
    assert not context.run.job.exists(), "nothing was started"

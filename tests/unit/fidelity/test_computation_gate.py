"""Before training: whether llama.cpp computes an architecture as transformers does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune import llamacpp
from kolotune.fidelity import computation_gate
from kolotune.fidelity.computation_gate import Verdict, check_computation, describe, judge
from kolotune.fidelity.computation_proof import ComputationProof, ComputationTask, FailedSide
from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ModelError, ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context
from kolotune.weights.model_config import ModelConfig
from kolotune.weights.shrunk_config import shrink

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "sliding_window": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA = {**MISTRAL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": None}
Make = Callable[..., Context]


class Messages(PlainReporter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of a base model that has settings only: ``make(settings, **options)``."""

    def context(settings: dict[str, Any], **options: object) -> Context:
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        values = {"base_model": str(base), "output_dir": tmp_path / "run", "train_data": tmp_path / "c.jsonl"}
        config = configs.resolve(({**values, **options}, "test", tmp_path))
        return Context(config, RunFolder(tmp_path / "run"), base)

    return context


@pytest.mark.parametrize(
    ("proof", "verdict"),
    [
        (ComputationProof(1e-8, 1e-8), Verdict.EQUAL),
        (ComputationProof(0.3, 1e-8), Verdict.LONG_CHATS),
        (ComputationProof(1e-4, 1e-4), Verdict.NEARLY),
        (ComputationProof(1e-4, 1e-8), Verdict.NEARLY),
        (ComputationProof(0.3, 1e-8, 0.2), Verdict.LONG_CHATS),
        (ComputationProof(2e-3, 1e-6, 2e-6), Verdict.NEARLY),
        (ComputationProof(0.3, 0.2, 0.1), Verdict.DIFFERENT),
        (ComputationProof(0.3, 0.2), Verdict.DIFFERENT),
        (ComputationProof(obstacle=FailedSide.LLAMACPP, reason="why"), Verdict.NOT_COMPUTED),
        (ComputationProof(obstacle=FailedSide.MERGE, reason="why"), Verdict.NOT_MERGED),
        (ComputationProof(obstacle=FailedSide.CONVERTER, reason="why"), Verdict.NOT_COMPARED),
    ],
    ids=lambda value: value.name if isinstance(value, Verdict) else "",
)
def test_verdicts(proof: ComputationProof, verdict: Verdict) -> None:
    config = ModelConfig(Path("config.json"), MISTRAL)
    assert judge(proof, config) is verdict
    sentence = describe(proof, config)
    assert bool(sentence) == (verdict is not Verdict.EQUAL)
    assert ("1024" in sentence) == (verdict is Verdict.LONG_CHATS)


def test_without_a_window_all_lengths_differ() -> None:
    assert judge(ComputationProof(0.3, 1e-8), ModelConfig(Path("config.json"), LLAMA)) is Verdict.DIFFERENT


def test_llama_is_equal_and_asked_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    context, messages = make(LLAMA), Messages()
    check_computation(context, messages)
    monkeypatch.setattr(computation_gate, "_run", None)
    check_computation(context, messages)
    assert not messages.warnings and not messages.notes


def test_a_process_that_died_is_asked_again(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context, asked = make(LLAMA), []

    def die(*_: object) -> ComputationProof:
        asked.append(1)
        return ComputationProof(obstacle=FailedSide.LLAMACPP, reason="the process ended with code -9")

    monkeypatch.setattr(computation_gate, "cache_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(computation_gate, "_run", die)
    for _ in range(2):
        with pytest.raises(ToolchainError, match="-9"):
            check_computation(context, Messages())
    assert len(asked) == 2


def test_a_window_that_llamacpp_has_not_is_warned_of_with_its_length(make: Make) -> None:
    messages = Messages()
    check_computation(make(MISTRAL, max_seq_length=2048), messages)
    assert len(messages.warnings) == 1 and "1024 tokens" in messages.warnings[0]
    check_computation(make(MISTRAL, max_seq_length=1024), messages)
    assert len(messages.warnings) == 1, "no chat is longer"


def test_dynamic_scaling_that_the_converter_leaves_out_is_warned_of_with_its_length(make: Make) -> None:
    rotary = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    messages = Messages()
    check_computation(make({**LLAMA, "rope_parameters": rotary, "max_position_embeddings": 512}), messages)
    assert len(messages.warnings) == 1 and "512 tokens" in messages.warnings[0]


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ],
    ids=lambda rotary: rotary["rope_type"],
)  # fmt: skip
def test_other_scaling_is_equal(rotary: dict[str, Any], make: Make) -> None:
    messages = Messages()
    settings = {**LLAMA, "rope_parameters": {"rope_theta": 10000.0, **rotary}, "max_position_embeddings": 4096}
    check_computation(make(settings), messages)
    assert not messages.warnings and not messages.notes


def of_type(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """Return transformers' own settings for a type of model, with changes."""
    import transformers

    return {**transformers.CONFIG_MAPPING[model_type]().to_dict(), "architectures": [architecture], **changes}


HYBRID_LAYERS = {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2}


@pytest.mark.parametrize(
    "settings",
    [
        # llama.cpp's graph of hybrids has no positions, and knows windows by the number of layers.
        of_type("granitemoehybrid", "GraniteMoeHybridForCausalLM", position_embedding_type="rope", **HYBRID_LAYERS),
        of_type(
            "exaone4", "Exaone4ForCausalLM", num_hidden_layers=8, sliding_window=4096, sliding_window_pattern=4,
            layer_types=[*["sliding_attention"] * 3, "full_attention"] * 2,
        ),
        {**LLAMA, "hidden_act": "gelu"},
        of_type("bloom", "BloomForCausalLM", apply_residual_connection_post_layernorm=True),
        of_type("falcon", "FalconForCausalLM", alibi=True),
        of_type("olmoe", "OlmoeForCausalLM", norm_topk_prob=True),
        of_type("qwen2_moe", "Qwen2MoeForCausalLM", norm_topk_prob=True),
    ],
    ids=["granite hybrid", "few layers", "activation", "residual", "alibi", "olmoe", "qwen2_moe"],
)  # fmt: skip
def test_what_is_fixed_in_llamacpp_is_refused_where_the_base_has_it_otherwise(
    settings: dict[str, Any], make: Make
) -> None:
    with pytest.raises(ToolchainError, match="otherwise than transformers"):
        check_computation(make(settings), Messages())


def test_a_chunk_that_is_fixed_in_llamacpp_is_warned_of_with_its_length(make: Make) -> None:
    settings = of_type("llama4_text", "Llama4ForCausalLM", attention_chunk_size=512)
    messages = Messages()
    check_computation(make(settings, max_seq_length=2048), messages)
    assert len(messages.warnings) == 1 and "512 tokens" in messages.warnings[0]
    check_computation(make(settings, max_seq_length=512), messages)
    assert len(messages.warnings) == 1, "no chat is longer"


@pytest.mark.parametrize(
    "settings",
    [
        of_type("starcoder2", "Starcoder2ForCausalLM", sliding_window=1024),
        of_type(
            "qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=1024, max_window_layers=0,
            layer_types=["sliding_attention"] * 32,
        ),
    ],
    ids=lambda settings: settings["model_type"],
)  # fmt: skip
def test_other_windows_that_llamacpp_has_not(settings: dict[str, Any], make: Make) -> None:
    messages = Messages()
    check_computation(make(settings, max_seq_length=2048), messages)
    assert len(messages.warnings) == 1 and "1024 tokens" in messages.warnings[0]


def test_what_differs_is_refused_before_training(make: Make) -> None:
    moe = {
        **{name: value for name, value in LLAMA.items() if name != "intermediate_size"},
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    }
    with pytest.raises(ToolchainError) as refused:
        check_computation(make(moe), Messages())
    assert "Qwen3Moe" in refused.value.cause and "--no-compare" in refused.value.hint
    check_computation(make(moe, compare=False), Messages())


# In a process of its own, as always: the converter has its own version of the package gguf.
MEASURE = """
import sys
from pathlib import Path
from kolotune.fidelity.computation_proof import measure
from kolotune.weights.stored_names import StoredNames
if sys.argv[2] == "unknown":
    StoredNames.rows = lambda self, name: None
measure(Path(sys.argv[1]))
"""


def test_what_can_not_be_merged_is_refused_before_training(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HRM-Text stores several layers in one weight. If that were not known, their adapters could not be merged."""
    hrm = {**LLAMA, "architectures": ["HrmTextForCausalLM"], "model_type": "hrm_text", "num_key_value_heads": 4}
    config, task, answer = ModelConfig(Path("config.json"), hrm), tmp_path / "task.json", tmp_path / "answer.json"
    typed_storage.write(task, ComputationTask(shrink(hrm), str(llamacpp.ensure(PlainReporter()).root), str(answer)))
    proofs = []
    for rows in ("known", "unknown"):
        subprocess.run([sys.executable, "-c", MEASURE, str(task), rows], check=True)
        proofs.append(typed_storage.read(ComputationProof, answer))
    assert judge(proofs[0], config) is Verdict.EQUAL
    proof = proofs[1]
    assert judge(proof, config) is Verdict.NOT_MERGED
    assert "_proj" in describe(proof, config)
    monkeypatch.setattr(computation_gate, "find_proof", lambda *_: proof)
    with pytest.raises(ModelError, match="can't be merged"):
        check_computation(make(hrm), Messages())


def test_what_transformers_does_not_know_is_not_compared(make: Make) -> None:
    messages = Messages()
    check_computation(make({**LLAMA, "model_type": "unheard-of"}), messages)
    assert len(messages.notes) == 1 and not messages.warnings

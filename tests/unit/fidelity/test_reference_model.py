"""A model that is read layer by layer predicts the same as the whole one, and as PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kolotune.fidelity import reference_model
from kolotune.fidelity.tasks import ComparedChat
from kolotune.foundation.errors import SpaceError

BEGIN = list(range(40, 70))
CHATS = [
    ComparedChat([5, 9, 2, 7, 40], [1, 3], []),
    ComparedChat(list(range(3, 30)), [20, 25], []),
    ComparedChat([1, 2], [0], []),
    ComparedChat([*BEGIN, 7, 8, 9], [30, 32], []),
    ComparedChat([*BEGIN, 9, 9, 8, 7], [30, 31, 33], []),
]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SQUARE = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
"""Experts whose weight has as many inputs as outputs, as those of gpt-oss; its shape does not say which is which."""


def with_adapter(model: Any, folder: Path, targets: list[str], **options: Any) -> Any:
    """Add a random adapter to the model, and save it with PEFT."""
    import peft
    import torch

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, **options)
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize(
    ("kind", "targets", "more", "options"),
    [
        ("llama", ["q_proj", "down_proj"], {}, {}),
        ("llama", ["q_proj", "embed_tokens"], {"tie_word_embeddings": True}, {}),
        ("llama", ["q_proj", "embed_tokens"], {}, {"use_dora": True}),
        ("llama", ["q_proj", "down_proj"], {}, {"init_lora_weights": "pissa"}),
        ("llama", ["q_proj", "down_proj"], {}, {"init_lora_weights": "olora"}),
        ("gemma", ["o_proj"], {}, {}),
        ("gemma2", ["o_proj"], {}, {}),
        ("mistral", ["o_proj"], {"sliding_window": 8}, {}),
        ("qwen2", ["v_proj"], {}, {}),
        ("gpt2", ["c_attn", "c_proj"], {}, {}),
        ("gpt2", ["c_attn", "c_proj"], {}, {"use_dora": True}),
        ("gpt2", ["c_attn", "c_proj"], {}, {"init_lora_weights": "pissa"}),
        ("gpt_oss", ["q_proj"], SQUARE, {"target_parameters": EXPERTS}),
        ("gpt_oss", ["q_proj"], {**SQUARE, "intermediate_size": 96}, {"target_parameters": EXPERTS}),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_layer_by_layer_as_peft(
    kind: str,
    targets: list[str],
    more: dict[str, Any],
    options: dict[str, Any],
    tiny_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base = tiny_model(kind, tmp_path / "base", **more)
    tuned = with_adapter(base, tmp_path / "adapter", targets, **options)
    for kind_of_model in (reference_model.WholeModel, reference_model.LayeredModel):
        check_as_peft(kind_of_model(tmp_path / "base"), tuned, tmp_path / "adapter")


@pytest.mark.usefixtures("one_thread")
def test_experts_that_are_stored_one_by_one_as_peft(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_model("mixtral", tmp_path / "base", **SQUARE)
    tuned = with_adapter(base, tmp_path / "adapter", ["q_proj"], target_parameters=EXPERTS)
    check_as_peft(reference_model.WholeModel(tmp_path / "base"), tuned, tmp_path / "adapter")
    with pytest.raises(SpaceError, match="layer by layer"):
        reference_model.LayeredModel(tmp_path / "base")


@pytest.mark.usefixtures("one_thread")
def test_llama_4_as_peft(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Its class does not say which of its modules has the layers."""
    base = tiny_model("llama4_text", tmp_path / "base", **SQUARE)
    parameters = ["gate_up_proj", "experts.down_proj"]
    tuned = with_adapter(base, tmp_path / "adapter", ["q_proj"], target_parameters=parameters)
    for kind_of_model in (reference_model.WholeModel, reference_model.LayeredModel):
        check_as_peft(kind_of_model(tmp_path / "base"), tuned, tmp_path / "adapter")


def check_as_peft(model: Any, tuned: Any, adapter: Path) -> None:
    """Check that a model with an adapter predicts what PEFT's does, and something else than without."""
    import torch

    before = dict(model.log_probabilities(CHATS))
    model.add(adapter)
    after = dict(model.log_probabilities(CHATS))
    assert sorted(after) == list(range(len(CHATS)))
    for number, chat in enumerate(CHATS):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([chat.ids])).logits[0, chat.positions]
        expected = torch.log_softmax(logits, -1).numpy()
        assert np.abs(after[number] - expected).max() < 2e-4, type(model)
        assert np.abs(after[number] - before[number]).max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_as_peft(tied: bool, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    model = tiny_model("llama", tmp_path / "base", tie_word_embeddings=tied)
    model.resize_token_embeddings(98, mean_resizing=False)
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    rows = {"trainable_token_indices": {name: [96, 97] for name in modules}}
    tuned = with_adapter(model, tmp_path / "adapter", ["q_proj"], **rows).eval()
    chats = [ComparedChat([5, 96, 2, 97, 40], [1, 3], []), ComparedChat([1, 97, 96], [0, 2], [])]
    for kind in (reference_model.WholeModel, reference_model.LayeredModel):
        opened = kind(tmp_path / "base")
        opened.add(tmp_path / "adapter")
        for number, found in opened.log_probabilities(chats):
            with torch.no_grad():
                logits = tuned(torch.tensor([chats[number].ids])).logits[0, chats[number].positions]
            np.testing.assert_allclose(found, torch.log_softmax(logits, -1).numpy(), atol=1e-4)


def test_a_model_that_does_not_fit_is_read_layer_by_layer(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    tiny_model("llama", tmp_path / "base")
    assert isinstance(reference_model.open_model(tmp_path / "base"), reference_model.WholeModel)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Free", (), {"available": 1000}))
    model = reference_model.open_model(tmp_path / "base")
    assert isinstance(model, reference_model.LayeredModel) and model.answers([[1]], 2, 3) == [None]


def test_a_model_with_unknown_names_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("llama", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({f"other.{name}": each for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(SpaceError, match="layer by layer"):
        reference_model.LayeredModel(tmp_path / "base")


@pytest.mark.usefixtures("one_thread")
def test_weights_of_a_merged_model_are_read_into_the_open_one(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    tiny_model("llama", tmp_path / "base")
    merged = tiny_model("llama", tmp_path / "merged")
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.normal_(std=0.1)
    merged.half().save_pretrained(tmp_path / "merged")
    model = reference_model.WholeModel(tmp_path / "base")
    before = dict(model.log_probabilities(CHATS))
    assert model.read(tmp_path / "merged")
    wanted = dict(reference_model.WholeModel(tmp_path / "merged").log_probabilities(CHATS))
    for number, actual in model.log_probabilities(CHATS):
        assert (actual == wanted[number]).all() and not np.allclose(actual, before[number], atol=1e-2)


@pytest.mark.usefixtures("one_thread")
def test_weights_of_another_model_are_not_read(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("llama", tmp_path / "base")
    tiny_model("llama", tmp_path / "deeper", num_hidden_layers=5)
    for folder in ("less", "more"):
        tiny_model("llama", tmp_path / folder)
        file = tmp_path / folder / "model.safetensors"
        weights = load_file(file)
        first = next(iter(weights))
        weights = {name: each for name, each in weights.items() if folder == "more" or name != first}
        if folder == "more":
            weights["another"] = weights[first].clone()
        save_file(weights, file, metadata={"format": "pt"})
    model = reference_model.WholeModel(tmp_path / "base")
    before = dict(model.log_probabilities(CHATS))
    assert not any(model.read(tmp_path / folder) for folder in ("deeper", "less", "more"))
    assert all((actual == before[number]).all() for number, actual in model.log_probabilities(CHATS))


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gemma2", {})])
def test_a_model_is_loaded_weight_by_weight_as_transformers_loads_it(
    kind: str, more: dict[str, Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    import torch
    import transformers

    tiny_model(kind, tmp_path, **more)
    filled = reference_model._filled(tmp_path, transformers.AutoConfig.from_pretrained(tmp_path))
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert filled is not None and filled.state_dict().keys() == wanted.state_dict().keys()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(filled.eval()(ids).logits, wanted(ids).logits)


def test_a_model_that_its_files_name_otherwise_is_loaded_by_transformers(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    tiny_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert reference_model._filled(tmp_path, transformers.AutoConfig.from_pretrained(tmp_path)) is None
    reference_model.WholeModel(tmp_path)

"""The packed passes predict, answer and show what transformers does; what they can't is left to transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.fidelity.test_reference_model import BEGIN, CHATS, with_adapter

from kolotune.engines.native.kernels import build
from kolotune.fidelity.adapter_change import ChangeRecorder
from kolotune.fidelity.packed_reference import PackedReference, open_packed_reference
from kolotune.fidelity.reference_model import WholeModel
from kolotune.weights.adapter import read_adapter

PROMPTS = [[5, 9, 2, 7, 40], [*BEGIN, 7], [1, 8]]
END, LONGEST = 2, 12
FOLLOWED = [chat for chat in CHATS if max(chat.positions) + 1 < len(chat.ids)]


@pytest.fixture(params=["compiled", "plain"])
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "plain":
        monkeypatch.setattr(build, "compiled", lambda dtype: None)
    elif build.reason_unavailable():
        pytest.skip("no compiler")
    else:
        build.ensure("fp32")
    yield


def opened(base: Path, adapter: Path) -> PackedReference:
    model = open_packed_reference(base, str(adapter), 64)
    assert model is not None
    return model


def check_equal(packed: PackedReference, whole: WholeModel) -> None:
    expected = dict(whole.log_probabilities(CHATS))
    found = dict(packed.log_probabilities(CHATS))
    assert sorted(found) == list(range(len(CHATS)))
    assert max(np.abs(found[number] - expected[number]).max() for number in found) < 2e-4
    assert packed.losses(FOLLOWED) == pytest.approx(whole.losses(FOLLOWED), abs=1e-3)
    assert packed.answers(PROMPTS, END, LONGEST) == whole.answers(PROMPTS, END, LONGEST)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("phi3", {}),
    ],
)
@pytest.mark.usefixtures("one_thread", "kernels")
def test_as_transformers(kind: str, more: dict[str, Any], tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_model(kind, tmp_path / "base", **more)
    targets = ["qkv_proj", "down_proj"] if kind == "phi3" else ["q_proj", "v_proj", "down_proj"]
    with_adapter(base, tmp_path / "adapter", targets)
    packed, whole = opened(tmp_path / "base", tmp_path / "adapter"), WholeModel(tmp_path / "base")
    check_equal(packed, whole)
    of_base = packed.answers(PROMPTS, END, LONGEST)
    packed.add(tmp_path / "adapter")
    whole.add(tmp_path / "adapter")
    check_equal(packed, whole)
    of_tuned = packed.answers(PROMPTS, END, LONGEST)
    assert packed.answers_of_both(PROMPTS, END, LONGEST) == (of_base, of_tuned)


@pytest.mark.usefixtures("one_thread", "kernels")
def test_what_an_adapter_changes_is_recorded_as_by_transformers(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_model("qwen2", tmp_path / "base")
    with_adapter(base, tmp_path / "adapter", ["q_proj", "down_proj"])
    adapter = read_adapter(tmp_path / "adapter")
    recorders = []
    for model in (opened(tmp_path / "base", tmp_path / "adapter"), WholeModel(tmp_path / "base")):
        model.add(tmp_path / "adapter")
        recorders.append(ChangeRecorder(model, adapter))
        with recorders[-1].recording():
            list(model.log_probabilities(CHATS))
        list(model.log_probabilities(CHATS))  # not recorded
    for name, found in recorders[0]._watched.items():
        expected = recorders[1]._watched[name]
        assert found.energy == pytest.approx(expected.energy, rel=1e-4) and found.energy > 0
        assert found.base_part == pytest.approx(expected.base_part, rel=1e-3, abs=1e-3 * expected.energy)
        assert np.abs((found.inputs - expected.inputs).numpy()).max() < 1e-3 * float(expected.inputs.abs().max())


@pytest.mark.usefixtures("one_thread")
def test_weights_of_a_merged_model_are_read(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    with_adapter(base, tmp_path / "adapter", ["q_proj"])
    tiny_model("llama", tmp_path / "merged", seed=5)
    tiny_model("llama", tmp_path / "tied", tie_word_embeddings=True)
    packed = opened(tmp_path / "base", tmp_path / "adapter")
    packed.add(tmp_path / "adapter")
    assert not packed.read(tmp_path / "tied")
    assert packed.read(tmp_path / "merged")
    check_equal(packed, WholeModel(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("gpt2", ["c_attn"], {}),
        ("llama", ["q_proj"], {"use_dora": True}),
        ("llama", ["q_proj", "embed_tokens"], {}),
        ("llama", ["q_proj"], {"modules_to_save": ["lm_head"]}),
        ("mixtral", ["q_proj"], {}),
    ],
)
def test_others_are_left_to_transformers(
    kind: str, targets: list[str], options: dict[str, Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_model(kind, tmp_path / "base", **({"num_local_experts": 4} if kind == "mixtral" else {}))
    with_adapter(base, tmp_path / "adapter", targets, **options)
    assert open_packed_reference(tmp_path / "base", str(tmp_path / "adapter"), 64) is None


def test_an_adapter_for_another_model_is_left_to_transformers(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    with_adapter(base, tmp_path / "adapter", ["q_proj"])
    tiny_model("llama", tmp_path / "fewer", num_hidden_layers=1)
    assert open_packed_reference(tmp_path / "fewer", str(tmp_path / "adapter"), 64) is None

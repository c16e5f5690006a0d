"""What is left of an adapter's change in a GGUF: all of it, none, a half; by whole and by layered models alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from unit.fidelity.test_reference_model import CHATS, with_adapter

from kolotune.fidelity import reference_model
from kolotune.fidelity.adapter_change import ChangeRecorder
from kolotune.fidelity.adapter_place import GgufPlace
from kolotune.fidelity.change_survival import change_survival
from kolotune.weights.adapter import read_adapter

Weights = dict[str, np.ndarray]
ORDER = (1, 0, *range(2, 64))


def places(names: list[str]) -> dict[str, GgufPlace]:
    """Give each weight a name in the GGUF, and queries another order of rows."""
    return {name: GgufPlace(f"blk.{name}", ORDER if "q_proj" in name else None) for name in names}


def write_gguf(path: Path, weights: Weights) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name, weight in weights.items():
        ordered = weight[list(ORDER)] if "q_proj" in name else weight
        writer.add_tensor(f"blk.{name}", np.ascontiguousarray(ordered, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def inputs_of(model: Any, names: list[str]) -> Weights:
    """Return what goes into each module of the tuned model with the chats, one token in a row."""
    import torch

    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    for name in names:

        def hook(_: Any, inputs: Any, __: Any, name: str = name) -> None:
            found[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())

        modules[name.removesuffix(".weight")].register_forward_hook(hook)
    with torch.no_grad():
        for chat in CHATS:
            model(input_ids=torch.tensor([chat.ids]))
    return {name: np.concatenate(rows) for name, rows in found.items()}


@pytest.mark.parametrize("kind_of_model", [reference_model.WholeModel, reference_model.LayeredModel])
@pytest.mark.usefixtures("one_thread")
def test_the_share_that_is_left(kind_of_model: Any, tiny_model: Callable[..., Any], tmp_path: Path) -> None:

    base = tiny_model("llama", tmp_path / "base")
    before = {name: weight.detach().float().numpy().copy() for name, weight in base.named_parameters()}
    with_adapter(base, tmp_path / "adapter", ["q_proj", "down_proj"])
    adapter = read_adapter(tmp_path / "adapter")
    names = list(adapter.deltas)
    model = kind_of_model(tmp_path / "base")
    model.add(tmp_path / "adapter")
    recorder = ChangeRecorder(model, adapter)
    list(model.log_probabilities(CHATS))  # not recorded
    with recorder.recording():
        list(model.log_probabilities(CHATS))
    recorder.write(tmp_path / "changes.safetensors", places(names))
    changes = {name: adapter.deltas[name].rows(slice(None)) for name in names}
    assert changes[names[0]].shape[0] == len(ORDER)
    noise = {name: np.random.default_rng(0).standard_normal(change.shape) * 0.1 for name, change in changes.items()}

    def kept(weights: Weights) -> list[float]:
        write_gguf(tmp_path / "m.gguf", weights)
        found = change_survival(tmp_path / "m.gguf", tmp_path / "changes.safetensors")
        assert [matrix.tensor for matrix in found] == [f"blk.{name}" for name in names]
        return [matrix.change_kept for matrix in found]

    assert kept({name: before[name] for name in names}) == pytest.approx([0] * len(names), abs=1e-3)
    assert kept({name: before[name] + changes[name] for name in names}) == pytest.approx([1] * len(names), abs=1e-3)
    assert kept({name: before[name] + changes[name] / 2 for name in names}) == pytest.approx(
        [0.5] * len(names), abs=1e-3
    )
    tuned = reference_model.WholeModel(tmp_path / "base")
    tuned.add(tmp_path / "adapter")
    inputs = inputs_of(tuned.model, names)
    expected = []
    for name in names:
        moved, change = inputs[name] @ noise[name].T, inputs[name] @ changes[name].T
        expected.append(float((moved * change).sum() / (change**2).sum()))
    assert kept({name: before[name] + noise[name] for name in names}) == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_nothing_was_recorded(tmp_path: Path) -> None:
    assert change_survival(tmp_path / "missing.gguf", tmp_path / "missing.safetensors") == []

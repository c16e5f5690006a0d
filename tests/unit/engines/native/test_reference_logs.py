"""Reference log-probabilities are read as they were written, or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from kolotune.engines.native import reference_logs

IDENTITY = {"base": "1", "data": "2"}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = ("train", "held_out", "train_mismatched")
    return {name: torch.randn(9, 2, dtype=torch.float64) for name in names}


def test_a_round_trip_and_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    assert reference_logs.read(path, IDENTITY) is None
    reference_logs.write(path, tensors(), IDENTITY)
    found = reference_logs.read(path, IDENTITY)
    assert found is not None and found.keys() == tensors().keys()
    assert all(torch.equal(found[name], each) for name, each in tensors().items())
    assert reference_logs.read(path, {**IDENTITY, "data": "3"}) is None


def test_what_is_damaged_is_never_read_as_something_else(tmp_path: Path) -> None:
    """Whatever 500 seeded damages leave is refused, or still says the same."""
    path, dice = tmp_path / "reference.safetensors", random.Random(1)
    reference_logs.write(path, tensors(), IDENTITY)
    whole = path.read_bytes()
    for _ in range(500):
        at, length = dice.randrange(len(whole)), dice.choice([1, 8, 64])
        damages = (
            whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :],
            whole[:at] + dice.randbytes(length) + whole[at + length :],
            whole[:at],
            whole[:at] + bytes(len(whole) - at),
            whole[:at] + whole[at + length :],
        )
        path.write_bytes(dice.choice(damages))
        found = reference_logs.read(path, IDENTITY)
        assert found is None or all(torch.equal(found[name], each) for name, each in tensors().items())

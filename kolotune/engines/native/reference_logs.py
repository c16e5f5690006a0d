"""The reference's log-probabilities: computed once, before the first step, and kept in the run folder.

They are a function of base, chats and arithmetic alone, so that a resumed training reads what the first start computed,
to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from kolotune.foundation.files import replacing

_IDENTITY = "of_these"


def write(path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> None:
    """Write reference log-probabilities, whole or not at all."""
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(save(stored, {_IDENTITY: _digest(stored, identity)}))


def read(path: Path, identity: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Return what `write` wrote with the same identity; None if it is missing, damaged or of something else."""
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get(_IDENTITY)
        tensors: dict[str, Tensor] = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return tensors if digest == _digest(tensors, identity) else None


def _digest(tensors: Mapping[str, Tensor], identity: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()

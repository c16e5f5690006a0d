"""What a run keeps: everything that it makes, or with `lean` only what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kolotune.foundation.config import Config
from kolotune.foundation.quantization_types import NONE


@dataclass(frozen=True)
class Kept:
    """The models that a finished run has in its folder, beside the adapter.

    Attributes:
        merged: the merged folder.
        unquantized: the unquantized GGUF.
        quantized: the quantizations that there is a GGUF of.
    """

    merged: bool
    unquantized: bool
    quantized: tuple[str, ...]


def kept(config: Config) -> Kept:
    """The models that a run with these options keeps."""
    quantized = tuple(name for name in config.quantization if name != NONE)
    return Kept(merged=not config.lean, unquantized=not (config.lean and quantized), quantized=quantized)


def left_out(config: Config) -> frozenset[str]:
    """The stages that such a run does not have: what only they make is not kept."""
    found = kept(config)
    return frozenset(name for name, there in (("merge", found.merged), ("convert", found.unquantized)) if not there)

"""Which models a run keeps: all that it makes, or with `lean` only those that were asked for."""

from __future__ import annotations

from dataclasses import dataclass

from kolotune.foundation.config import Config
from kolotune.foundation.quantization_types import NONE


@dataclass(frozen=True)
class KeptModels:
    """The models that a finished run has in its folder, beside the adapter.

    Attributes:
        merged: whether the merged model is kept.
        unquantized: whether the unquantized GGUF is kept.
        quantized: the quantizations with a GGUF each.
    """

    merged: bool
    unquantized: bool
    quantized: tuple[str, ...]


def kept_models(config: Config) -> KeptModels:
    """Return the models that a run with these options keeps."""
    quantized = tuple(name for name in config.quantization if name != NONE)
    return KeptModels(merged=not config.lean, unquantized=not (config.lean and quantized), quantized=quantized)


def stages_skipped_by_lean(config: Config) -> frozenset[str]:
    """Return the stages that a run with these options skips, because it does not keep their outputs."""
    kept = kept_models(config)
    return frozenset(stage for stage, is_kept in (("merge", kept.merged), ("convert", kept.unquantized)) if not is_kept)

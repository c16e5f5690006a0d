"""The input of the judge: the measurements of a run, and where the measured files are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tasks import GgufMeasurement, Reference

ADAPTER, MODEL, MERGED, F16 = "adapter on base", "model", "merged", "f16 GGUF"
"""Names of artifacts in a comparison; the reference is the adapter on its base, or an exported model."""


@dataclass(frozen=True)
class MeasuredFile:
    """A file or folder that was measured.

    Attributes:
        name: its name in the comparison.
        file: relative to the run folder; "" for one that is not kept.
        size: in bytes; None where it has none.
    """

    name: str
    file: str
    size: int | None


@dataclass(frozen=True)
class MeasuredGguf:
    """A GGUF of the run.

    Attributes:
        gguf: the file.
        modelfile: its Modelfile, relative to the run folder; "" for none.
        measurement: of both.
    """

    gguf: MeasuredFile
    modelfile: str
    measurement: GgufMeasurement


@dataclass(frozen=True)
class Evidence:
    """All that the judge decides by.

    Attributes:
        reference: measurements of the base and the tuned model.
        merged: None when it is not kept.
        ggufs: the run's GGUFs, the unquantized one first, where it is kept.
        merge_dtype, load_in_4bit: see `Config`.
        adapter: the folder of the adapter, or of the exported model.
        recorded: held-out losses that training measured, of the base (None where it started from an adapter) and of
            the model it kept; None: not measured.
        not_kept: see `Comparison`.
        untied: head and embedding share their weights in the base, but not in the merged model.
        trials: quantizations that were made only to be measured; they can't fail the run.
        is_export: the model was trained elsewhere, and is compared on sample chats.
        with_matrix: names of quantizations that were made with an importance matrix.
    """

    reference: Reference
    merged: MeasuredFile | None
    ggufs: Sequence[MeasuredGguf]
    merge_dtype: str
    load_in_4bit: bool
    adapter: MeasuredFile
    recorded: tuple[float | None, float] | None
    not_kept: tuple[str, ...]
    untied: bool = False
    trials: Sequence[MeasuredGguf] = ()
    with_matrix: frozenset[str] = frozenset()
    is_export: bool = False

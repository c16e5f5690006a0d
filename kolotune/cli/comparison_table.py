"""How a comparison is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kolotune.fidelity.comparison import Comparison, QuantizationFigures, StageCheck
from kolotune.foundation.errors import FidelityError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

_COLUMNS = ("what", "size", "prompts", "top-1", "KL mean", "KL 99%", "loss", "ends", "verdict")
_QUANTIZED = ("quantization", "size", "loss", "KL mean", "top-1", "importance matrix", "kept")


@contextmanager
def showing(run: RunFolder, say: Reporter, wanted: bool = True) -> Iterator[None]:
    """Shows what was compared when the block is done, or when it ends because the comparison failed."""
    try:
        yield
    except FidelityError:
        show(Comparison.read(run.comparison), say)
        raise
    if wanted:
        show(Comparison.read(run.comparison), say)


def show(found: Comparison, say: Reporter) -> None:
    """Prints the table, the base's loss, and the answers side by side."""
    part = "held-out" if found.held_out else "training"
    title = f"Compared on {found.chats} {part} chats, {found.positions} answer tokens"
    say.table(title, _COLUMNS, [_row(each) for each in found.checked])
    if found.base_loss is not None and found.tuned_loss is not None:
        say.note(f"loss of the base model {found.base_loss:.4f}, tuned {found.tuned_loss:.4f}")
    if len(found.quantizations) > 1:
        say.table("Quantizations, the smallest first", _QUANTIZED, [_quantized(each) for each in found.quantizations])
    if found.recommended:
        say.note(f"recommended: {found.recommended}, {found.recommended_because}")
    for name in found.not_kept:
        say.note(f"not kept, so not compared: {name}")
    for note in found.notes:
        say.note(note)
    for each in found.checked:
        for sentence in each.failed:
            say.warning(f"{each.name}: {sentence}")
    if found.answers:
        rows = [(each.prompt, each.base or "-", each.tuned or "-") for each in found.answers]
        say.table("Answers, always the likeliest token", ("prompt", "base", "tuned"), rows)


def _row(each: StageCheck) -> tuple[str, ...]:
    return (
        each.name,
        "-" if each.size_bytes is None else format_size(each.size_bytes),
        str(each.prompt_ids_equal),
        _shown(each.top1_agreement, ".1%"),
        _shown(each.kl_mean, ".1e"),
        _shown(each.kl_p99, ".1e"),
        _shown(each.loss, ".4f"),
        str(each.stops),
        "ok" if each.passed else "FAILED",
    )


def _quantized(each: QuantizationFigures) -> tuple[str, ...]:
    weighted = "yes" if each.importance_matrix else "no"
    figures = (f"{each.loss:.4f}", f"{each.kl_mean:.1e}", f"{each.top1_agreement:.1%}")
    return each.name, format_size(each.size_bytes), *figures, weighted, "yes" if each.kept else "no"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

"""Show a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kolotune.fidelity.comparison import Comparison, PathCheck, QuantizationFigures, StageCheck
from kolotune.fidelity.general_figures import GeneralFigures
from kolotune.foundation.errors import FidelityError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

_CHECKS = ("what", "size", "prompts", "top-1", "KL mean", "KL 99%", "loss", "gain kept", "ends", "verdict")
_PATHS = ("GGUF", "prompts rendered by", "the newest Ollama's way", "prompts", "kinds of chats")
_QUANTIZATIONS = (
    "quantization", "size", "loss", "gain kept", "change kept", "KL mean", "top-1", "importance matrix", "kept"
)  # fmt: skip


@contextmanager
def show_when_done(run: RunFolder, reporter: Reporter, enabled: bool = True) -> Iterator[None]:
    """Show the comparison when the block ends, also when it ends because the comparison failed."""
    try:
        yield
    except FidelityError:
        show(Comparison.read(run.comparison), reporter)
        raise
    if enabled:
        show(Comparison.read(run.comparison), reporter)


def show(comparison: Comparison, reporter: Reporter) -> None:
    """Show the checks, the losses, the quantizations, what was not compared, and the answers side by side."""
    part = "held-out" if comparison.held_out else "sample" if comparison.samples else "training"
    title = f"Compared on {comparison.chats} {part} chats, {comparison.positions} answer tokens"
    reporter.table(title, _CHECKS, [_check_cells(check) for check in comparison.checked])
    if comparison.paths:
        reporter.table(
            "Prompts with the tokens of training", _PATHS, [_path_cells(check) for check in comparison.paths]
        )
    if comparison.base_loss is not None and comparison.tuned_loss is not None:
        reporter.note(f"loss of the base model {comparison.base_loss:.4f}, tuned {comparison.tuned_loss:.4f}")
    if comparison.general is not None:
        show_general(comparison.general, reporter)
    if len(comparison.quantizations) > 1:
        cells = [_quantization_cells(figures) for figures in comparison.quantizations]
        reporter.table("Quantizations, smallest first", _QUANTIZATIONS, cells)
    if any(figures.matrices for figures in comparison.quantizations):
        reporter.note(
            "gain kept: share of what training gained, by the loss; change kept: share of the adapter's change that is "
            "left in the matrices, on average"
        )
    if comparison.recommended:
        reporter.note(f"recommended: {comparison.recommended}, {comparison.recommended_because}")
    for name in comparison.not_kept:
        reporter.note(f"not kept, so not compared: {name}")
    for note in comparison.notes:
        reporter.note(note)
    for check in comparison.checked:
        for sentence in check.failed:
            reporter.warning(f"{check.name}: {sentence}")
    if comparison.answers:
        answers = [(answer.prompt, answer.base or "-", answer.tuned or "-") for answer in comparison.answers]
        reporter.table("Answers, always the most likely token", ("prompt", "base", "tuned"), answers)


def show_general(general: GeneralFigures, reporter: Reporter) -> None:
    """Show what training took from the model on texts that have nothing to do with the chats."""
    change = general.tuned_loss - general.base_loss
    error = "" if general.error is None else f" ± {general.error:.4f}"
    reporter.note(
        f"loss on {general.tokens} tokens of general prose: base {general.base_loss:.4f}, tuned "
        f"{general.tuned_loss:.4f} ({change:+.4f}{error})"
    )
    if general.answers:
        counts = [(kind, *general.right(kind)) for kind in (*general.kinds, "")]
        rows = [(kind or "all", f"{base}/{of}", f"{tuned}/{of}") for kind, base, tuned, of in counts]
        reporter.table("General questions answered rightly", ("kind", "base", "tuned"), rows)


def _check_cells(check: StageCheck) -> tuple[str, ...]:
    return (
        check.name,
        "-" if check.size_bytes is None else format_size(check.size_bytes),
        str(check.prompt_ids_equal),
        _format(check.top1_agreement, ".1%"),
        _format(check.kl_mean, ".1e"),
        _format(check.kl_p99, ".1e"),
        _format(check.loss, ".4f"),
        _share(check.gain_kept, check.gain_kept_error),
        str(check.stops),
        "ok" if check.passed else "FAILED",
    )


def _path_cells(check: PathCheck) -> tuple[str, ...]:
    is_ollamas = "yes" if check.is_ollamas else "no"
    return (check.name, check.rendered_by, is_ollamas, str(check.prompt_ids_equal), str(check.traits_equal))


def _quantization_cells(figures: QuantizationFigures) -> tuple[str, ...]:
    return (
        figures.name,
        format_size(figures.size_bytes),
        f"{figures.loss:.4f}",
        _share(figures.gain_kept, figures.gain_kept_error),
        _format(figures.change_kept, ".0%"),
        f"{figures.kl_mean:.1e}",
        f"{figures.top1_agreement:.1%}",
        "yes" if figures.importance_matrix else "no",
        "yes" if figures.kept else "no",
    )


def _share(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if error is None else f"{value:.1%} ± {error:.1%}"


def _format(value: float | None, specification: str) -> str:
    return "-" if value is None else format(value, specification)

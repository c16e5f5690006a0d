"""The charts of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .inline_svg import GRID, HELD_OUT, INK, MUTED, PAPER, SETTINGS, TRAIN, StyleSheet
from .prepared_chats import ChatLengths
from .size_curve import SizeCurve
from .training_curve import TrainingCurve

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

WIDE, NARROW, FLAT = (920, 330), (400, 300), (400, 230)
_BINS = 24


def loss_charts(curve: TrainingCurve, sheet: StyleSheet) -> list[str]:
    """Return the training and held-out loss over the steps, as a wide chart and a narrow one for phones."""
    label = f"Training loss over {curve.steps[-1]} steps, from {curve.losses[0]:.2f} to {curve.losses[-1]:.2f}"
    if curve.held_out:
        label += f"; held-out loss from {curve.held_out[0][1]:.2f} to {curve.held_out[-1][1]:.2f}"
    return [
        _chart(lambda axes: _plot_loss(axes, curve), size, f"loss-{name}", label, sheet)
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]


def accuracy_chart(curve: TrainingCurve, sheet: StyleSheet) -> str:
    """Return how often a preference training has answers on the right side, over the steps."""
    label = f"Accuracy over the steps, {curve.smooth_accuracies()[-1]:.0%} at the end"
    if curve.held_out_accuracies:
        held_out = curve.held_out_accuracies
        label += f"; held-out accuracy from {held_out[0][1]:.0%} to {held_out[-1][1]:.0%}"
    return _chart(lambda axes: _plot_accuracy(axes, curve), WIDE, "accuracy", label, sheet)


def length_histogram(parts: Sequence[ChatLengths], which: str, sheet: StyleSheet) -> str:
    """Return a histogram of each chat's tokens, or of its answer tokens if `which` is "answers"."""
    counts = [part.tokens if which == "tokens" else part.answers for part in parts]
    most = max(int(values.max()) for values in counts)
    label = f"Histogram of {which if which == 'tokens' else 'answer tokens'} per chat, at most {most}"
    return _chart(lambda axes: _plot_histogram(axes, parts, counts), NARROW, f"histogram-{which}", label, sheet)


def learning_rate_chart(curve: TrainingCurve, sheet: StyleSheet) -> str:
    """Return the learning rate over the steps."""
    label = f"Learning rate over the steps, at most {max(curve.rates):g}"
    return _chart(lambda axes: _plot_learning_rate(axes, curve), FLAT, "rate", label, sheet)


def speed_chart(curve: TrainingCurve, sheet: StyleSheet) -> str:
    """Return the tokens per second over the steps."""
    label = "Tokens per second over the steps"
    return _chart(lambda axes: _plot_speed(axes, curve), FLAT, "speed", label, sheet)


def trial_charts(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], sheet: StyleSheet) -> list[str]:
    """Return the held-out losses of several trainings, with the first one in front, as a wide and a narrow chart.

    Args:
        curves: the name of each training, and (step, loss) of its evaluations.
        sheet: the style sheet of the page.
    """
    first, values = curves[0]
    label = f"Held-out loss of {len(curves)} trials; that of {first} ends at {values[-1][1]:.4f}"
    return [
        _chart(lambda axes: _plot_trials(axes, curves), size, f"loss-{name}", label, sheet)
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]


def size_charts(curve: SizeCurve, sheet: StyleSheet) -> list[str]:
    """Return the divergence over the file's size, and the gain kept over it where that was measured."""
    knee, divergence = curve.sizes[curve.knee], curve.divergences[curve.knee]
    label = f"Mean KL divergence over the size of the file; the knee is at {knee / 1e6:.0f} MB, {divergence:.3f} nats"
    charts = [_chart(lambda axes: _plot_divergences(axes, curve), WIDE, "sizes", label, sheet)]
    if any(each.gain_kept is not None for each in curve.measured):
        label = "Share of the training's gain that is kept, over the size of the file"
        charts.append(_chart(lambda axes: _plot_gains(axes, curve), WIDE, "gains", label, sheet))
    return charts


def _chart(plot: Callable[[Axes], None], size: tuple[int, int], name: str, label: str, sheet: StyleSheet) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        plot(figure.subplots())
        return sheet.embed(figure, name, label)


def _plot_loss(axes: Axes, curve: TrainingCurve) -> None:
    axes.plot(curve.steps, curve.losses, color=TRAIN, linewidth=1, alpha=0.3)
    axes.plot(curve.steps, curve.smooth(), color=TRAIN, linewidth=2.2, label="training (moving mean)")
    if curve.held_out:
        steps, values = zip(*curve.held_out, strict=True)
        axes.plot(
            steps, values, color=HELD_OUT, linewidth=2.2, marker="o", markersize=7,
            markeredgecolor=PAPER, markeredgewidth=1.5, label="held out", clip_on=False, zorder=3,
        )  # fmt: skip
        for index in {0, len(steps) - 1}:
            axes.annotate(
                f"{values[index]:.2f}", (steps[index], values[index]), xytext=(9 if index == 0 else -9, 9),
                textcoords="offset points", ha="left" if index == 0 else "right", color=INK, fontweight="bold",
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the objective" if curve.accuracies else "loss (nats per token)")
    _start_at_zero(axes)
    axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _plot_accuracy(axes: Axes, curve: TrainingCurve) -> None:
    axes.plot(curve.steps, curve.smooth_accuracies(), color=TRAIN, linewidth=2.2, label="training (moving mean)")
    if curve.held_out_accuracies:
        steps, values = zip(*curve.held_out_accuracies, strict=True)
        axes.plot(
            steps, values, color=HELD_OUT, linewidth=2.2, marker="o", markersize=7,
            markeredgecolor=PAPER, markeredgewidth=1.5, label="held out", clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.08)
    axes.legend(loc="lower right", labelcolor=INK, fontsize=12)


def _plot_divergences(axes: Axes, curve: SizeCurve) -> None:
    pairs = [(size / 1e6, kl) for size, kl in zip(curve.sizes, curve.divergences, strict=True) if kl > 0]
    axes.plot(*zip(*pairs, strict=True), color=TRAIN, linewidth=2.2, label="predicted")
    knee, divergence = curve.sizes[curve.knee] / 1e6, curve.divergences[curve.knee]
    axes.plot([knee], [divergence], color=TRAIN, marker="D", markersize=9, linestyle="none", label="knee")
    if curve.measured:
        axes.plot(
            [each.size_bytes / 1e6 for each in curve.measured], [each.kl_mean for each in curve.measured],
            color=HELD_OUT, linestyle="none", marker="o", markersize=7, label="measured", zorder=3,
        )  # fmt: skip
        _name_points(axes, [(each.name, each.size_bytes / 1e6, each.kl_mean) for each in curve.measured])
    axes.set_yscale("log")
    axes.set_xlabel("size of the file (MB)")
    axes.set_ylabel("mean KL (nats)")
    axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _plot_gains(axes: Axes, curve: SizeCurve) -> None:
    points = [
        (figures.name, figures.size_bytes / 1e6, 100 * figures.gain_kept, 100 * (figures.gain_kept_error or 0.0))
        for figures in curve.measured
        if figures.gain_kept is not None
    ]
    names, sizes, gains, errors = zip(*points, strict=True)
    axes.errorbar(sizes, gains, yerr=errors, color=HELD_OUT, linestyle="none", marker="o", markersize=7)
    _name_points(axes, list(zip(names, sizes, gains, strict=True)))
    axes.set_xlabel("size of the file (MB)")
    axes.set_ylabel("gain kept (%)")


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    for name, size, value in points:
        axes.annotate(name, (size, value), xytext=(8, 6), textcoords="offset points", color=INK, fontsize=11)


def _plot_trials(axes: Axes, curves: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> None:
    for index, (name, values) in reversed(list(enumerate(curves))):
        steps, losses = zip(*values, strict=True)
        if index == 0:
            axes.plot(
                steps, losses, color=HELD_OUT, linewidth=2.4, marker="o", markersize=7,
                markeredgecolor=PAPER, markeredgewidth=1.5, label=name, zorder=3,
            )  # fmt: skip
        else:
            label = "other trials" if index == 1 else None
            axes.plot(steps, losses, color=MUTED, linewidth=1.2, alpha=0.55, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _plot_histogram(axes: Axes, parts: Sequence[ChatLengths], counts: Sequence[np.ndarray]) -> None:
    from matplotlib.ticker import MaxNLocator

    most = max(int(values.max()) for values in counts)
    bin_count = min(_BINS, most + 1)
    bins = [index * (most + 1) / bin_count for index in range(bin_count + 1)]
    for part, values, color in zip(parts, counts, (TRAIN, HELD_OUT), strict=False):
        axes.hist(
            values, bins=bins, color=color, alpha=0.85 if color == TRAIN else 1, label=part.name,
            edgecolor=PAPER, linewidth=1,
        )  # fmt: skip
    axes.set_xlabel("tokens")
    axes.set_ylabel("chats")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(parts) > 1:
        axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _plot_learning_rate(axes: Axes, curve: TrainingCurve) -> None:
    axes.fill_between(curve.steps, curve.rates, color=TRAIN, alpha=0.15, linewidth=0)
    axes.plot(curve.steps, curve.rates, color=TRAIN, linewidth=2.2)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=False)
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    _start_at_zero(axes)


def _plot_speed(axes: Axes, curve: TrainingCurve) -> None:
    axes.plot(curve.steps, curve.speeds, color=TRAIN, linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens per second")
    axes.spines["bottom"].set_color(GRID)
    _start_at_zero(axes)


def _start_at_zero(axes: Axes) -> None:
    """Start both axes at 0, and leave space above for a legend."""
    axes.set_xlim(left=0)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)

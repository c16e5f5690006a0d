"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .drawing import GRID, HELD_OUT, INK, MUTED, PAPER, SETTINGS, TRAIN, Sheet
from .facts import Curve, Lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW, FLAT = (920, 330), (400, 300), (400, 230)
_BINS = 24


def loss(curve: Curve, sheet: Sheet) -> list[str]:
    """Training and held-out loss against the steps: a wide picture, and a narrow one for a phone."""
    label = f"Training loss over {curve.steps[-1]} steps, from {curve.losses[0]:.2f} to {curve.losses[-1]:.2f}"
    if curve.held_out:
        label += f"; held-out loss from {curve.held_out[0][1]:.2f} to {curve.held_out[-1][1]:.2f}"
    return [
        _picture(lambda axes: _loss(axes, curve), size, f"loss-{name}", label, sheet)
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]


def lengths(found: Sequence[Lengths], which: str, sheet: Sheet) -> str:
    """How many chats have how many tokens, or how many tokens of answers ("answers")."""
    everything = [each.tokens if which == "tokens" else each.answers for each in found]
    most = max(int(values.max()) for values in everything)
    label = f"Histogram of {which if which == 'tokens' else 'answer tokens'} in a chat, at most {most}"
    return _picture(lambda axes: _histogram(axes, found, everything), NARROW, f"histogram-{which}", label, sheet)


def rate(curve: Curve, sheet: Sheet) -> str:
    """The learning rate and, behind it, how fast the training was."""
    label = f"Learning rate over the steps, at most {max(curve.rates):g}"
    return _picture(lambda axes: _rate(axes, curve), FLAT, "rate", label, sheet)


def speed(curve: Curve, sheet: Sheet) -> str:
    """Tokens a second, step by step."""
    label = "Tokens a second over the steps"
    return _picture(lambda axes: _speed(axes, curve), FLAT, "speed", label, sheet)


def several(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], sheet: Sheet) -> list[str]:
    """Held-out losses of several trainings against their steps, the first one in front: wide, and for a phone.

    Args:
        curves: a name, and (step, loss) of each evaluation.
        sheet: the page's.
    """
    first, values = curves[0]
    label = f"Held-out loss of {len(curves)} trials; that of {first} ends at {values[-1][1]:.4f}"
    return [
        _picture(lambda axes: _several(axes, curves), size, f"loss-{name}", label, sheet)
        for name, size in (("wide", WIDE), ("narrow", NARROW))
    ]


def _picture(draw: Any, size: tuple[int, int], name: str, label: str, sheet: Sheet) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure.subplots())
        return sheet.svg(figure, name, label)


def _loss(axes: Axes, curve: Curve) -> None:
    axes.plot(curve.steps, curve.losses, color=TRAIN, linewidth=1, alpha=0.3)
    axes.plot(curve.steps, curve.smooth(), color=TRAIN, linewidth=2.2, label="training (moving mean)")
    if curve.held_out:
        steps, values = zip(*curve.held_out, strict=True)
        axes.plot(
            steps, values, color=HELD_OUT, linewidth=2.2, marker="o", markersize=7,
            markeredgecolor=PAPER, markeredgewidth=1.5, label="held out", clip_on=False, zorder=3,
        )  # fmt: skip
        for at in {0, len(steps) - 1}:
            axes.annotate(
                f"{values[at]:.2f}", (steps[at], values[at]), xytext=(9 if at == 0 else -9, 9),
                textcoords="offset points", ha="left" if at == 0 else "right", color=INK, fontweight="bold",
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    _from_zero(axes)
    axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _several(axes: Axes, curves: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> None:
    for at, (name, values) in reversed(list(enumerate(curves))):
        steps, losses = zip(*values, strict=True)
        if at == 0:
            look: dict[str, Any] = {"color": HELD_OUT, "linewidth": 2.4, "marker": "o", "markersize": 7, "label": name}
            axes.plot(steps, losses, markeredgecolor=PAPER, markeredgewidth=1.5, zorder=3, **look)
        else:
            axes.plot(steps, losses, color=MUTED, linewidth=1.2, alpha=0.55, label="others" if at == 1 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats a token)")
    axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _histogram(axes: Axes, found: Sequence[Lengths], everything: Sequence[Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    most = max(int(values.max()) for values in everything)
    count = min(_BINS, most + 1)
    bins = [at * (most + 1) / count for at in range(count + 1)]
    for each, values, color in zip(found, everything, (TRAIN, HELD_OUT), strict=False):
        axes.hist(
            values, bins=bins, color=color, alpha=0.85 if color == TRAIN else 1, label=each.name,
            edgecolor=PAPER, linewidth=1,
        )  # fmt: skip
    axes.set_xlabel("tokens")
    axes.set_ylabel("chats")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(found) > 1:
        axes.legend(loc="upper right", labelcolor=INK, fontsize=12)


def _rate(axes: Axes, curve: Curve) -> None:
    axes.fill_between(curve.steps, curve.rates, color=TRAIN, alpha=0.15, linewidth=0)
    axes.plot(curve.steps, curve.rates, color=TRAIN, linewidth=2.2)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=False)
    axes.yaxis.get_offset_text().set_color(MUTED)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    _from_zero(axes)


def _speed(axes: Axes, curve: Curve) -> None:
    axes.plot(curve.steps, curve.speeds, color=TRAIN, linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens a second")
    axes.spines["bottom"].set_color(GRID)
    _from_zero(axes)


def _from_zero(axes: Axes) -> None:
    """Axes that begin at 0, with room above for a legend."""
    axes.set_xlim(left=0)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)

"""The HTML page about a sweep: its trials, the best first, and a chart of their held-out losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kolotune.foundation.files import write_text

from . import charts
from .inline_svg import StyleSheet
from .page import render_page

NAME = "sweep.html"
_TEMPLATE = "sweep.html.jinja"
Losses = Sequence[tuple[int, float]]


def write(
    folder: Path, title: str, names: Sequence[str], rows: Sequence[Mapping[str, object]], curves: Mapping[int, Losses]
) -> Path:
    """Write the page into the sweep's folder and return its path.

    Args:
        folder: of the sweep.
        title: what was trained, in a few words.
        names: the varied options.
        rows: the trials, the best first: `trial` (a number), a value for each name, `loss` or None, `failure`.
        curves: (step, held-out loss) of each evaluation, by the trial's number.
    """
    from markupsafe import Markup

    sheet = StyleSheet()
    trials = [int(str(row["trial"])) for row in rows]
    losses = [(f"trial {trial}", curves[trial]) for trial in trials if curves.get(trial)]
    svgs = [Markup(svg) for svg in charts.trial_charts(losses, sheet)] if losses else []
    page = render_page(_TEMPLATE, sheet, title=title, names=names, rows=rows, charts=svgs)
    write_text(folder / NAME, page)
    return folder / NAME

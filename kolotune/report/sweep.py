"""The page about a sweep: its trials, the best first, and their held-out losses in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kolotune.foundation.files import write_text

from . import figures
from .drawing import Sheet
from .page import document

NAME = "sweep.html"
_TEMPLATE = "sweep.html.jinja"
Losses = Sequence[tuple[int, float]]


def write(
    folder: Path, title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], curves: Mapping[int, Losses]
) -> Path:
    """Writes the page into the sweep's folder; returns its path.

    Args:
        folder: the sweep's.
        title: what was trained, in a few words.
        names: of the varied options.
        rows: the trials, the best first: `trial` (a number), a value for each name, `loss` or None, `failure`.
        curves: of the trials by their number, (step, held-out loss) of each evaluation.
    """
    from markupsafe import Markup

    sheet = Sheet()
    drawn = [(f"trial {row['trial']}", curves[row["trial"]]) for row in rows if curves.get(row["trial"])]
    pictures = [Markup(each) for each in figures.several(drawn, sheet)] if drawn else []
    page = document(_TEMPLATE, sheet, title=title, names=names, rows=rows, pictures=pictures)
    write_text(folder / NAME, page)
    return folder / NAME

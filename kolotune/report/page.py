"""The page: one file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import unicodedata
from pathlib import Path
from typing import Any

from kolotune.foundation.files import write_text
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.layout import RunFolder

from . import figures
from .drawing import Sheet
from .facts import NOTHING, Facts, gather

_TEMPLATE, _STYLE = "page.html.jinja", "style.css"
# Joiners make one picture of several emoji, or belong to a script; other characters without a look steer text.
_KEPT = "\n\t\u200c\u200d"


def write(folder: RunFolder) -> Path:
    """Writes the page of a finished run, if it is not there as it would be; returns its path.

    Raises:
        RunFolderError, ManifestError, ArtifactError: the run is not finished, or a part can't be read.
    """
    text = render(gather(folder))
    if not folder.report.is_file() or folder.report.read_bytes() != text.encode():
        write_text(folder.report, text)
    return folder.report


def visible(text: str) -> str:
    """`text` with marks in place of characters that have no look of their own: they could steer who reads it."""
    return "".join(_mark(char) if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char not in _KEPT and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _mark(char: str) -> str:
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def render(facts: Facts) -> str:
    """The page as HTML."""
    from markupsafe import Markup

    sheet = Sheet()
    # Of our own making: matplotlib's elements with our attributes, and the texts in them escaped by the XML writer.
    pictures = {name: [Markup(each) for each in drawn] for name, drawn in _pictures(facts, sheet).items()}
    return document(
        _TEMPLATE,
        sheet,
        facts=facts,
        manifest=facts.manifest,
        pictures=pictures,
        results=_results(facts),
        whole=json.dumps(_plain(facts), indent=1, ensure_ascii=False),
    )


def document(template: str, sheet: Sheet, **values: Any) -> str:
    """A page as HTML. Every text is escaped; nothing in it is believed to be markup but the pictures.

    Args:
        template: name of a file in this room.
        sheet: the rules of the pictures.
        values: variables of the template; `policy` and `style` are added.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"size": format_size, "number": _number, "duration": _duration, "short": _short}
    style = f"\n{_resource(_STYLE)}\n{sheet.css}\n"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = environment.from_string(_resource(template)).render(policy=policy, style=Markup(style), **values)
    return page + "\n"


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _pictures(facts: Facts, sheet: Sheet) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if facts.curve is not None:
        found["loss"] = figures.loss(facts.curve, sheet)
        found["training"] = [figures.rate(facts.curve, sheet), figures.speed(facts.curve, sheet)]
    if facts.lengths:
        found["lengths"] = [figures.lengths(facts.lengths, which, sheet) for which in ("tokens", "answers")]
    return found


def _results(facts: Facts) -> list[dict[str, Any]]:
    """The run's results with their share of the largest, in percent; what is only a step on the road is left out."""
    shown = {name: each for name, each in facts.manifest.artifacts.items() if not name.startswith(".")}
    largest = max((each.size for each in shown.values()), default=1)
    return [
        {"name": name, "share": 100 * each.size / largest, **dataclasses.asdict(each)} for name, each in shown.items()
    ]


def _plain(facts: Facts) -> dict[str, Any]:
    return dataclasses.asdict(facts.manifest)


def _number(value: float | None, digits: int | None = None) -> str:
    """With thin spaces between thousands, or with so many digits behind the point."""
    if value is None:
        return NOTHING
    if digits is None:
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _short(digest: str) -> str:
    return digest[:12]

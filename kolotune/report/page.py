"""The report's HTML: one file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import unicodedata
from pathlib import Path

from kolotune.foundation.files import write_text
from kolotune.foundation.formatting import format_duration, format_size
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import RunFolder
from kolotune.stages.prepare import noun_of

from . import charts
from .facts import EN_DASH, ReportFacts, gather_facts
from .inline_svg import StyleSheet

_TEMPLATE, _STYLE = "page.html.jinja", "style.css"
# Joiners combine several emoji into one, or belong to a script. Other invisible characters can reorder text.
_HARMLESS = "\n\t\u200c\u200d"


def write(folder: RunFolder) -> Path:
    """Write the report of a finished run and return its path; an up-to-date file is left alone.

    Raises:
        RunFolderError, ManifestError, ArtifactError: as from `gather_facts`.
    """
    text = render(gather_facts(folder))
    if not folder.report.is_file() or folder.report.read_bytes() != text.encode():
        write_text(folder.report, text)
    return folder.report


def show_invisible(text: str) -> str:
    """Replace invisible characters, which could mislead the reader, with visible marks."""
    return "".join(_mark(char) if _is_invisible(char) else char for char in text)


def _is_invisible(char: str) -> bool:
    return char not in _HARMLESS and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _mark(char: str) -> str:
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def render(facts: ReportFacts) -> str:
    """Return the report as HTML."""
    from markupsafe import Markup

    sheet = StyleSheet()
    # Safe markup: matplotlib's elements with our attributes, and text that the XML writer escaped.
    chart_markup = {name: [Markup(svg) for svg in svgs] for name, svgs in _charts(facts, sheet).items()}
    return render_page(
        _TEMPLATE,
        sheet,
        facts=facts,
        noun=noun_of(facts.manifest.data.counts),
        manifest=facts.manifest,
        charts=chart_markup,
        results=_results(facts),
        manifest_json=json.dumps(dataclasses.asdict(facts.manifest), indent=1, ensure_ascii=False),
    )


def render_page(template: str, sheet: StyleSheet, **values: object) -> str:
    """Return a page as HTML. All text is escaped; only charts are trusted as markup.

    Args:
        template: name of a file in this package.
        sheet: the style rules of the charts.
        values: variables of the template, beside `policy` and `style`.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            show_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters |= {"size": format_size, "number": _number, "duration": format_duration, "short": _short}
    style = f"\n{_resource(_STYLE)}\n{sheet.css}\n"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = environment.from_string(_resource(template)).render(policy=policy, style=Markup(style), **values)
    return page + "\n"


def _resource(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _charts(facts: ReportFacts, sheet: StyleSheet) -> dict[str, list[str]]:
    svgs: dict[str, list[str]] = {}
    if facts.curve is not None:
        svgs["loss"] = charts.loss_charts(facts.curve, sheet)
        if facts.curve.accuracies:
            svgs["accuracy"] = [charts.accuracy_chart(facts.curve, sheet)]
        svgs["training"] = [charts.learning_rate_chart(facts.curve, sheet), charts.speed_chart(facts.curve, sheet)]
    if facts.sizes is not None:
        svgs["sizes"] = charts.size_charts(facts.sizes, sheet)
    if facts.lengths:
        svgs["lengths"] = [charts.length_histogram(facts.lengths, which, sheet) for which in ("tokens", "answers")]
    return svgs


def _results(facts: ReportFacts) -> list[JsonObject]:
    """Return the run's results with their size as a percentage of the largest; intermediate files are left out."""
    shown = {name: artifact for name, artifact in facts.manifest.artifacts.items() if not name.startswith(".")}
    largest = max((artifact.size for artifact in shown.values()), default=1)
    return [
        {"name": name, "share": 100 * artifact.size / largest, **dataclasses.asdict(artifact)}
        for name, artifact in shown.items()
    ]


def _number(value: float | None, digits: int | None = None) -> str:
    """Format a number with spaces between thousands, or with `digits` decimal places."""
    if value is None:
        return EN_DASH
    if digits is None:
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    if value and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _short(digest: str) -> str:
    return digest[:12]

"""matplotlib figures as SVG elements of the page, coloured by the page's style sheet.

matplotlib writes fixed colours into style attributes, but the page has two colour schemes and its content security
policy allows no style attributes. So charts are plotted in placeholder colours, and each style attribute becomes a
class whose rule uses the page's custom property instead of the placeholder.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders that no chart uses for anything else.
INK, MUTED, GRID, TRAIN, HELD_OUT, PAPER = (f"#01020{index}" for index in range(6))
_PROPERTIES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", TRAIN: "--train", HELD_OUT: "--held-out", PAPER: "--card",
}  # fmt: skip
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
SETTINGS: Any = {  # matplotlib's type names each setting
    "svg.fonttype": "none",  # text stays text: it can be read aloud, selected, and has the page's font
    "font.size": 12,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.facecolor": "none", "axes.linewidth": 1,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlecolor": INK,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 1,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.major.pad": 6, "ytick.major.pad": 6,
    "text.color": INK, "figure.facecolor": "none", "legend.frameon": False,
}  # fmt: skip


class StyleSheet:
    """The style rules that charts need, each once."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}

    @property
    def css(self) -> str:
        """The rules as CSS."""
        return "\n".join(f".{name} {{ {style} }}" for style, name in self._classes.items())

    def embed(self, figure: Figure, name: str, label: str) -> str:
        """Return a figure as an SVG element.

        Args:
            figure: plotted with `SETTINGS`.
            name: unique on the page; it prefixes the element's ids.
            label: the text that a screen reader speaks.
        """
        import matplotlib

        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
            figure.savefig(buffer, format="svg", metadata=nothing)
        root = ET.fromstring(buffer.getvalue())
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                    parent.remove(child)  # matplotlib's own rules would apply to the whole page
        used = _referenced_ids(root)
        for element in root.iter():
            self._restyle(element, used, name)
        for size in ("width", "height", "version"):
            root.attrib.pop(size, None)
        root.attrib |= {"role": "img", "aria-label": label, "class": f"figure {name}"}
        return ET.tostring(root, encoding="unicode")

    def _restyle(self, element: ET.Element, used: set[str], name: str) -> None:
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "style":
                element.set("class", self._class_of(value))
            elif key == f"{_XLINK}href":
                element.set("href", f"#{name}-{value[1:]}")
            elif key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
            else:
                element.set(key, value)

    def _class_of(self, style: str) -> str:
        for placeholder, custom_property in _PROPERTIES.items():
            style = style.replace(placeholder, f"var({custom_property})")
        if "font:" in style:  # use the page's font in the plotted size
            parts = [part.strip() for part in style.split(";") if part.strip()]
            size = next(word for part in parts if part.startswith("font:") for word in part.split() if "px" in word)
            style = "; ".join([f"font-size: {size}", *[part for part in parts if not part.startswith("font:")]])
        return self._classes.setdefault(style, f"f{len(self._classes)}")


def _referenced_ids(root: ET.Element) -> set[str]:
    ids = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == f"{_XLINK}href":
                ids.add(value[1:])
            elif value.startswith("url(#"):
                ids.add(value[5:-1])
    return ids

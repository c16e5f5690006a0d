"""The report in a real browser, offline: no errors, everything visible and readable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import PROGRAM, Page, browser

from kolotune.report import page as pages
from kolotune.run_folder.layout import RunFolder

pytestmark = pytest.mark.skipif(
    not PROGRAM and not os.environ.get("KOLOTUNE_NEEDS_CHROMIUM"), reason="there is no Chromium here"
)
# Texts whose contrast with their background is below 4.5 to 1 (WCAG 2, AA), by their computed styles.
CONTRAST = """
const linear = (part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const channel = (value) => linear(value / 255);
const light = (color) => 0.2126 * channel(color[0]) + 0.7152 * channel(color[1]) + 0.0722 * channel(color[2]);
const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
const over = (top, below) => [0, 1, 2].map((at) => top[at] * top[3] + below[at] * (1 - top[3]));
const behind = (element) => {
  if (!element) return [255, 255, 255];
  const color = parse(getComputedStyle(element).backgroundColor);
  return color[3] === 1 ? color.slice(0, 3) : over(color, behind(element.parentElement));
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let count = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const below = behind(element);
  const color = over(parse(element instanceof SVGElement ? style.fill : style.color), below);
  const [a, b] = [light(color), light(below)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  count += 1;
  if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${walker.currentNode.data.trim().slice(0, 40)}`);
}
return [count, found];
"""
# Elements that extend past the right edge of the window, unless a parent scrolls.
OVERFLOW = """
const width = document.documentElement.clientWidth;
const reaches = (element) => element.getBoundingClientRect().right > width + 0.5;
const wide = (element) => reaches(element) && !element.parentElement.closest(".scroll");
return [document.documentElement.scrollWidth - width,
        [...document.body.querySelectorAll("*")].filter(wide).map((each) => each.tagName + "." + each.className)];
"""
PICTURES = """
return [...document.querySelectorAll("svg.figure")].map((each) => {
  const box = each.getBoundingClientRect();
  const paths = [...each.querySelectorAll("path")].filter((path) => path.getBoundingClientRect().width > 0);
  const strokes = new Set(paths.map((path) => getComputedStyle(path).stroke));
  return [each.classList[1], Math.round(box.width), Math.round(box.height), paths.length, strokes.size];
});
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    assert PROGRAM, "KOLOTUNE_NEEDS_CHROMIUM is set, and there is no Chromium"
    with browser() as page:
        yield page


@pytest.fixture
def written(hostile_run: RunFolder) -> Path:
    return pages.write(hostile_run)


def test_light_and_dark_wide_and_on_a_phone(written: Path, chromium: Page, tmp_path: Path) -> None:
    papers = set()
    for width in (1100, 390):
        for scheme in ("light", "dark"):
            chromium.open(written, width=width, scheme=scheme)
            assert chromium.problems == []
            papers.add(chromium.evaluate("return getComputedStyle(document.body).backgroundColor"))
            assert chromium.evaluate(OVERFLOW) == [0, []], (width, scheme)
            count, too_weak = chromium.evaluate(CONTRAST)
            assert count > 150 and too_weak == [], (width, scheme)
            seen = {name: size for name, *size in chromium.evaluate(PICTURES) if size[0]}
            wanted = "loss-wide" if width > 640 else "loss-narrow"
            assert set(seen) == {wanted, "rate", "speed", "histogram-tokens", "histogram-answers"}
            for name, (wide, high, paths, strokes) in seen.items():
                assert 250 < wide < width and high > 150 and paths > 5 and strokes > 1, name
    assert len(papers) == 2
    assert {url.partition(":")[0] for url in chromium.requests} == {"file"}
    assert chromium.evaluate("return [typeof window.hurt, document.scripts.length, document.images.length]") == [
        "undefined",
        0,
        0,
    ]
    chromium.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "page.pdf").stat().st_size > 40_000


def test_the_checks_detect_faults(written: Path, chromium: Page) -> None:
    """Low contrast, an element that is too wide, and a script are all detected."""
    chromium.open(written, width=390)
    chromium.evaluate("document.documentElement.style.setProperty('--muted', '#b0b7c3')")
    assert len(chromium.evaluate(CONTRAST)[1]) > 20
    chromium.evaluate("document.querySelector('h1').style.width = '500px'")
    excess, elements = chromium.evaluate(OVERFLOW)
    assert excess > 0 and "H1." in elements
    html = written.read_text(encoding="utf-8").replace("<header>", "<header><script>window.hurt = 1</script>")
    written.write_text(html, encoding="utf-8")
    chromium.open(written, width=390)
    assert any("script" in each for each in chromium.problems)
    assert chromium.evaluate("return typeof window.hurt") == "undefined"  # the page's own policy held
    chromium.problems.clear()

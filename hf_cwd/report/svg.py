"""Line styles, and the conversion of matplotlib's SVG for the page: its colours, and titles for its curves."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

INK = "#1c1f24"  # the colour of axes and text; the page replaces it by the colour of its text
# Based on Okabe and Ito's colours, which suit all kinds of colour vision; some are darker, to be visible on white. The
# page has a lighter version of each for a dark background.
COLOURS = ("#0072b2", "#c8500a", "#007a59", "#a8478a", "#8a6d00", "#2b8fd0", "#5c6470")
DARK = ("#5ab4f0", "#ff8f4d", "#35c79a", "#e58fc8", "#e3bd3a", "#a5d8ff", "#b4bcc8")
# The number of dashes has no common divisor with the number of colours: 28 pens differ, and neighbours differ in both.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (7, 2, 1.2, 2))
MARKERS = "osD^"
PENS = len(COLOURS) * len(DASHES)


def pen(place: int, *, thick: bool, crowd: bool = False) -> dict[str, Any]:
    """matplotlib's line properties for the group at `place`; in a `crowd` thin lines are paler."""
    dashes = DASHES[place % len(DASHES)]
    style: dict[str, Any] = {
        "color": COLOURS[place % len(COLOURS)],
        "linewidth": 1.9 if thick else 0.8,
        "zorder": 3 if thick else 2,
    }
    if thick:
        style["linestyle"] = (0, dashes) if dashes else "-"
    else:
        style["alpha"] = 0.15 if crowd else 0.35
    return style


def marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def identifier(text: str) -> str:
    """Converts `text` for file names and ids of elements."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:60] or "chart"


def swatch(place: int) -> str:
    """A short line for the legend of the page."""
    dashes = " ".join(f"{1.9 * length:g}" for length in DASHES[place % len(DASHES)])
    return (
        '<svg class="swatch" viewBox="0 0 36 8" aria-hidden="true"><path d="M1 4H35" fill="none" stroke-width="2.4" '
        f'stroke="var(--s{place % len(COLOURS)})" stroke-dasharray="{dashes or "none"}"/></svg>'
    )


def inline(text: str, name: str, title: str, labels: Sequence[str]) -> str:
    """Converts matplotlib's SVG to an element of a page that has several.

    Args:
        name: unique in the page; the prefix of every id.
        title: a description of the chart for screen readers.
        labels: the labels of the groups; a curve with the id ``line-PLACE-...`` gets the label at PLACE.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--s{number})")
    text = text.replace(INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*; ", "", text)

    def titled(match: re.Match[str]) -> str:
        return f"{match[0]}<title>{escape(labels[int(match[1])])}</title>"

    text = re.sub(rf'<g id="{re.escape(name)}-line-(\d+)-\d+">', titled, text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    start = f'<svg {box[0]} role="img" aria-labelledby="{name}-title"><title id="{name}-title">{escape(title)}</title>'
    return re.sub(r"\s*\n\s*", "\n", start + text[text.index(">") + 1 :])

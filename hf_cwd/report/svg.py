"""Pens, and matplotlib's SVG made fit for a page: its colours are the page's, and its curves say whose they are."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

INK = "#1c1f24"  # of axes and text; on the page it is the colour of the text around the picture
# After Okabe and Ito's colours for all kinds of colour vision, darker where they would vanish on white.
# The page has a lighter one of each for a dark background.
COLOURS = ("#0072b2", "#c8500a", "#007a59", "#a8478a", "#8a6d00", "#2b8fd0", "#5c6470")
DARK = ("#5ab4f0", "#ff8f4d", "#35c79a", "#e58fc8", "#e3bd3a", "#a5d8ff", "#b4bcc8")
# As many as have no divisor in common with the colours: 28 pens differ, and neighbours in both.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (7, 2, 1.2, 2))
MARKERS = "osD^"
PENS = len(COLOURS) * len(DASHES)


def pen(place: int, *, thick: bool, crowd: bool = False) -> dict[str, Any]:
    """matplotlib's line properties for the setting at `place`; in a `crowd` thin lines are paler."""
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
    """`text` as part of a file name and of an element's id."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:60] or "chart"


def swatch(place: int) -> str:
    """A piece of line, for the legend of the page."""
    dashes = " ".join(f"{1.9 * length:g}" for length in DASHES[place % len(DASHES)])
    return (
        '<svg class="swatch" viewBox="0 0 36 8" aria-hidden="true"><path d="M1 4H35" fill="none" stroke-width="2.4" '
        f'stroke="var(--s{place % len(COLOURS)})" stroke-dasharray="{dashes or "none"}"/></svg>'
    )


def inline(text: str, name: str, title: str, labels: Sequence[str]) -> str:
    """matplotlib's SVG as an element of a page that may hold others.

    Args:
        name: unique in the page; starts every id.
        title: what the picture shows, for those who do not see it.
        labels: of the settings, for curves with an id ``line-PLACE-...``.
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

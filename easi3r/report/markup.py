"""HTML and SVG elements; the standard library serialises them, so text and attributes cannot escape their places."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree.ElementTree import Element, tostring


def tag(name: str, /, *children: Element | str, **attributes: str | float) -> Element:
    """An element; ``class_`` and ``stroke_width`` are written class and stroke-width.

    >>> page_text(tag("p", "1 < 2 ", tag("b", "&"), class_="note"))
    '<p class="note">1 &lt; 2 <b>&amp;</b></p>'
    """
    element = Element(name)
    for key, value in attributes.items():
        element.set(key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else number(value))
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def number(value: float) -> str:
    """Short text of a coordinate or a length.

    >>> number(2.0), number(1 / 3)
    ('2', '0.33')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")


def page_text(element: Element) -> str:
    """Serialise as HTML 5."""
    return tostring(element, encoding="unicode", method="html")


def facts_table(facts: Mapping[str, str]) -> Element:
    """Names and what is said of them, as rows."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in facts.items()]
    return tag("table", tag("tbody", *rows), class_="facts")

"""The page: the headline with its verdict, and the sections in the order in which one looks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from xml.etree.ElementTree import Element

from easi3r.report.film import attention_figure, film_strip
from easi3r.report.markup import page_text, tag
from easi3r.report.measurements import cameras, numbers, share_moving
from easi3r.report.origin import conventions, origin
from easi3r.report.style import STYLE
from easi3r.scene import Motion, Scene

VERDICTS = {  # what each means, for somebody who reads nothing else
    "good": "Good: cameras and depth explain what the images show.",
    "doubtful": "Doubtful: look closer before you rely on cameras and depth.",
    "bad": "Bad: do not rely on cameras and depth.",
}
RESTRICTED = re.compile(r"non-?commercial|\bNC\b", re.IGNORECASE)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # whatever a name holds: nothing runs or loads


def page(result: Motion) -> str:
    """HTML 5 of a Motion or a Scene, as text; everything it needs is in ``result``."""
    sections = [headline(result), film_strip(result), attention_figure(result)]
    if isinstance(result, Scene):
        sections.append(cameras(result))
    sections += [numbers(result), origin(result), conventions(result)]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name_of(result.meta)} · easi3r"),
        tag("style", STYLE),
    )
    return "<!doctype html>\n" + page_text(tag("html", head, tag("body", tag("main", *sections)), lang="en")) + "\n"


def headline(result: Motion) -> Element:
    """What it is, whether it can be trusted, and what the weights may be used for."""
    meta, (n, height, width) = result.meta, result.images.shape[:3]
    facts = [f"{n} frame{'s' * (n != 1)} of {width}x{height} pixels"]
    if n > 1:
        facts.append(f"{result.timestamps[-1] - result.timestamps[0]:.3g} s")
    facts.append(f"{share_moving(result).mean():.1%} of the pixels move")
    if "scale" in meta:
        facts.append(f"cameras and depth {meta['scale']}")
    if timings := meta.get("timings_s"):
        facts.append(f"computed in {sum(timings.values()):.1f} s")
    quality = meta.get("quality") or {}
    verdict = str(quality.get("verdict", ""))
    words = VERDICTS.get(verdict, verdict) or (
        "No verdict: none was recorded." if isinstance(result, Scene) else "Masks alone: no cameras, hence no verdict."
    )
    box = tag("div", tag("p", words), class_=f"verdict {verdict if verdict in VERDICTS else ''}".strip())
    if reasons := quality.get("reasons"):
        box.append(tag("ul", *(tag("li", str(reason)) for reason in reasons)))
    if unknown := quality.get("not_checked"):
        box.append(tag("p", "What could not be checked:", class_="muted"))
        box.append(tag("ul", *(tag("li", str(sentence)) for sentence in unknown), class_="muted"))
    if quality:
        box.append(tag("p", "Judged without ground truth, by what can be measured from the result.", class_="muted"))
    header = tag("header", tag("h1", name_of(meta)), tag("p", " · ".join(facts), class_="muted"), box)
    if checkpoint := meta.get("checkpoint"):
        header.append(licence(checkpoint))
    return header


def licence(checkpoint: Mapping[str, Any]) -> Element:
    """Of the weights, and so of what was made with them; what restricts its use is set in red."""
    terms = str(checkpoint.get("licence") or "unknown")
    free = not (RESTRICTED.search(terms) or terms.startswith("unknown"))
    return tag(
        "p",
        f"Weights: {checkpoint.get('name')}; licence: ",
        tag("span", terms, class_="licence" if free else "licence restricted"),
    )


def name_of(meta: Mapping[str, Any]) -> str:
    """The clip's name, for people."""
    source = str(meta.get("source", ""))
    return "A clip from an array" if source in ("", "array") else PurePath(source).name or source

"""``index.html``: one row per clip, for people; one file, nothing is loaded from elsewhere and nothing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote
from xml.etree.ElementTree import Element

from easi3r.batches.clips import Clip
from easi3r.batches.records import Record
from easi3r.report.markup import page_text, tag
from easi3r.report.page import POLICY
from easi3r.report.style import STYLE

COLUMNS = ("", "clip", "quality", "frames", "moves", "time", "memory", "error")
MORE_STYLE = """
table.batch { width: 100%; }
table.batch td, table.batch th { border-top: 1px solid var(--edge); padding: .4rem .8rem .4rem 0; }
table.batch td { overflow-wrap: anywhere; min-width: 4rem; }
table.batch img { display: block; width: 10rem; height: auto; }
.good { color: var(--good); } .doubtful { color: var(--doubtful); } .bad, .failed { color: var(--bad); }
"""


def page(folder: Path, clips: Sequence[Clip], records: Mapping[str, Record], counts: Mapping[str, int]) -> str:
    """HTML 5 as text."""
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{folder.resolve().name} · easi3r batch"),
        tag("style", STYLE + MORE_STYLE),
    )
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in COLUMNS))),
        tag("tbody", *(row(clip, records.get(clip.name)) for clip in clips)),
        class_="batch",
    )
    header = tag("header", tag("h1", str(folder)), tag("p", f"{len(clips)} clips: {said}", class_="muted"))
    body = tag("body", tag("main", header, tag("div", table, class_="scroll")))
    return "<!doctype html>\n" + page_text(tag("html", head, body, lang="en")) + "\n"


def row(clip: Clip, record: Record | None) -> Element:
    """Picture of the mask, path, verdict, frames, share that moves, seconds, memory, error."""
    if record is None:
        return tag("tr", tag("td"), tag("td", clip.relative), tag("td", "waiting", class_="muted"), *blanks(5))
    time = "" if record.seconds is None else f"{record.seconds:.1f} s"
    memory = "" if record.memory_gib is None else f"{record.memory_gib:.2f} GiB"
    if record.gpu_memory_gib is not None:
        memory += f", GPU {record.gpu_memory_gib:.2f} GiB"
    frames = "" if record.frames is None else str(record.frames)
    if record.status == "failed":
        cells = [
            tag("td"),
            tag("td", clip.relative),
            tag("td", "failed", class_="failed"),
            tag("td", frames),
            tag("td"),
        ]
        return tag("tr", *cells, tag("td", time), tag("td", memory), tag("td", record.error or ""))
    address = f"clips/{quote(clip.name)}/report.html"
    picture = tag("img", src=record.picture or "", alt="what moves")
    verdict = tag("td", tag("b", record.verdict or "", class_=record.verdict or ""), *map(small, record.reasons))
    return tag(
        "tr",
        tag("td", tag("a", picture, href=address)),
        tag("td", tag("a", clip.relative, href=address)),
        verdict,
        tag("td", frames),
        tag("td", "" if record.moving_share is None else f"{record.moving_share:.1%}"),
        tag("td", time),
        tag("td", memory),
        tag("td"),
    )


def small(sentence: str) -> Element:
    """A reason of the verdict."""
    return tag("div", tag("small", sentence), class_="muted")


def blanks(count: int) -> list[Element]:
    """Empty cells."""
    return [tag("td") for _ in range(count)]

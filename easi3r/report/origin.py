"""How a result was made, enough to repeat it, and how its files are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from easi3r.config import Settings
from easi3r.report.charts import bars
from easi3r.report.markup import facts_table, tag
from easi3r.scene import Motion

SHOWN = {  # keys of ``meta`` that have a place of their own
    *("quality", "settings", "checkpoint", "versions", "timings_s", "pieces", "scale", "source", "names", "crops"),
    *("device", "dtype", "seed", "alignment", "warnings", "moving_share"),
}


def origin(result: Motion) -> Element:
    """How it was made: enough to repeat it."""
    meta = result.meta
    section = tag("section", tag("h2", "How it was made"))
    if timings := meta.get("timings_s"):
        section.append(tag("h3", f"Time per stage ({sum(timings.values()):.1f} s in all)"))
        section.append(bars({str(k): float(v) for k, v in timings.items()}, "s"))
    section.append(tag("h3", "Input and weights"))
    section.append(facts_table(sources(result)))
    if settings := meta.get("settings"):
        defaults, used = flattened(Settings().as_dict()), flattened(settings)
        changed = {k: f"{said(v)} (default: {said(defaults.get(k))})" for k, v in used.items() if v != defaults.get(k)}
        section.append(tag("h3", "Settings"))
        section.append(facts_table(changed) if changed else tag("p", "All as they are by default."))
        rest = {k: said(v) for k, v in used.items() if k not in changed}
        section.append(tag("details", tag("summary", f"The other {len(rest)}, at their defaults"), facts_table(rest)))
    if other := {k: said(v) for k, v in meta.items() if k not in SHOWN}:
        section.append(tag("details", tag("summary", "What else is known"), facts_table(other)))
    return section


def sources(result: Motion) -> dict[str, str]:
    """Source, pieces, weights, device and versions, as far as they are known."""
    meta = result.meta
    facts: dict[str, str] = {}
    if "source" in meta:
        facts["source"] = str(meta["source"])
    if names := meta.get("names"):
        facts["frames"] = str(names[0]) if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
    if crops := meta.get("crops"):
        facts["size"] = crop_words(crops[0]) + (" (and others)" if any(crop != crops[0] for crop in crops) else "")
    if pieces := meta.get("pieces"):
        facts["pieces" if len(pieces) > 1 else "masks"] = "; ".join(piece_words(piece) for piece in pieces)
    if warnings := meta.get("warnings"):
        facts["warnings"] = " ".join(warnings)
    if "alignment" in meta:
        facts["alignment"] = str(meta["alignment"])
    if checkpoint := meta.get("checkpoint"):
        if "network" in checkpoint:
            facts["network"] = str(checkpoint["network"])
        facts["weights"] = str(checkpoint.get("name"))
        facts["their SHA-256"] = str(checkpoint.get("sha256") or "unknown: a network object, not a file")
        facts["their licence"] = str(checkpoint.get("licence"))
    for name in ("device", "dtype", "seed"):
        if name in meta:
            facts[name] = str(meta[name])
    if versions := meta.get("versions"):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def piece_words(piece: Mapping[str, Any]) -> str:
    """What is noted of a piece of the clip."""
    (start, stop), threshold, seam = piece["frames"], piece.get("threshold"), piece.get("seam_residual")
    words = f"frames {start} to {stop - 1}: "
    each = threshold if isinstance(threshold, list) else [threshold]  # one per frame, or one
    found = [value for value in each if value is not None]
    if not found:
        words += "no threshold was needed"
    elif len(each) == 1:
        words += f"threshold {found[0]:.3g} of the dynamic score"
    else:
        words += f"thresholds from {min(found):.3g} to {max(found):.3g} of the dynamic score, one per frame"
    return words if seam is None else f"{words}, off by {seam:.1%} of the depth where it joins the one before"


def crop_words(crop: Mapping[str, Any]) -> str:
    """How a source frame became an image."""
    sizes = {name: f"{crop[name][0]}x{crop[name][1]}" for name in ("original", "resized", "size")}
    words = f"source frames of {sizes['original']}"
    if sizes["resized"] != sizes["original"]:
        words += f", resized to {sizes['resized']}"
    if sizes["size"] != sizes["resized"]:
        words += f", cut to {sizes['size']} at {crop['offset'][0]}, {crop['offset'][1]}"
    return words


def conventions(result: Motion) -> Element:
    """How to read the files beside the report."""
    code = f'from easi3r import {type(result).__name__}; result = {type(result).__name__}.load("this folder")'
    return tag(
        "section",
        tag("h2", "How to read the files"),
        tag("p", tag("code", code)),
        facts_table(result.conventions),
    )


def said(value: Any) -> str:
    """A plain value in words, cut where it is long."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 500 else text[:500] + " …"


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested settings."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

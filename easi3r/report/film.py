"""What was found, in pictures: the film strip, and the attention maps behind the masks."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from easi3r.quality import quantile
from easi3r.report.markup import tag
from easi3r.report.pictures import CIVIDIS, MAGMA, VIRIDIS, colour, colour_bar, overlay, picture, sample
from easi3r.scene import Motion, Scene
from easi3r.structures import Array, AttentionMaps

STRIP_FRAMES, ATTENTION_FRAMES = 8, 4

# Name of a map -> what it is in the product; and what the maps are.  Of networks that see pairs:
PAIR_COLUMNS = {
    "source_mean": "factor 1 - map",
    "source_std": "times the map",
    "reference_mean": "times the map",
    "reference_std": "times 1 - map",
    "dynamic_map": "= the product",
}
PAIR_NOTE = (
    "How strongly other frames attend to each token of a frame, averaged over its pairs (mean) and how much that "
    "varies (std), when it is the source and when it is the reference of a pair. What moves is attended to little "
    "as a source, steadily as a reference, and unevenly from pair to pair; so the product of the four finds it, "
    "before clustering and threshold make the mask."
)
# Of networks that see all frames at once:
GRAM_COLUMNS = {
    "qq_mean_3_7": "factor 1 - map",
    "qq_std_18_19": "times 1 - map",
    "qq_mean_17_21": "times the map",
    "kk_mean_0": "times 1 - map",
    "qk_std_0": "times the map",
    "dynamic_map": "= the product",
}
GRAM_NOTE = (
    "How like the queries (q) and keys (k) of each token are to those of frames a little before and after, in some "
    "layers (counted from 0) of the attention among all frames: the mean over the other frames' tokens, and how much "
    "it varies among them (std). The product of the five finds what moves, before clustering and threshold make the "
    "mask."
)


def film_strip(result: Motion) -> Element:
    """A few frames, and below each what was found in it."""
    frames = sample(result.num_frames, STRIP_FRAMES)
    rows = [strip_row("Image", "", None, [picture(result.images[i], frame_text(result, i)) for i in frames])]
    if isinstance(result, Scene):
        rows += depth_rows(result, frames)
    scores = [colour(result.dynamic_score[i], 0, 1, MAGMA) for i in frames]
    rows.append(strip_row("Dynamic score", "0 to 1, higher moves more", MAGMA, tiles(scores, frames, "dynamic score")))
    masks = [overlay(result.images[i], result.dynamic_mask[i]) for i in frames]
    rows.append(strip_row("Dynamic mask", "what moves, in red", None, tiles(masks, frames, "dynamic mask")))
    heads = [tag("th", tag("small", ""), scope="col")]
    heads += [tag("th", f"frame {i}", tag("small", f"{result.timestamps[i]:.2f} s"), scope="col") for i in frames]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="strip")
    few = f"max-width: {10 + 17 * len(frames)}rem; min-width: {10 + 4 * len(frames)}rem"  # they need not fill the page
    table.set("style", few)
    return tag("section", tag("h2", "What was found"), tag("div", table, class_="scroll"))


def depth_rows(scene: Scene, frames: Sequence[int]) -> list[Element]:
    """Depth and confidence of some frames, coloured alike in all of them."""
    valid = scene.valid_mask[frames]
    depth = np.where(valid & (scene.depth[frames] > 0), scene.depth[frames], np.nan)
    near, far = quantile(depth[:, ::2, ::2], 0.02), quantile(depth[:, ::2, ::2], 0.98)
    inverse = [colour(1 / d, 1 / far, 1 / near, VIRIDIS) for d in depth]
    confidence = np.where(valid, scene.confidence[frames], np.nan)
    most = quantile(confidence[:, ::2, ::2], 0.98)
    logarithms = [colour(np.log(np.maximum(c, 1)), 0.0, np.log(max(most, 1)), CIVIDIS) for c in confidence]
    unit = scene.meta.get("scale", "up to scale")
    ends = f"far {far:.3g} to near {near:.3g}, {unit}" if np.isfinite(near) else "none is known"
    high = f"1 to {most:.3g}, higher is better" if np.isfinite(most) else "none is known"
    return [
        strip_row("Depth", ends, VIRIDIS, tiles(inverse, frames, "depth")),
        strip_row("Confidence", high, CIVIDIS, tiles(logarithms, frames, "confidence")),
    ]


def tiles(images: Sequence[Array], frames: Sequence[int], what: str) -> list[Element]:
    """One picture per frame, with its name."""
    return [picture(image, f"{what} of frame {i}") for image, i in zip(images, frames, strict=True)]


def strip_row(name: str, note: str, colour_map: int | None, cells: Sequence[Element]) -> Element:
    """A row of the film strip: its name, what its colours mean, its pictures."""
    head = tag("th", name, tag("small", note), scope="row")
    if colour_map is not None:
        head.append(colour_bar(colour_map))
    return tag("tr", head, *(tag("td", cell) for cell in cells))


def attention_figure(result: Motion) -> Element:
    """The attention maps and their product, for a few frames: the figure of the paper, of one's own clip."""
    frames = sample(result.num_frames, ATTENTION_FRAMES)
    maps = result.attention.arrays()
    columns, note = (
        (PAIR_COLUMNS, PAIR_NOTE) if isinstance(result.attention, AttentionMaps) else (GRAM_COLUMNS, GRAM_NOTE)
    )
    heads = [tag("th", scope="col"), tag("th", "image", scope="col")]
    heads += [tag("th", m.replace("_", " "), tag("small", what), scope="col") for m, what in columns.items()]
    heads.append(tag("th", "dynamic mask", scope="col"))
    rows = []
    for i in frames:
        cells = [picture(result.images[i], frame_text(result, i))]
        cells += [picture(colour(maps[m][i], 0, 1, MAGMA), f"{m} of frame {i}", exact=True) for m in columns]
        cells.append(picture(overlay(result.images[i], result.dynamic_mask[i]), f"dynamic mask of frame {i}"))
        rows.append(tag("tr", tag("th", f"frame {i}", scope="row"), *(tag("td", cell) for cell in cells)))
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="strip attention")
    notes = [f"{note} Each map runs from 0 (dark) to 1 (bright)."]
    spread = [values for name, values in maps.items() if name.endswith("_std")]
    if result.num_frames and spread and not any(values.any() for values in spread):
        notes.append("The std maps are 0: every frame was seen in fewer than two pairs, and nothing varies.")
    elif result.num_frames and not maps["dynamic_map"].any():
        notes.append("The product is 0: there is one frame, or all are the same picture, so nothing is said to move.")
    return tag(
        "section",
        tag("h2", "Why it is called moving: attention"),
        *(tag("p", note, class_="muted") for note in notes),
        tag("div", table, class_="scroll"),
    )


def frame_text(result: Motion, index: int) -> str:
    """Number and name of a frame."""
    names = result.meta.get("names") or []
    return f"frame {index}" + (f": {names[index]}" if index < len(names) else "")

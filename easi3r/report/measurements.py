"""Where the camera went, and what was measured frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from easi3r.quality import quantile
from easi3r.report.charts import camera_path, line_chart
from easi3r.report.markup import tag
from easi3r.scene import Motion, Scene
from easi3r.structures import Array
from easi3r.verdict import CHECKS


def cameras(scene: Scene) -> Element:
    """The path in three projections."""
    unit = scene.meta.get("scale", "up to scale")
    depth = typical_depth(scene)
    panels, step = camera_path(scene.camera_to_world, least=0.02 * depth)
    turns, shifts = steps_of(scene.camera_to_world)
    length = float(np.nansum(shifts))
    facts = (
        f"The path is {length:.3g} long ({length / depth:.1%} of the median depth, {depth:.3g}) and turns by "
        f"{np.nansum(turns):.3g}° in all; lengths are {unit}. One square of the grid is {step:g}, in all three views."
    )
    legend = tag(
        "p",
        tag("span", class_="key begin"),
        "start",
        tag("span", class_="key finish"),
        "end",
        tag("span", class_="key c1"),
        "viewing direction",
        class_="muted",
    )
    note = "Axes are those of the first camera, which is the origin: x right, y down, z forward."
    return tag(
        "section",
        tag("h2", "Where the camera went"),
        tag("p", facts),
        tag("p", note, class_="muted"),
        legend,
        tag("div", *panels, class_="panels"),
    )


def numbers(result: Motion) -> Element:
    """What was measured, frame by frame and in all."""
    quality = result.meta.get("quality") or {}
    moving = line_chart({"moving": 100 * share_moving(result)}, unit=" %")
    charts = [figure("What moves", "share of the pixels", moving)]
    if isinstance(result, Scene):
        charts += scene_charts(result, quality)
    section = tag("section", tag("h2", "Numbers behind it"), tag("div", *charts, class_="panels"))
    if judged := {k: v for k, v in quality.items() if v is None or isinstance(v, (int, float))}:
        section.append(tag("details", tag("summary", "Every number of the verdict"), quality_table(judged)))
    return section


def scene_charts(scene: Scene, quality: Mapping[str, Any]) -> list[Element]:
    """Steps of the camera, focal length, depth and confidence over the frames."""
    depth = typical_depth(scene)
    turns, shifts = steps_of(scene.camera_to_world)
    shifts_deg = np.rad2deg(np.arctan(shifts / depth))
    mark = quality.get("path_largest_step_after_frame")
    steps = tag(
        "figure",
        tag(
            "figcaption",
            tag("b", "The camera's steps"),
            tag("span", class_="key c0"),
            "turn",
            tag("span", class_="key c1"),
            "shift (of a point at the median depth)",
            *([f" · largest after frame {mark}"] if mark is not None else []),
        ),
        line_chart({"turn": turns, "shift": shifts_deg}, unit="°", mark=mark),
    )
    focal = scene.intrinsics[:, 0, 0].astype(np.float64)
    unit = scene.meta.get("scale", "up to scale")
    same = np.isfinite(focal).all() and np.ptp(focal) <= 1e-4 * np.abs(focal).max()
    focal_note = f"{focal[0]:.4g} pixels in all frames" if same else "fx, in pixels of images/"
    return [
        steps,
        figure("Focal length", focal_note, line_chart({"focal length": focal})),
        figure("Depth", f"median of each frame, {unit}", line_chart({"depth": medians(scene, scene.depth)})),
        figure("Confidence", "median of each frame", line_chart({"confidence": medians(scene, scene.confidence)})),
    ]


def figure(title: str, note: str, drawing: Element) -> Element:
    """A drawing on a card of its own."""
    return tag("figure", tag("figcaption", tag("b", title), f" · {note}"), drawing)


def quality_table(judged: Mapping[str, float | None]) -> Element:
    """Names as in scene.json, values, and the limits of the verdict."""
    limits: dict[str, list[str]] = {}
    for check in CHECKS:
        sign = "<" if check.least else ">"
        for verdict, limit in (("doubtful", check.doubtful), ("bad", check.bad)):
            if np.isfinite(limit):
                only = f", where {check.only_above[0]} > {check.only_above[1]:g}" if check.only_above else ""
                limits.setdefault(check.number, []).append(f"{verdict} {sign} {limit:g}{only}")
    rows = [
        tag(
            "tr",
            tag("th", tag("code", name), scope="row"),
            tag("td", "unknown" if value is None else f"{value:.4g}", class_="value"),
            tag("td", "; ".join(limits.get(name, [])), class_="muted"),
        )
        for name, value in judged.items()
    ]
    heads = tag("tr", *(tag("th", text, scope="col") for text in ("number", "value", "limits")))
    return tag("div", tag("table", tag("thead", heads), tag("tbody", *rows), class_="facts"), class_="scroll")


def share_moving(result: Motion) -> Array:
    """[n] share of the pixels of each frame that move; padding does not count."""
    if not isinstance(result, Scene):
        return np.asarray(result.dynamic_mask.mean(axis=(1, 2)))
    moving = (result.dynamic_mask & result.valid_mask).sum(axis=(1, 2))
    return np.asarray(moving / np.maximum(result.valid_mask.sum(axis=(1, 2)), 1))


def medians(scene: Scene, values: Array) -> Array:
    """[n] medians of [n, H, W] over a sixteenth of the pixels of each frame; NaN where it has none but padding."""
    every = 4 if min(values.shape[1:]) >= 32 else 1
    return np.array(
        [
            quantile(frame[::every, ::every][valid[::every, ::every]])
            for frame, valid in zip(values, scene.valid_mask, strict=True)
        ]
    )


def typical_depth(scene: Scene) -> float:
    """Median over the frames, and 1 where nothing is known: the unit of the camera's path."""
    depth = quantile(medians(scene, scene.depth))
    return depth if np.isfinite(depth) and depth > 0 else 1.0


def steps_of(camera_to_world: Array) -> tuple[Array, Array]:
    """[n, 4, 4] -> turn in degrees and shift between each frame and the next, [n - 1] each."""
    poses = camera_to_world.astype(np.float64)
    chords = np.linalg.norm(np.diff(poses[:, :3, :3], axis=0), axis=(1, 2)) / np.sqrt(8)
    turns = np.rad2deg(2 * np.arcsin(np.clip(chords, 0, 1)))
    return turns, np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)

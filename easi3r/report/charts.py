"""Curves, bars and the camera's path as inline SVG; colours are classes of the style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

import numpy as np

from easi3r.report.markup import number, tag
from easi3r.report.pictures import sample
from easi3r.structures import Array

MOST_POINTS = 500  # of a curve
DOTTED = 40  # frames up to which each is marked
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 150, 46, 10, 8, 22  # of a chart and its margins
PANEL = 300  # pixels of a projection, square
DIRECTIONS = 25  # viewing directions that are drawn at most


class View(NamedTuple):
    """How world axes lie on the page."""

    title: str
    axes: tuple[int, int]  # that point right and down
    signs: tuple[int, int]  # -1: the other way
    words: str


VIEWS = (
    View("from above", (0, 2), (1, -1), "x to the right, z (forward) up"),
    View("from the side", (2, 1), (1, 1), "z (forward) to the right, y down"),
    View("from behind", (0, 1), (1, 1), "x to the right, y down"),
)


def line_chart(curves: Mapping[str, Array], *, unit: str = "", mark: int | None = None) -> Element:
    """Values per frame over the frames, gaps where they are not finite.

    curves: label -> [n] values in ``unit``.  mark: a frame to be marked with a vertical line.
    """
    values = {label: np.asarray(curve, dtype=np.float64) for label, curve in curves.items()}
    known = np.concatenate([curve[np.isfinite(curve)] for curve in values.values()])
    if not len(known):
        return tag("p", "Nothing is known of it.", class_="muted")
    n = max(len(curve) for curve in values.values())
    low, high = span_of(known)
    step = round_step(high - low, 3)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step

    def x(frame: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (frame / (n - 1) if n > 1 else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    svg = tag("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=", ".join(values))
    for k in range(round((high - low) / step) + 1):
        level = low + k * step
        svg.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(level), y2=y(level), class_="grid"))
        svg.append(tag("text", f"{short(level, step)}{unit}", x=LEFT - 5, y=y(level) + 3.5, text_anchor="end"))
    for frame, anchor in dict(zip((0, (n - 1) // 2, n - 1), ("start", "middle", "end"), strict=True)).items():
        text = f"frame {frame}" if frame == 0 else str(frame)
        svg.append(tag("text", text, x=x(frame), y=HEIGHT - 7, text_anchor=anchor if n > 1 else "middle"))
    if mark is not None and 0 <= mark < n:
        svg.append(tag("line", x1=x(mark), x2=x(mark), y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
    for k, curve in enumerate(values.values()):
        frames = telling(curve)
        points = [(x(i), y(curve[i])) if np.isfinite(curve[i]) else None for i in frames]
        svg.append(tag("path", d=path_data(points), class_=f"curve c{k % 2}"))
        if n <= DOTTED:
            svg.extend(tag("circle", cx=p[0], cy=p[1], r=2.2, class_=f"dot c{k % 2}") for p in points if p)
    return svg


def telling(curve: Array) -> list[int]:
    """Indices of at most MOST_POINTS values of [n]: where it is longer, the lowest and the highest of each stretch.

    A jump of a single frame, which is what one looks for, is thus kept.
    """
    if len(curve) <= MOST_POINTS:
        return list(range(len(curve)))
    chosen: set[int] = set()
    for stretch in np.array_split(np.arange(len(curve)), MOST_POINTS // 2):
        of_stretch = curve[stretch]
        if np.isfinite(of_stretch).any():
            chosen |= {int(stretch[np.nanargmin(of_stretch)]), int(stretch[np.nanargmax(of_stretch)])}
        else:
            chosen.add(int(stretch[0]))
    return sorted(chosen)


def path_data(points: Sequence[tuple[float, float] | None]) -> str:
    """The ``d`` of a polyline, broken at None.

    >>> path_data([(0, 0), (1, 2), None, (3, 4)])
    'M0 0L1 2M3 4'
    """
    parts, pen = [], "M"
    for point in points:
        if point is not None:
            parts.append(f"{pen}{number(point[0])} {number(point[1])}")
        pen = "M" if point is None else "L"
    return "".join(parts)


def span_of(values: Array) -> tuple[float, float]:
    """Lowest and highest of [m] finite values; from 0 where they come near it, and never empty."""
    low, high = float(values.min()), float(values.max())
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-3 * max(abs(low), abs(high)):  # constant, but for rounding
        around = 0.1 * max(abs(low), abs(high)) or 1.0
        low, high = (low - around, high + around) if low else (0.0, around)
    return low, high


def round_step(span: float, count: int) -> float:
    """1, 2 or 5 times a power of ten: the least that cuts ``span`` into at most ``count`` parts or so.

    >>> round_step(9.0, 3), round_step(0.012, 3)
    (5.0, 0.005)
    """
    least = span / count
    power = 10.0 ** math.floor(math.log10(least))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)
    return float(f"{step:.1g}")


def short(value: float, step: float) -> str:
    """As many digits as tell multiples of ``step`` apart.

    >>> short(0.30000000000000004, 0.1), short(1200.0, 100.0)
    ('0.3', '1200')
    """
    if max(abs(value), step) >= 1e6 or step < 1e-5:
        return f"{value:.3g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def bars(values: Mapping[str, float], unit: str) -> Element:
    """A table of names, bars and values >= 0."""
    most = max([*values.values(), 1e-12])
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("div", class_="bar", style=f"width: {100 * max(value, 0) / most:.1f}%"), class_="bars"),
            tag("td", f"{value:.2f} {unit}", class_="value"),
        )
        for name, value in values.items()
    ]
    return tag("table", *rows, class_="bars")


def camera_path(camera_to_world: Array, least: float) -> tuple[list[Element], float]:
    """Three projections of [n, 4, 4] poses at one scale, and the side of a square of their grid.

    least: the extent that fills the panels if the path is smaller, so that a camera at rest is seen to rest.
    Poses that are not finite leave gaps.
    """
    poses = camera_to_world.astype(np.float64)
    places = poses[np.isfinite(poses).all(axis=(1, 2)), :3, 3]
    low, high = (places.min(axis=0), places.max(axis=0)) if len(places) else (np.zeros(3), np.zeros(3))
    side = 1.4 * max(float((high - low).max()), least)
    step = round_step(side, 5)
    return [projection(poses, view, (low + high) / 2, side, step) for view in VIEWS], step


def projection(poses: Array, view: View, centre: Array, side: float, step: float) -> Element:
    """The path of [n, 4, 4] in a square panel: a cube of ``side`` around ``centre`` [3], with grid lines each ``step``.

    The start is a disc, the end a ring; viewing directions are drawn as they project.
    """
    axes, signs = list(view.axes), np.array(view.signs)

    def on_page(point: Array) -> tuple[float, float]:
        x, y = PANEL * (0.5 + signs * (point - centre)[axes] / side)
        return float(x), float(y)

    svg = tag("svg", viewBox=f"0 0 {PANEL} {PANEL}", role="img", aria_label=f"The camera's path {view.title}")
    for k, axis in enumerate(axes):
        svg.extend(grid_lines(centre[axis], view.signs[k], side, step, upright=k == 0))
    known = np.asarray(np.isfinite(poses).all(axis=(1, 2)))
    for i in sample(len(poses), DIRECTIONS):
        if known[i]:
            (x1, y1), (x2, y2) = on_page(poses[i, :3, 3]), on_page(poses[i, :3, 3] + 0.11 * side * poses[i, :3, 2])
            svg.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="direction"))
    points = [on_page(poses[i, :3, 3]) if known[i] else None for i in sample(len(poses), MOST_POINTS)]
    svg.append(tag("path", d=path_data(points), class_="curve c0"))
    if len(points) <= DOTTED:
        svg.extend(tag("circle", cx=p[0], cy=p[1], r=2.2, class_="dot c0") for p in points if p)
    for name, i, radius in (("end", -1, 6.5), ("start", 0, 5.0)):
        if known.any():
            frame = int(np.flatnonzero(known)[i])
            x, y = on_page(poses[frame, :3, 3])
            svg.append(tag("circle", tag("title", f"{name}: frame {frame}"), cx=x, cy=y, r=radius, class_=name))
    return tag("figure", tag("figcaption", tag("b", view.title.capitalize()), f" · {view.words}"), svg)


def grid_lines(centre: float, sign: int, side: float, step: float, *, upright: bool) -> list[Element]:
    """Lines at the multiples of ``step`` within ``side`` around ``centre``."""
    first, last = math.ceil((centre - side / 2) / step), math.floor((centre + side / 2) / step)
    lines = []
    for k in range(first, last + 1):
        at = PANEL * (0.5 + sign * (k * step - centre) / side)
        ends = {"x1": at, "x2": at, "y1": 0, "y2": PANEL} if upright else {"x1": 0, "x2": PANEL, "y1": at, "y2": at}
        lines.append(tag("line", **ends, class_="grid"))
    return lines

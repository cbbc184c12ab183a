"""The demo's clip: one generated world with two movers, and its truth."""

from __future__ import annotations

from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import make_world

SEED = 0


def demo_clip() -> Clip:
    """12 frames of 128 x 96 pixels, the same every time; takes a second or two."""
    return render(make_world(SEED))

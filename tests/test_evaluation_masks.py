"""The table of masks: its arithmetic on models that know the truth, and on one that says everything moves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.metrics import jaccard
from easi3r.structures import Array
from evaluation import masks
from evaluation.__main__ import COMMANDS

FAMILY = FAMILIES["sharp"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "FRAMES", 3)
    monkeypatch.setattr(masks, "MORE_FRAMES", 4)
    monkeypatch.setattr(masks, "SIZE", (32, 24))


def clip_of(frames: int, *, frozen: bool = False) -> Clip:
    return render(make_world(5, FAMILY, num_frames=frames), 32, 24, frozen=frozen)


@dataclass
class Says:
    """A model whose masks are a function of the images."""

    find: Any
    seen: list[int] = field(default_factory=list)

    def segment(self, images: Array, *, image_size: str, evidence: str, instances: bool) -> Any:
        assert (image_size, evidence) == ("native", "both")
        self.seen.append(len(images))
        return SimpleNamespace(dynamic_mask=self.find(images))


def test_truth_scores_all_and_leaves_the_twin_alone() -> None:
    longer = clip_of(4)
    known = {clip.images.tobytes(): clip.dynamic_mask for clip in (clip_of(3), longer, clip_of(3, frozen=True))}
    known |= {longer.images[i : i + 2].tobytes(): longer.dynamic_mask[i : i + 2] for i in (0, 2)}
    model = Says(lambda images: known[images.tobytes()])
    found = masks.scores(model, "both", FAMILY, 5)  # type: ignore[arg-type]
    assert list(found) == list(masks.COLUMNS) and list(found.values()) == [100, 100, 100, 0]
    assert sorted(model.seen) == [2, 2, 3, 3, 4]


def test_everything_moves_scores_the_share_of_what_does_and_alarms_everywhere() -> None:
    model = Says(lambda images: np.ones(images.shape[:3], bool))
    found = masks.scores(model, "both", FAMILY, 5)  # type: ignore[arg-type]
    truth, longer = clip_of(3).dynamic_mask, clip_of(4).dynamic_mask
    assert found["J 12 frames"] == pytest.approx(100 * jaccard(np.ones_like(truth), truth).mean())
    assert found["J 2 frames"] == found["J 16 frames"] == pytest.approx(100 * longer.mean((1, 2)).mean())
    assert found["twin called moving"] == 100


def test_a_frozen_twin_is_the_static_world_of_its_seed() -> None:
    family = replace(FAMILY, num_movers=0, num_static=FAMILY.num_static + FAMILY.num_movers)
    static = render(make_world(5, family, num_frames=3), 32, 24)
    np.testing.assert_array_equal(static.images, clip_of(3, frozen=True).images)


def test_the_table_says_means_errors_and_how_many() -> None:
    rows = [dict.fromkeys(masks.COLUMNS, value) for value in (10.0, 20.0, 30.0)]
    lines = masks.table({("both", "sharp"): rows}).splitlines()
    assert lines[-1].split("|")[1:-1] == [" both ", " sharp ", *[" 20.0 ± 5.8 "] * 4, " 3 "]


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS["masks"] == ("evaluation.masks", "main")
    assert masks.main(["--checkpoint", "no/such.pth"]) == 1
    assert "no/such.pth" in capsys.readouterr().err

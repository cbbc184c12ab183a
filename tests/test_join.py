"""Pieces of a clip in worlds of their own, joined: known similarities are undone, and windows lose little."""

from __future__ import annotations

import numpy as np
import pytest
from alignment_runs import ate, pairs_of
from scipy.spatial.transform import Rotation

from easi3r.alignment import align, join_piece
from easi3r.alignment.join import robust_similarity
from easi3r.config import AlignmentSettings, PairSettings
from easi3r.cut import cut_clip
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import AlignedCameras, Known, PairPredictions
from evaluation.pair_predictions import synthetic_predictions

Array = np.ndarray


def empty(num_frames: int, height: int, width: int) -> AlignedCameras:
    shapes = ((num_frames, 4, 4), (num_frames, 3, 3), (num_frames, height, width), (num_frames, height, width))
    return AlignedCameras(*(np.zeros(shape, np.float32) for shape in shapes))


def true_piece(clip: Clip, frames: range, scale: float, turn: Array, shift: Array) -> AlignedCameras:
    """The truth of some frames in another world: x -> scale * turn x + shift."""
    poses = clip.camera_to_world[frames.start : frames.stop].copy()
    poses[:, :3, 3] = scale * poses[:, :3, 3] @ turn.T + shift
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    depth = (scale * clip.depth[frames.start : frames.stop]).astype(np.float32)
    return AlignedCameras(poses, np.tile(clip.intrinsics[0], (len(frames), 1, 1)), depth, np.full(depth.shape, 3.0))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render(make_world(3, Family(), num_frames=10), 48, 32)


@pytest.mark.parametrize("overlap", [2, 3, 4])
def test_known_similarities_are_undone(clip: Clip, overlap: int) -> None:
    whole, dice, end = empty(10, 32, 48), np.random.default_rng(0), 0
    for piece in cut_clip(10, 6, overlap):
        shared, end = max(0, end - piece.start), piece.stop
        first = piece.start == 0
        turn = np.eye(3) if first else Rotation.random(random_state=1).as_matrix()
        part = true_piece(clip, piece, 1.0 if first else 3.5, turn, 0 * turn[0] if first else dice.normal(size=3))
        static = ~clip.dynamic_mask[piece.start : piece.start + shared]
        assert join_piece(whole, part, piece, shared, static) < 1e-5
    np.testing.assert_allclose(whole.camera_to_world, clip.camera_to_world, atol=1e-4)
    np.testing.assert_allclose(whole.depth, clip.depth, rtol=1e-4)


def test_a_similarity_survives_wrong_points() -> None:
    dice = np.random.default_rng(0)
    source, turn = dice.normal(size=(900, 3)), Rotation.random(random_state=2).as_matrix()
    target = 0.3 * source @ turn.T + [1, 2, 3]
    target[:300] += dice.normal(size=(300, 3))
    rotation, translation, scale, residual = robust_similarity(source, target, np.ones(900))
    np.testing.assert_allclose(rotation, turn, atol=1e-6)
    np.testing.assert_allclose(translation, [1, 2, 3], atol=1e-5)
    assert scale == pytest.approx(0.3, rel=1e-5) and residual < 1e-5


def test_what_moves_does_not_bend_the_seam(clip: Clip) -> None:
    whole = empty(10, 32, 48)
    first, second = range(6), range(4, 10)
    join_piece(whole, true_piece(clip, first, 1.0, np.eye(3), np.zeros(3)), first, 0, np.zeros((0, 32, 48), bool))
    part = true_piece(clip, second, 2.0, np.eye(3), np.ones(3))
    moving = clip.dynamic_mask[4:6].copy()
    moving[:, :, :20] = True  # most of the picture
    part.depth[:2][moving] *= 1.7
    assert join_piece(whole, part, second, 2, ~moving) < 1e-5
    np.testing.assert_allclose(whole.camera_to_world[6:], clip.camera_to_world[6:], atol=1e-4)


def of_frames(predictions: PairPredictions, pairs: Array, frames: range) -> tuple[PairPredictions, Array]:
    """The predictions of the pairs inside some frames, counted from the first of them."""
    index = {(int(a), int(b)): k for k, (a, b) in enumerate(predictions.pairs)}
    chosen = [index[int(a) + frames.start, int(b) + frames.start] for a, b in pairs]
    values = {name: value[chosen] for name, value in vars(predictions).items() if name != "pairs"}
    return PairPredictions(pairs=pairs, **values), pairs


def test_pieces_are_nearly_as_good_as_one_piece() -> None:
    """60 frames, easy noise: the path's error within 1.3 times that of one piece, and small residuals at the seams."""
    clip = render(make_world(1, Family(num_movers=3, stride=(0.5, 0.5), pan_deg=(20.0, 20.0)), num_frames=60), 48, 32)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=1)
    settings = AlignmentSettings()
    one = align(predictions, 60, settings, silent, dynamic_mask=clip.dynamic_mask)
    whole, end, seams, known = empty(60, 32, 48), 0, [], Known()
    for piece in cut_clip(60, 24, 10):
        shared, end = max(0, end - piece.start), piece.stop
        part, _ = of_frames(predictions, make_pairs(len(piece), PairSettings()), piece)
        moving = clip.dynamic_mask[piece.start : piece.stop]
        cameras = align(part, len(piece), settings, silent, dynamic_mask=moving, known=known.part(range(len(piece))))
        known = Known(intrinsics=cameras.intrinsics[:1].astype(np.float64).repeat(110, 0))
        seams.append(join_piece(whole, cameras, piece, shared, ~moving[:shared]))
    errors = [ate(cameras.camera_to_world, clip.camera_to_world) for cameras in (one, whole)]
    assert len(seams) > 2 and all(0 < seam < 0.02 for seam in seams[1:])
    assert errors[1] < max(1.3 * errors[0], 5e-4), errors

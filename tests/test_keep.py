"""keep: what moves is decoded again by attention cut both ways; scenes, exports and viewer show what was asked for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from small_inputs import QUICK, moving_square, random_model, run_cli, write_images
from test_export import all_moving, all_static, world_scene

from easi3r import Easi3R, Scene
from easi3r.alignment import align
from easi3r.config import AlignmentSettings, PairSettings
from easi3r.demo.rendering import render
from easi3r.demo.worlds import make_world
from easi3r.errors import ConfigError, InputError
from easi3r.export import FORMATS, ExportOptions, export_formats
from easi3r.geometry import depth_edges, transform, unproject
from easi3r.inference import changed_by_cut, empty_predictions, encode_frames, observe_pairs, predict_movers
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import AttentionMaps, DynamicMasks
from easi3r.viewer.player import player_page
from easi3r.viewer.shown import shown_points
from easi3r.viewer.video import write_scene_video
from evaluation.pair_predictions import synthetic_predictions

PATCH, SIZE, GRID = 16, (48, 64), (3, 4)


@pytest.fixture(scope="module")
def model():
    return random_model()


@functools.cache
def square_masks(num_frames=3):
    """[n, H, W] bool: where ``moving_square`` has its square."""
    return moving_square(num_frames).min(axis=-1) >= 150


def ignore(*_):
    """A listener of attention that does not listen."""


def second_pass(network, tokens, pairs, masks):
    """Predictions in float32 of the published second pass, and the tokens that move."""
    predictions = empty_predictions(pairs, *SIZE, dtype=torch.float32)
    moving = DynamicMasks(masks.astype(np.float32), masks, None).tokens(PATCH)
    options = {"batch_size": 2, "dynamic_tokens": moving, "predictions": predictions}
    observe_pairs(network, tokens, pairs, GRID, ignore, silent, **options)
    return predictions, moving


def copied(predictions):
    tensors = {name: value.clone() for name, value in vars(predictions).items() if name != "pairs"}
    return dataclasses.replace(predictions, **tensors)


# --- the pass


def one_pair_by_matrices(network, tokens, moving, first, second):
    """The slow twin: a pair alone, softmax matrices of decoder 1 without the weights between what moves and not."""
    apart = torch.from_numpy(moving[first].ravel()[:, None] != moving[second].ravel()[None])
    sites = [block.cross_attn.attend for block in network.dec_blocks]
    for attend in sites:

        def forward(q, k, v):
            weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
            return torch.where(apart, 0.0, weights) @ v

        attend.forward = forward
    try:
        decoded = network.decode(tokens[first : first + 1], tokens[second : second + 1], GRID)
    finally:
        for attend in sites:
            del attend.forward
    return network.predict(decoded)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_movers_are_predicted_apart_from_what_stands_still_which_stays_as_it_is(model, batch_size):
    network, clip, masks = model.network, moving_square(), square_masks()
    tokens, pairs = encode_frames(network, clip, 8, silent), make_pairs(3, PairSettings())
    before, moving = second_pass(network, tokens, pairs, masks)
    after = copied(before)
    predict_movers(
        network,
        tokens,
        pairs,
        GRID,
        silent,
        batch_size=batch_size,
        dynamic_mask=masks,
        dynamic_tokens=moving,
        predictions=after,
    )
    for row, (first, second) in enumerate(pairs):
        with torch.no_grad():
            expected = one_pair_by_matrices(network, tokens, moving, first, second)
        for name, frame in (("points_first", first), ("confidence_first", first), ("points_second", second)):
            mask = torch.from_numpy(masks[frame])
            ours, theirs, was = (getattr(p, name)[i] for p, i in ((after, row), (expected, 0), (before, row)))
            assert torch.equal(ours[~mask], was[~mask])
            torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)
            assert (ours[mask] - was[mask]).abs().max() > 1e-4


def test_the_pairs_that_are_decoded_again_are_those_that_the_reversed_cut_changes(model):
    network, clip = model.network, moving_square()
    tokens, pairs = encode_frames(network, clip, 8, silent), make_pairs(3, PairSettings(graph="complete"))
    some = square_masks()[0]
    kinds = {"none": np.zeros_like(some), "some": some, "all": np.ones_like(some)}
    for names in itertools.product(kinds, repeat=3):
        masks = np.stack([kinds[name] for name in names])
        before, moving = second_pass(network, tokens, pairs, masks)
        with torch.no_grad():
            twins = [one_pair_by_matrices(network, tokens, moving, *pair) for pair in pairs]
        differs = [
            not torch.allclose(twin.points_first[0], was, rtol=1e-3, atol=1e-4)
            for twin, was in zip(twins, before.points_first, strict=True)
        ]
        np.testing.assert_array_equal(changed_by_cut(pairs, ~moving), differs, err_msg=str(names))


# --- reconstruct


@pytest.fixture(scope="module")
def scenes(model):
    options = {**QUICK, "masks": square_masks()}
    return {keep: model.reconstruct(moving_square(), keep=keep, **options) for keep in ("all", "static", "dynamic")}


def test_a_scene_remembers_what_it_was_made_for_and_explicit_words_win(scenes, tmp_path):
    for keep, scene in scenes.items():
        loaded = Scene.load(scene.save(tmp_path / keep))
        assert scene.keep == loaded.keep == keep == loaded.meta["settings"]["keep"]
        for other in ("all", "static", "dynamic"):
            moves = scene.points(keep=other).dynamic
            assert len(moves) == {"all": moves.size, "static": (~moves).sum(), "dynamic": moves.sum()}[other] > 0
        np.testing.assert_array_equal(loaded.points().points, scene.points(keep=keep).points)


def test_keep_changes_neither_masks_nor_maps_and_fields_stay_whole(scenes):
    full, static, dynamic = scenes["all"], scenes["static"], scenes["dynamic"]
    for name in ("depth", "confidence", "camera_to_world", "intrinsics"):
        np.testing.assert_array_equal(getattr(static, name), getattr(full, name))
    for scene in (static, dynamic):
        np.testing.assert_array_equal(scene.dynamic_mask, full.dynamic_mask)
        np.testing.assert_array_equal(scene.dynamic_score, full.dynamic_score)
        for field in dataclasses.fields(AttentionMaps):
            np.testing.assert_array_equal(getattr(scene.attention, field.name), getattr(full.attention, field.name))
    assert dynamic.depth.shape == full.depth.shape and np.isfinite(dynamic.depth).all()
    assert not np.array_equal(dynamic.depth[square_masks()], full.depth[square_masks()])
    points = transform(unproject(dynamic.depth, dynamic.intrinsics), dynamic.camera_to_world)
    np.testing.assert_allclose(dynamic.points().points, points[square_masks()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_very_short_clips(model, num_frames):
    masks = square_masks(num_frames)
    scene = model.reconstruct(moving_square(num_frames), masks=masks, keep="dynamic", **QUICK)
    assert len(scene.points().points) == masks.sum()


def test_long_clips_in_pieces(model):
    options = {**QUICK, "pieces.frames": 5, "pieces.overlap": 2, "window": 2, "masks": square_masks(8)}
    scene = model.reconstruct(moving_square(8), keep="dynamic", **options)
    assert len(scene.meta["pieces"]) > 1 and len(scene.points().points) == square_masks(8).sum()


@pytest.mark.parametrize(
    ("keep", "masks", "words"),
    [("dynamic", np.zeros, ["'dynamic'", "nothing moves"]), ("static", np.ones, ["'static'", "everything moves"])],
)
def test_a_choice_that_leaves_nothing_is_one_warning_and_an_empty_scene(model, caplog, keep, masks, words):
    mask = masks((3, *SIZE), bool)
    with caplog.at_level(logging.WARNING, logger="easi3r"):
        scene = model.reconstruct(moving_square(), masks=mask, keep=keep, **QUICK)
    (warning,) = [record.getMessage() for record in caplog.records if "keep" in record.getMessage()]
    assert all(word in warning for word in words)
    assert len(scene.points().points) == 0 and len(scene.points(keep="all").points) == mask.size
    caplog.clear()
    model.reconstruct(moving_square(), masks=mask, **QUICK)
    assert not [record for record in caplog.records if "keep" in record.getMessage()]


def test_everything_moving_is_a_whole_reconstruction(model):
    mask = np.ones((3, *SIZE), bool)
    scene = model.reconstruct(moving_square(), masks=mask, keep="dynamic", **QUICK)
    assert len(scene.points().points) == mask.size


def test_command_line(tmp_path, capsys):
    clip = write_images(tmp_path / "clip", moving_square(2))
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, mask in enumerate(square_masks(2)):
        iio.imwrite(masks / f"{i}.png", mask.astype(np.uint8) * 255)
    flags = ["--image-size", "native", "--masks", masks, "--keep", "dynamic", "--quiet"]
    out = tmp_path / "out"
    assert run_cli("run", clip, "-o", out, *flags) == 0
    assert Scene.load(out).keep == "dynamic"
    assert run_cli("export", out, "--to", "npz", "--quiet") == 0
    assert run_cli("export", out, "--to", "npz", "-o", tmp_path / "still", "--keep", "static", "--quiet") == 0
    for path, moves in ((out / "npz", True), (tmp_path / "still" / "npz", False)):
        with np.load(path / "scene.npz") as arrays:
            assert len(arrays["dynamic"]) and (arrays["dynamic"] == moves).all()
    assert run_cli("show", out, "--keep", "static", "--html", tmp_path / "page.html", "--quiet") == 0
    capsys.readouterr()
    assert run_cli("run", clip, "-o", tmp_path / "other", "--keep", "moving") == 2
    assert "keep is 'moving'; expected 'all', 'static' or 'dynamic'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="keep is 'moving'"):
        Easi3R.from_pretrained("demo", device="cpu").reconstruct(moving_square(2), keep="moving")


# --- exports and the viewer


def made_for(keep, scene=None):
    scene = scene or world_scene()
    return dataclasses.replace(scene, meta=scene.meta | {"settings": {"keep": keep}})


def test_a_scene_of_an_older_version_holds_everything():
    assert world_scene().keep == "all"


@pytest.mark.parametrize("keep", ["all", "static", "dynamic"])
def test_exports_and_viewer_take_the_scenes_own_choice_unless_told_another(keep, tmp_path):
    scene = made_for(keep)
    folders, failed = export_formats(scene, tmp_path, ["npz", "ply", "glb"])
    told, _ = export_formats(world_scene(), tmp_path / "told", ["npz", "ply", "glb"], ExportOptions(keep=keep))
    assert failed == {}
    for name, folder in folders.items():
        assert json.loads((folder / "scene.json").read_text())["options"]["keep"] == keep
        files = [sorted(path for path in where.rglob("*") if path.is_file()) for where in (folder, told[name])]
        assert [path.name for path in files[0]] == [path.name for path in files[1]]
        assert [path.stat().st_size for path in files[0]] == [path.stat().st_size for path in files[1]]
    with np.load(folders["npz"] / "scene.npz") as arrays:
        np.testing.assert_array_equal(arrays["points"], scene.points(edges=False).points)
    shown = shown_points(scene, 10**6)
    moving = int(shown.starts[-1] - shown.starts[0])
    assert (int(shown.starts[0]) > 0, moving > 0) == (keep != "dynamic", keep != "static")
    other = "static" if keep == "dynamic" else "dynamic"
    again = shown_points(scene, 10**6, keep=other)
    np.testing.assert_array_equal(again.points, shown_points(world_scene(), 10**6, keep=other).points)
    with pytest.raises(InputError, match="keep is 'moving'; expected"):
        shown_points(scene, 100, keep="moving")


@pytest.mark.parametrize(("keep", "scene"), [("dynamic", all_static), ("static", all_moving)])
def test_an_empty_choice_exports_in_every_format_and_can_be_shown(keep, scene, tmp_path):
    empty = made_for(keep, scene())
    written, failed = export_formats(empty, tmp_path / "out", FORMATS)
    assert failed == {} and list(written) == list(FORMATS)
    with np.load(written["npz"] / "scene.npz") as arrays:
        assert arrays["points"].shape == (0, 3) and arrays["colors"].shape == (0, 3)
    for path in written["ply"].rglob("*.ply"):
        assert b"element vertex 0\n" in path.read_bytes()
    assert len(shown_points(empty, 100).points) == 0
    assert "0 of 0 points" in player_page(empty)
    assert len(iio.imread(write_scene_video(empty, tmp_path / "path.mp4"))) == empty.num_frames


# --- on worlds whose truth is known


@pytest.mark.parametrize("seed", [3, 5])
def test_kept_points_lie_on_what_moves(seed):
    """True masks and predictions of known noise: by pixels all do, in space over 90 % to 5 % of the depth."""
    clip = render(make_world(seed, num_frames=6), 96, 72, supersample=1)
    pairs = make_pairs(6, PairSettings())
    predictions = synthetic_predictions(clip, pairs, hard=False, seed=seed)
    found = align(predictions, 6, AlignmentSettings(), silent, dynamic_mask=clip.dynamic_mask)
    n, height, width = clip.depth.shape
    scene = Scene(
        images=clip.images,
        dynamic_score=clip.dynamic_mask.astype(np.float32),
        dynamic_mask=clip.dynamic_mask,
        attention=AttentionMaps(*np.zeros((5, n, height // 16, width // 16), np.float32)),
        timestamps=np.arange(n, dtype=float),
        meta={"settings": {"keep": "dynamic"}},
        valid_mask=np.ones(clip.depth.shape, bool),
        **vars(found),
    )
    cloud = scene.points(edges=False)
    kept = clip.dynamic_mask & ~depth_edges(found.depth)
    assert len(cloud.points) == kept.sum() > 100 and cloud.dynamic.all()
    errors = world_errors(found, clip)[kept]
    assert (errors < 0.05).mean() > 0.9


def world_errors(found, clip):
    """[n, H, W] distance of world points from the truth over their depth, after the similarity of static points."""
    ours = transform(unproject(found.depth.astype(float), found.intrinsics.astype(float)), found.camera_to_world)
    theirs = transform(unproject(clip.depth.astype(float), clip.intrinsics), clip.camera_to_world)
    some = np.flatnonzero(~clip.dynamic_mask)[::7]
    x, y, weight = ours.reshape(-1, 3)[some], theirs.reshape(-1, 3)[some], np.ones(len(some))
    for _ in range(15):  # reweighted by Cauchy, since a few static points are far off
        mean_x, mean_y = (np.average(points, axis=0, weights=weight) for points in (x, y))
        u, spread, vt = np.linalg.svd((weight[:, None] * (y - mean_y)).T @ (x - mean_x))
        flip = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
        turn = (u * flip) @ vt
        scale = (spread * flip).sum() / (weight * np.square(x - mean_x).sum(axis=1)).sum()
        residual = np.linalg.norm(y - mean_y - scale * (x - mean_x) @ turn.T, axis=1)
        weight = 1 / (1 + (residual / (2 * np.median(residual))) ** 2)
    return np.linalg.norm(theirs - mean_y - scale * (ours - mean_x) @ turn.T, axis=-1) / clip.depth


@pytest.mark.slow
def test_what_moves_is_not_measurably_less_accurate_than_in_the_full_scene():
    """Twelve held-out worlds, true masks, bundled checkpoint: mean error of moving points (a quarter of an hour)."""
    model, errors = Easi3R.from_pretrained("demo"), []
    for seed in range(1000, 1012):
        clip = render(make_world(seed))
        scenes = [model.reconstruct(clip.images, masks=clip.dynamic_mask, keep=keep) for keep in ("all", "dynamic")]
        errors.append([world_errors(scene, clip)[clip.dynamic_mask].mean() for scene in scenes])
    loss = np.diff(errors, axis=1)[:, 0]
    assert loss.mean() < 2 * loss.std(ddof=1) / len(loss) ** 0.5  # a gain has not been seen either

"""The recipe of the bundled network: loss, optimiser, judgement, what is saved, and going on after an interruption."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from easi3r.alignment.initialise import weiszfeld_focal
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.backbones.dust3r import PointmapPair
from easi3r.demo import train
from easi3r.demo.judgement import focal_of_pointmap, judge_pairs, pose_of_pointmap
from easi3r.demo.losses import confidence_loss, matching_loss
from easi3r.demo.muon import Muon, orthogonalise
from easi3r.demo.static_pairs import BASELINES, StaticViews, held_out_pairs, static_views
from easi3r.demo.trainer import MatrixAttention, new_network
from easi3r.demo.training_state import load_state, save_state, write_weights
from easi3r.demo.worlds import FAMILIES, rotation, transform
from hooks import Attend

SHARP = FAMILIES["sharp"]


@pytest.fixture(scope="module")
def pairs() -> StaticViews:
    return held_out_pairs(SHARP, 40, (64, 48))


# --- material ------------------------------------------------------------------------------------------------------


def test_points_of_one_view_project_onto_the_other(pairs: StaticViews) -> None:
    """Where both views see a spot, its depth along the other camera's ray is the other's depth: nothing lies beyond."""
    points = transform(torch.linalg.inv(pairs.relative_pose(0, 1))[:, None, None], pairs.points[:, 0])
    pixel = points[..., :2] / points[..., 2:] * pairs.focal_px[:, None, None, None] + torch.tensor([31.5, 23.5])
    x, y = pixel.round().long().unbind(-1)
    inside = (x >= 0) & (x < 64) & (y >= 0) & (y < 48) & (points[..., 2] > 0)
    there = pairs.points[:, 1, ..., 2][torch.arange(len(x))[:, None, None], y.clamp(0, 47), x.clamp(0, 63)]
    ratio = (points[..., 2] / there)[inside]
    assert inside.float().mean() > 0.5
    assert (ratio - 1).abs().median() < 0.01
    assert (ratio < 0.9).float().mean() < 0.05, "in front of what the other camera sees there is nothing"


def test_the_held_out_pairs_keep_the_promised_floor() -> None:
    held_out = held_out_pairs(SHARP, 200, (32, 24))
    pose = held_out.relative_pose(0, 1)
    ratio = pose[:, :3, 3].norm(dim=-1) / held_out.points[:, 0, ..., 2].flatten(1).median(dim=1).values
    assert len(ratio) == 200 and ratio.min() > BASELINES[0] and ratio.max() < BASELINES[1]
    angle = torch.rad2deg(torch.arccos(((pose[:, 0, 0] + pose[:, 1, 1] + pose[:, 2, 2] - 1) / 2).clamp(-1, 1)))
    assert angle.median() > 5
    assert SHARP.fov_deg[1] - SHARP.fov_deg[0] >= 5 and SHARP.num_movers + SHARP.num_static >= 4


def test_held_out_pairs_are_the_same_however_many_are_asked_for(pairs: StaticViews) -> None:
    fewer = held_out_pairs(SHARP, 7, (64, 48))
    torch.testing.assert_close(fewer.images, pairs.images[:7])


# --- loss and optimiser --------------------------------------------------------------------------------------------


def random_pointmaps(seed: int, batch: int = 3) -> PointmapPair:
    dice = torch.Generator().manual_seed(seed)
    points = torch.randn(2, batch, 4, 5, 3, generator=dice, dtype=torch.float64) + torch.tensor([0, 0, 5.0])
    confidence = 1 + torch.rand(2, batch, 4, 5, generator=dice, dtype=torch.float64)
    return PointmapPair(*points, *confidence)


def test_the_loss_is_the_papers_sum_written_out() -> None:
    prediction, truth = random_pointmaps(0), random_pointmaps(1)
    total, count = 0.0, 0
    for b in range(3):
        both = [
            np.concatenate([maps.points_first[b].numpy().reshape(-1, 3), maps.points_second[b].numpy().reshape(-1, 3)])
            for maps in (prediction, truth)
        ]
        found, right = (points / np.mean([np.sqrt(p @ p) for p in points]) for points in both)
        confidence = torch.cat([prediction.confidence_first[b].flatten(), prediction.confidence_second[b].flatten()])
        for x, y, c in zip(found, right, confidence.tolist(), strict=True):
            total += c * np.sqrt((x - y) @ (x - y)) - 0.2 * np.log(c)
            count += 1
    loss, _ = confidence_loss(prediction, truth.points_first, truth.points_second)
    assert float(loss) == pytest.approx(total / count, rel=1e-9)


def test_a_scaled_truth_is_no_error() -> None:
    truth = random_pointmaps(2)
    prediction = PointmapPair(3 * truth.points_first, 3 * truth.points_second, *[torch.ones(3, 4, 5)] * 2)
    loss, error = confidence_loss(prediction, truth.points_first, truth.points_second)
    assert float(error) < 1e-5 and float(loss) < 1e-5


@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape: tuple[int, int]) -> None:
    dice = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape, generator=dice), full_matrices=False)
    scales = 0.1 + 0.9 * torch.rand(3, 1, min(shape), generator=dice)
    found = u.mT @ orthogonalise(u * scales @ vt) @ vt.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.4
    assert (found - torch.diag_embed(diagonal)).abs().max() < 0.1


def test_muon_finds_a_matrix_and_treats_stacked_ones_apart() -> None:
    torch.manual_seed(0)
    target = torch.randn(12, 4)
    weight = torch.nn.Parameter(torch.zeros(12, 4))
    optimiser = Muon([weight], weight_decay=0.0)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
        optimiser.zero_grad()
        (weight - target).square().sum().backward()
        optimiser.step()
    assert (weight - target).abs().max() < 0.05


def test_plain_products_are_the_fused_attention() -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(MatrixAttention()(q, k, v), Attend()(q, k, v))


def test_fresh_weights_have_both_aids() -> None:
    network = new_network(0)
    for block in network.dec_blocks:
        torch.testing.assert_close(block.cross_attn.projq.weight, block.cross_attn.projk.weight)
    second = network.dec_blocks2.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in network.dec_blocks.state_dict().items())
    assert sum(p.numel() for p in network.parameters()) <= 12e6


def test_correspondence_is_projection_written_out(pairs: StaticViews) -> None:
    centres, place, visible = pairs.correspondence(8)
    assert visible[:, 0, 0].float().mean() > 0.8 and (place[:, 1, 1] - centres).abs().max() < 0.5
    world, token = 3, 20  # row 2, column 4
    pixels = pairs.points[world, 0, 19:21, 35:37].reshape(4, 3).mean(0)
    there = transform(torch.linalg.inv(pairs.relative_pose(0, 1))[world], pixels)
    expected = there[:2] / there[2] * pairs.focal_px[world] + torch.tensor([31.5, 23.5])
    torch.testing.assert_close(place[world, 0, 1, token], expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(centres[token], torch.tensor([35.5, 19.5]))
    seen = place[visible & (torch.arange(2)[:, None] != torch.arange(2))[..., None]]
    assert seen.min() > -0.6 and seen[:, 0].max() < 63.6 and seen[:, 1].max() < 47.6


def test_attention_at_the_true_place_costs_least() -> None:
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    centres = torch.stack([x, y], dim=-1).flatten(0, 1) * 8 + 3.5
    place = centres[None, [5]] + torch.tensor([2.0, 0.0])  # a quarter of the way to the next token
    share = torch.zeros(1, 1, 12)
    share[..., 5], share[..., 6] = 0.75, 0.25
    seen = torch.ones(1, 1, dtype=torch.bool)
    best = matching_loss((share + 1e-9).log(), place, seen, centres, 8)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert float(best) == pytest.approx(entropy, abs=1e-4)
    assert float(matching_loss(torch.zeros(1, 1, 12), place, seen, centres, 8)) == pytest.approx(np.log(12))
    assert float(matching_loss(torch.zeros(1, 1, 12), place, ~seen, centres, 8)) == 0


# --- judgement -----------------------------------------------------------------------------------------------------


def test_focal_and_pose_are_read_off_true_pointmaps(pairs: StaticViews) -> None:
    torch.testing.assert_close(focal_of_pointmap(pairs.points[:, 0]), pairs.focal_px, rtol=1e-4, atol=0)
    pose, truth = pose_of_pointmap(pairs.points_in(0, 1), pairs.focal_px), pairs.relative_pose(0, 1)
    torch.testing.assert_close(pose, truth, rtol=0, atol=1e-3)


def test_the_focal_is_the_alignments(pairs: StaticViews) -> None:
    dice = torch.Generator().manual_seed(0)
    points = pairs.points[:3, 0] * (1 + 0.1 * torch.randn(pairs.points[:3, 0].shape, generator=dice))
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(64) - 31.5, indexing="ij")
    for one, found in zip(points, focal_of_pointmap(points), strict=True):
        flat = one.reshape(-1, 3).T
        expected = weiszfeld_focal(flat, torch.ones(flat.shape[1]), torch.stack([x.flatten(), y.flatten()]))
        assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_the_pose_survives_outliers_and_any_unit(pairs: StaticViews) -> None:
    dice = torch.Generator().manual_seed(0)
    points = 7 * pairs.points_in(0, 1)
    bad = torch.rand(points.shape[:3], generator=dice) < 0.2
    points[bad] *= 1 + torch.rand((int(bad.sum()), 1), generator=dice)
    pose, truth = pose_of_pointmap(points, pairs.focal_px), pairs.relative_pose(0, 1)
    torch.testing.assert_close(pose[:, :3, :3], truth[:, :3, :3], rtol=0, atol=5e-3)
    torch.testing.assert_close(pose[:, :3, 3] / 7, truth[:, :3, 3], rtol=0, atol=3e-2)


class Oracle:
    """Answers as a network would that knows some of the truth; its tokens say which image it was shown."""

    device = torch.device("cpu")

    def __init__(self, pairs: StaticViews, *, sees_first: bool, turned: float = 0.0) -> None:
        self.pairs, self.sees_first = pairs, sees_first
        self.turn = rotation(torch.tensor([0.0, np.deg2rad(turned), 0.0])).float()
        self.marks = pairs.images.flatten(2).sum(-1)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def encode(self, images: Tensor) -> Tensor:
        difference = (images.flatten(1).sum(-1)[:, None] - self.marks.flatten()[None]).abs()
        return difference.argmin(1)[:, None, None]

    def decode(self, first: Tensor, second: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.cat([first, second], dim=1)[..., 0]

    def predict(self, views: Tensor) -> PointmapPair:
        world, view = views // 2, views % 2
        own = [self.pairs.points[world[:, k], view[:, k]] for k in range(2)]
        poses = [self.pairs.camera_to_world[world[:, k], view[:, k]] for k in range(2)]
        second = own[1]
        if self.sees_first:
            second = transform((torch.linalg.inv(poses[0]) @ poses[1])[:, None, None], second)
        return PointmapPair(5 * own[0], 5 * second @ self.turn.T, *[torch.ones(own[0].shape[:3])] * 2)


def test_who_knows_everything_is_judged_perfect(pairs: StaticViews) -> None:
    errors = judge_pairs(Oracle(pairs, sees_first=True), pairs)
    assert errors.first_view < 1e-5 and errors.second_view < 1e-5 and errors.focal_percent < 0.01
    assert errors.rotation_deg < 0.02 and errors.direction_deg < 0.2
    assert errors.rotation_deg_identity > 3 and errors.second_view_monocular > 0.1 and errors.second_view_mean > 0.2
    assert errors.second_view_wrong_other > 0.1


def test_who_ignores_the_other_view_is_found_out(pairs: StaticViews) -> None:
    errors = judge_pairs(Oracle(pairs, sees_first=False), pairs)
    assert errors.second_view == pytest.approx(errors.second_view_monocular, rel=0.02)
    assert errors.rotation_deg == pytest.approx(errors.rotation_deg_identity, rel=0.05)


def test_a_turn_is_measured_as_that_turn(pairs: StaticViews) -> None:
    errors = judge_pairs(Oracle(pairs, sees_first=True, turned=3.0), pairs)
    assert errors.rotation_deg == pytest.approx(3.0, abs=0.05)


# --- what is saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_mb", [0.0, 0.01])
def test_a_state_comes_back_whole_from_any_number_of_files(tmp_path: Path, shard_mb: float) -> None:
    state = {"step": 3, "network": {"a": torch.arange(10000.0)}}
    save_state({**state, "step": 2}, tmp_path / "state", shard_mb)
    save_state(state, tmp_path / "state", shard_mb)
    parts = list((tmp_path / "state").glob("step-*/part-*"))
    assert (len(parts) > 3) == (shard_mb > 0) and all(part.parent.name == "step-00000003" for part in parts)
    loaded = load_state(tmp_path / "state")
    assert loaded is not None and loaded["step"] == 3 and torch.equal(loaded["network"]["a"], state["network"]["a"])
    assert load_state(tmp_path / "nothing") is None


def test_a_half_written_state_is_passed_over(tmp_path: Path) -> None:
    save_state({"step": 1}, tmp_path)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "part-000").write_bytes(b"half")
    assert load_state(tmp_path) == {"step": 1}
    save_state({"step": 2}, tmp_path)
    assert load_state(tmp_path) == {"step": 2}


def test_weights_are_an_ordinary_checkpoint(tmp_path: Path) -> None:
    network = new_network(3)
    write_weights(network, tmp_path, {"pairs_seen": 12})
    loaded, info = load_checkpoint(tmp_path)
    assert loaded.config == network.config and "Apache" in info.licence
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.half().float(), rtol=0, atol=0)
    assert (tmp_path / "model.safetensors").stat().st_size <= 16e6


# --- the command ---------------------------------------------------------------------------------------------------

FLAGS = ["--size", "32x24", "--worlds", "1", "--judge-minutes", "99", "--held-out", "4"]


def losses_of(output: Path, caplog: pytest.LogCaptureFixture, *flags: str) -> dict[int, float]:
    """Run to the end in this process; step -> loss."""
    threads = torch.get_num_threads()
    with caplog.at_level(logging.INFO, "easi3r.train"):
        caplog.clear()
        train.main(["-o", str(output), *FLAGS, *flags])
    torch.set_num_threads(threads)
    return printed_losses(caplog.text)


def printed_losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+), .*?loss ([-\d.]+)", text)}


def test_the_same_seed_gives_the_same_losses_and_an_interrupted_run_goes_on(tmp_path: Path, caplog) -> None:
    whole = losses_of(tmp_path / "whole", caplog, "--max-steps", "6")
    begun = losses_of(tmp_path / "parts", caplog, "--max-steps", "3")
    rest = losses_of(tmp_path / "parts", caplog, "--max-steps", "6")
    assert list(begun) == [1, 2, 3] and list(rest) == [4, 5, 6]
    assert begun == {step: whole[step] for step in begun}
    assert whole[1] != whole[2]
    rows = [json.loads(line) for line in (tmp_path / "parts" / "curve.jsonl").read_text().splitlines()]
    assert [row["pairs_seen"] for row in rows] == [18, 36]


def test_guidance_is_a_term_of_its_own(tmp_path: Path, caplog) -> None:
    plain = losses_of(tmp_path / "plain", caplog, "--max-steps", "1")
    guided = losses_of(tmp_path / "guided", caplog, "--max-steps", "2", "--guidance", "0.1")
    assert 0.1 < guided[1] - plain[1] < 0.1 * 2 * np.log(12), "about the logarithm of the number of tokens"
    assert guided[2] != guided[1]


def test_training_goes_on_from_weights_alone_and_counts_their_pairs(tmp_path: Path, caplog) -> None:
    losses_of(tmp_path / "first", caplog, "--max-steps", "2")
    losses_of(tmp_path / "second", caplog, "--max-steps", "1", "--start", str(tmp_path / "first"))
    rows = [json.loads(line) for line in (tmp_path / "second" / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["pairs_seen"] == 18


def test_a_killed_run_goes_on_from_its_last_save(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "easi3r.demo.train", "-o", str(tmp_path), *FLAGS]
    flags = [*command, "--save-minutes", "0", "--processes", "2", "--max-steps"]
    process = subprocess.Popen([*flags, "1000"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3,"):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    state = load_state(tmp_path / "state")
    assert state is not None and state["step"] >= 2
    time.sleep(0.1)
    done = subprocess.run([*flags, str(state["step"] + 1)], capture_output=True, text=True, check=True, timeout=120)
    assert list(printed_losses(done.stderr)) == [state["step"] + 1]


def test_needs_torch_and_numpy_alone() -> None:
    """The recipe runs on machines that have nothing else."""
    foreign = ("cv2", "scipy", "roma", "imageio", "PIL", "yaml", "tqdm", "safetensors", "huggingface_hub")
    code = f"import sys; sys.modules.update(dict.fromkeys({foreign!r})); import easi3r.demo.train"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", ["128", "128x", "ax96", "-1x3"])
def test_a_size_that_is_none_is_wrong_usage(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.parse(["-o", "x", f"--size={size}"])
    assert stopped.value.code == 2 and "WIDTHxHEIGHT" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_seed_gives_the_same_first_hundred_losses(tmp_path: Path, caplog) -> None:
    first, second = (losses_of(tmp_path / name, caplog, "--max-steps", "100", "--seed", "7") for name in ("a", "b"))
    assert len(first) == 100 and first == second


def test_views_of_a_world_do_not_depend_on_its_company() -> None:
    alone = static_views([5], SHARP, (0.0, 1.0), (32, 24), "cpu")
    together = static_views([4, 5], SHARP, (0.0, 1.0), (32, 24), "cpu")
    torch.testing.assert_close(together.images[1:], alone.images)
    torch.testing.assert_close(together.points[1:], alone.points)

"""How a clip is cut into pieces, what that is said to need, and what happens when the memory does not suffice."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from small_inputs import QUICK, moving_square, random_model, run_cli, write_images

from easi3r import Scene, Settings
from easi3r.clock import Clock
from easi3r.cut import cut_clip
from easi3r.errors import InputError
from easi3r.job import Job
from easi3r.pair_passes import PairPasses
from easi3r.plan import free_host_bytes, make_plan
from easi3r.progress import silent

LONG = {**QUICK, "pieces.frames": 8, "pieces.overlap": 3, "window": 2}


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 13, 14, 40, 1000])
@pytest.mark.parametrize(("at_most", "overlap"), [(8, 3), (8, 4), (110, 10)])
def test_pieces_cover_the_clip_and_share_enough(num_frames: int, at_most: int, overlap: int) -> None:
    pieces = cut_clip(num_frames, at_most, overlap)
    assert pieces[0].start == 0 and pieces[-1].stop == num_frames
    assert all(len(piece) <= at_most for piece in pieces) and len({len(piece) for piece in pieces}) == 1
    assert all(after.start > before.start for before, after in itertools.pairwise(pieces))
    assert all(before.stop - after.start >= overlap for before, after in itertools.pairwise(pieces))
    assert len(pieces) == (1 if num_frames <= at_most else -(-(num_frames - overlap) // (at_most - overlap)))


def plan_of(num_frames: int, settings: Settings, *, masks_only: bool = False):
    passes = PairPasses(random_model().network, silent, Clock())
    return make_plan(passes, (num_frames, 96, 128), settings, masks_only=masks_only)


def test_less_memory_gives_smaller_batches_then_shorter_pieces() -> None:
    plenty, less, little = (plan_of(300, Settings(memory=gib)) for gib in (64.0, 1.6, 1.0))
    assert plenty.batch_size == 8 and len(plenty.pieces[0]) <= 110
    assert less.batch_size < 8 or len(less.pieces) > len(plenty.pieces)
    assert len(little.pieces) > len(less.pieces)
    assert little.device_bytes <= 1.0 * 2**30
    assert plan_of(300, Settings(memory=1.0), masks_only=True).device_bytes < little.device_bytes


def test_what_is_said_does_not_grow_with_the_length_but_for_the_result() -> None:
    short, long = (plan_of(n, Settings()) for n in (300, 1000))
    assert long.device_bytes - short.device_bytes < 700 * 96 * 128 * 30
    assert long.seconds > 3 * short.seconds and long.disk_bytes == pytest.approx(short.disk_bytes * 10 / 3)


def test_a_limit_that_cannot_be_kept_is_said_before_any_work() -> None:
    with pytest.raises(InputError, match=r"limited to 0\.1 GiB.*allow more, or choose a smaller image_size"):
        plan_of(300, Settings(memory=0.1))
    assert len(plan_of(300, Settings(memory="auto")).pieces) >= 1


def test_a_frame_that_is_paired_with_all_others_keeps_the_clip_in_one_piece() -> None:
    settings = Settings().with_options({"pairs.graph": "reference", "pairs.reference": 250})
    assert plan_of(300, settings).pieces == (range(300),)


def test_the_machine_has_some_memory() -> None:
    assert 1e8 < free_host_bytes() < 1e15


def test_the_command_line_says_what_it_will_need(tmp_path: Path, capfd) -> None:
    clip = write_images(tmp_path / "clip", moving_square())
    assert run_cli("segment", clip, "-o", tmp_path / "out", "--image-size", "native") == 0
    said = capfd.readouterr().err
    assert "one piece" in said and "GiB of memory" in said and "on disk" in said


# --- pieces


def test_a_long_clip_is_one_scene_whatever_the_pieces() -> None:
    clip = moving_square(20)
    scene = random_model().reconstruct(clip, **LONG)
    assert scene.num_frames == 20 and (scene.depth > 0).all() and (scene.confidence >= 1).all()
    rotation = scene.camera_to_world[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.mT, np.tile(np.eye(3), (20, 1, 1)), atol=1e-4)
    assert len(np.unique(scene.intrinsics[:, 0, 0])) == 1, "the focal length is shared by all pieces"
    notes = scene.meta["pieces"]
    assert [note["frames"] for note in notes] == [[p.start, p.stop] for p in cut_clip(20, 8, 3)]
    assert "seam_residual" not in notes[0] and all(note["seam_residual"] >= 0 for note in notes[1:])
    motion = random_model().segment(clip, **LONG)
    assert motion.meta["pieces"][1]["threshold"] == notes[1]["threshold"]
    np.testing.assert_array_equal(motion.dynamic_mask, scene.dynamic_mask)


def test_every_frame_is_encoded_once(monkeypatch) -> None:
    model, seen = random_model(), []
    encode = type(model.network).encode
    monkeypatch.setattr(
        type(model.network), "encode", lambda self, images: (seen.append(len(images)), encode(self, images))[1]
    )
    model.segment(moving_square(20), **LONG)
    assert sum(seen) == 20


def test_frames_far_from_a_seam_have_the_attention_of_the_piece_alone() -> None:
    clip = moving_square(13)
    whole = random_model().segment(clip, **LONG, dtype="float32", evidence="attention")
    first, second = cut_clip(13, 8, 3)
    alone = random_model().segment(clip[second.start : second.stop], **LONG, dtype="float32", evidence="attention")
    np.testing.assert_allclose(
        whole.attention.source_mean[first.stop :], alone.attention.source_mean[first.stop - second.start :], atol=1e-5
    )


def test_given_masks_are_dealt_out_to_the_pieces() -> None:
    masks = np.zeros((13, 48, 64), bool)
    masks[np.arange(13), :, np.arange(13) * 4] = True
    motion = random_model().segment(moving_square(13), masks=masks, **LONG)
    np.testing.assert_array_equal(motion.dynamic_mask, masks)


# --- out of memory


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_out_of_memory_is_tried_again_in_less_once(monkeypatch, caplog, error: Exception) -> None:
    work_through, plans = Job.work_through, []

    def fail_first(self, frames, given, plan):
        plans.append(plan)
        if len(plans) == 1:
            raise error
        return work_through(self, frames, given, plan)

    monkeypatch.setattr(Job, "work_through", fail_first)
    with caplog.at_level(logging.WARNING, "easi3r"):
        scene = random_model().reconstruct(moving_square(20), **(LONG | {"pieces.frames": 16}))
    assert isinstance(scene, Scene) and "did not suffice" in caplog.text and "once more in" in caplog.text
    assert plans[1].batch_size < plans[0].batch_size and len(plans[1].pieces[0]) < len(plans[0].pieces[0])


def test_out_of_memory_twice_is_one_sentence(monkeypatch) -> None:
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Job, "work_through", fail)
    with pytest.raises(InputError, match=r"does not suffice for 3 frames.*choose a smaller image_size"):
        random_model().reconstruct(moving_square(), **QUICK)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch) -> None:
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("something else")

    monkeypatch.setattr(Job, "work_through", fail)
    with pytest.raises(RuntimeError, match="something else"):
        random_model().reconstruct(moving_square(), **QUICK)
    assert len(calls) == 1

"""What VGGT costs at the public size, counted without doing it: operations and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from easi3r.backbones.vggt import LAYERS_READ, ReadOuts, Vggt, VggtConfig
from easi3r.backbones.vggt_sites import CUT_LAYERS
from easi3r.clip_passes import ClipPasses, clip_flops, encoder_flops
from easi3r.clock import Clock
from easi3r.config import Settings
from easi3r.gram_maps import capture_grams
from easi3r.precision import in_precision
from easi3r.progress import silent
from hooks import drop_keys

GRID = (21, 37)
SIZE = (294, 518)


def gflop(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


@pytest.fixture(scope="module")
def public() -> Vggt:
    with torch.device("meta"):
        return Vggt(VggtConfig()).requires_grad_(False)


def test_the_default_configuration_is_the_public_model(public: Vggt) -> None:
    state = public.state_dict()
    assert len(state) + 1 == 1797  # and the mask token
    assert sum(value.numel() for value in state.values()) + 1024 == pytest.approx(1256.5e6, rel=1e-4)


@pytest.fixture(scope="module")
def encoding(public: Vggt) -> float:
    image = torch.empty(1, 3, *SIZE, device="meta")
    return gflop(lambda: public.encode(image))


def test_parts_cost_what_is_published(public: Vggt, encoding: float) -> None:
    read_outs = ReadOuts((torch.empty(1, 782, 2048, device="meta"),) * 4, GRID)
    assert encoding == pytest.approx(533, rel=0.01)
    assert gflop(lambda: public.predict_depth(read_outs)) == pytest.approx(170, rel=0.05)
    assert gflop(lambda: public.predict_points(read_outs)) == pytest.approx(170, rel=0.05)
    assert gflop(lambda: public.predict_poses(read_outs)) == pytest.approx(1.7, rel=0.05)


@pytest.mark.parametrize(("num_frames", "published"), [(1, 1598), (8, 2019), (32, 3462)])
def test_a_pass_costs_what_is_published(public: Vggt, encoding: float, num_frames: int, published: float) -> None:
    tokens = torch.empty(num_frames, 777, 1024, device="meta")
    aggregate = gflop(lambda: public.aggregate(tokens, GRID)) / num_frames
    assert encoding + aggregate == pytest.approx(published, rel=0.01)


def test_two_passes_with_everything_reused_cost_less_than_published(public: Vggt, encoding: float) -> None:
    """32 frames, without the point head, what is captured included; the row 'all but tracks' is 3803 per frame."""
    tokens, one = torch.empty(32, 777, 1024, device="meta"), torch.empty(1, 782, 2048, device="meta")

    def first_pass() -> None:
        with capture_grams(public, 32, GRID):
            public.aggregate(tokens, GRID)

    first, second = gflop(first_pass), gflop(lambda: public.aggregate(tokens, GRID, layers=LAYERS_READ[-1:]))
    heads = gflop(lambda: public.predict_depth(ReadOuts((one,) * 4, GRID)))
    poses = gflop(lambda: public.predict_poses(ReadOuts((one,) * 4, GRID)))
    both = encoding + (first + second) / 32 + heads + 2 * poses
    assert 1.5 * 3803 < both < 1.75 * 3803
    forecast = encoder_flops(public.config, 777) + clip_flops(public.config, 32, 782, 24) / 32
    assert forecast / 1e9 == pytest.approx(encoding + second / 32, rel=0.01)
    assert forecast / 1e9 == pytest.approx(1538 + 60.1 * 32, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive at once that were made while the mode is on; ``known`` ones do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.at_most = 0  # bytes; of those alive now, so many at most

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.at_most += storage.nbytes()
        if self.at_most > self.peak:  # seldom: who is gone is looked for only where it matters
            self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
            self.at_most = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.at_most)
        return result


def peak_gigabytes(network: Vggt, given: list[Tensor], work: Callable[[], object]) -> float:
    """Of everything but weights, what is given included."""
    live = LiveBytes([*network.parameters(), *given])
    with live:
        work()
    return (live.peak + sum(values.untyped_storage().nbytes() for values in given)) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(("num_frames", "most"), [(20, 3.0), (100, 21 / 2)])
def test_frames_need_less_than_half_of_the_published_memory(num_frames: int, most: float) -> None:
    """Of 21 GB for 100: both passes as they follow each other, capture, read-outs and heads, which few frames need."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network = in_precision(
            Vggt(dataclasses.replace(VggtConfig(), point_head=None, track_head=None)), torch.bfloat16
        )
        tokens = torch.empty(num_frames, 777, 1024, dtype=torch.bfloat16)
        dynamic = torch.zeros(num_frames, 777, dtype=torch.bool)

        def both_passes() -> None:
            with capture_grams(network, num_frames, GRID) as statistics:
                read_outs = network.aggregate(tokens, GRID)
            kept = statistics.raw_maps(), network.predict_poses(read_outs)
            depth = network.predict_depth(read_outs)
            del read_outs
            with drop_patches_by_mask(network, dynamic):
                second = network.predict_poses(network.aggregate(tokens, GRID, layers=LAYERS_READ[-1:]))
            assert len(depth) == 2 and len(kept) == 2 and second.shape[1] == num_frames

        peak = peak_gigabytes(network, [tokens], both_passes)
    load = ClipPasses(network, silent, Clock()).load((num_frames, *SIZE), 0, 1, Settings(), masks_only=False)
    forecast = (load.activation_bytes + load.kept_bytes + load.token_bytes) / 1e9
    assert peak < 1.05 * forecast < 2 * peak
    assert 0.03 * num_frames < peak < most


@contextmanager
def drop_patches_by_mask(network: Vggt, dynamic: Tensor) -> Iterator[None]:
    """As ``drop_patches``; which keys stay cannot be known of tensors without values, so the global blocks keep all."""
    kept = F.pad(~dynamic, (network.num_special, 0), value=True)
    with drop_keys(network, kept, location="frame", layers=CUT_LAYERS):
        yield

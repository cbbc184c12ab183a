"""Low precision: what is rounded, what never is, and how far the result moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_inputs import moving_square
from torch import nn

from easi3r import Easi3R
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.errors import InputError
from easi3r.inference import empty_predictions, encode_frames, observe_pairs
from easi3r.precision import choose_dtype, fast_bf16, in_precision
from easi3r.progress import silent

SIZES = {"enc_embed_dim": 128, "enc_depth": 2, "enc_num_heads": 2, "dec_embed_dim": 128, "dec_depth": 4}


def small_network(head: str) -> Dust3r:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dust3r(Dust3rConfig(**SIZES, dec_num_heads=2, patch_size=8, head_type=head))
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_matrices_are_low_and_norms_and_last_layers_are_not(head: str) -> None:
    network = small_network(head)
    twin = in_precision(network, torch.bfloat16)
    fine = {name for name, tensor in twin.state_dict().items() if tensor.dtype == torch.float32}
    low = {name for name, tensor in twin.state_dict().items() if tensor.dtype == torch.bfloat16}
    last = "proj" if head == "linear" else "dpt.head.4"
    assert fine | low == set(network.state_dict())
    assert {f"downstream_head{k}.{last}.{part}" for k in (1, 2) for part in ("weight", "bias")} <= fine
    assert all("norm" in name or last in name for name in fine)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}, "the given network stays"


def test_a_network_that_is_right_already_is_not_copied() -> None:
    network = small_network("linear")
    assert in_precision(network, torch.float32) is network
    half = small_network("linear").half()
    whole = in_precision(half, torch.float32)
    assert whole is not half and whole.dtype == torch.float32 and half.dtype == torch.float16


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_low_precision_stays_near_and_its_output_is_float32(head: str) -> None:
    network = small_network(head)
    images, pairs = moving_square(3), np.array([[0, 1], [1, 2], [2, 0]])
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        same = in_precision(network, dtype)
        maps: list[torch.Tensor] = []
        predictions = empty_predictions(pairs, 48, 64, torch.float32)
        tokens = encode_frames(same, images, 2, silent)
        assert tokens.dtype == dtype
        listener = lambda _, *both, maps=maps: maps.extend(both)  # noqa: E731
        observe_pairs(same, tokens, pairs, (6, 8), listener, silent, batch_size=2, predictions=predictions)
        assert {m.dtype for m in maps} == {torch.float32}
        found[dtype] = (torch.cat(maps), predictions.points_second)
    for exact, rounded in zip(*found.values(), strict=True):
        error = (exact - rounded).abs().median() / exact.abs().median()
        assert 0 < error < 0.03


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_format_is_taken(name: str) -> None:
    assert choose_dtype(name, small_network("linear")) == getattr(torch, name)


def test_auto_takes_what_the_hardware_is_fast_at_where_it_pays() -> None:
    fast = torch.bfloat16 if fast_bf16() else torch.float32
    assert choose_dtype("auto", small_network("linear")) == fast
    tiny = Dust3r(Dust3rConfig(96, 1, 4, 96, 1, 4, head_type="linear"))
    assert choose_dtype("auto", tiny) == torch.float32


def test_half_precision_on_the_cpu_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="expected bfloat16 or float32"):
        choose_dtype("float16", small_network("linear"))


def test_the_given_network_object_keeps_its_format() -> None:
    model = Easi3R(small_network("linear"))
    motion = model.segment(moving_square(), dtype="bfloat16", image_size="native")
    assert motion.meta["dtype"] == "bfloat16"
    assert {type(p) for p in model.network.parameters()} == {nn.Parameter}
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}

"""Capture and cut against softmax written out, on our networks and on other people's; memory; manners of the hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from standin import AsymmetricCroCo3DStereo, view
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from easi3r.backbones.dust3r import Decoded
from hooks import (
    Attend,
    FrameStatistics,
    HookError,
    capture_attention,
    cut_attention,
    drop_keys,
    find_sites,
    observe_attention,
    separate_attention,
)
from hooks.capture import mean_logits

GRID = (3, 4)
NUM_TOKENS = 12


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    return random_tensor(3, NUM_TOKENS, 32), random_tensor(3, NUM_TOKENS, 32, seed=1)


@pytest.fixture
def standin() -> nn.Module:
    sizes = {"enc_embed_dim": 32, "enc_depth": 1, "enc_num_heads": 2, "dec_embed_dim": 48, "dec_depth": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AsymmetricCroCo3DStereo(**sizes, dec_num_heads=3, patch_size=8).requires_grad_(False).eval()


@contextmanager
def recorded_logits(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The slow twin of capture: every cross-attention's whole [B, heads, Nq, Nk] logits, decoder by decoder."""
    logits: dict[str, list[Tensor]] = {"dec_blocks": [], "dec_blocks2": []}
    handles = []
    for name, kept in logits.items():
        for block in getattr(network, name):

            def before(module: nn.Module, inputs: tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
                q, k, _ = inputs
                kept.append(torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5)

            handles.append(block.cross_attn.attend.register_forward_pre_hook(before))
    yield logits
    for handle in handles:
        handle.remove()


@contextmanager
def explicit_cross_attention(network: nn.Module, weights_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The slow twin of cut: decoder 1's cross-attention as softmax matrices, edited by ``weights_of``."""
    sites = [block.cross_attn.attend for block in network.dec_blocks]
    for attend in sites:

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return weights_of((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)) @ v

        attend.forward = forward
    yield
    for attend in sites:
        del attend.forward


def all_hooks(network: nn.Module) -> list[Any]:
    return [
        hook
        for module in network.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def assert_same_tokens(ours: Decoded, theirs: Decoded, tolerance: float) -> None:
    for one, other in zip(ours.first + ours.second, theirs.first + theirs.second, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- capture -------------------------------------------------------------------------------------------------------


def test_captured_maps_are_means_over_queries_of_the_full_logits(tiny_network, tokens) -> None:
    with recorded_logits(tiny_network) as logits, capture_attention(tiny_network) as captured:
        tiny_network.decode(*tokens, GRID)
    source, reference = captured.take()
    for maps, name in ((source, "dec_blocks"), (reference, "dec_blocks2")):
        expected = torch.cat([layer.mean(dim=2) for layer in logits[name]], dim=1).transpose(1, 2)
        assert maps.shape == (3, NUM_TOKENS, 4 * 3) and maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.1


def test_source_maps_belong_to_the_second_view_and_reference_maps_to_the_first(tiny_network, tokens) -> None:
    first, second = tokens
    changed = second.clone()
    changed[:, 5] += 1
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(first, second, GRID)
        before = captured.take()
        tiny_network.decode(first, changed, GRID)
        after = captured.take()
    heads_of_first_layer = slice(0, 3)  # before the views have read each other
    source, reference = (
        (a - b)[..., heads_of_first_layer].abs().amax(dim=(0, 2)) for a, b in zip(after, before, strict=True)
    )
    assert source[5] > 0.01 and source[:5].max() < 1e-5 and source[6:].max() < 1e-5
    assert reference.min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_mean_logits_are_float32_means_of_logits_in_any_layout_and_type(
    dtype: torch.dtype, contiguous: bool, autocast: bool
) -> None:
    q, k = (random_tensor(2, 9, 3, 8, seed=seed).to(dtype).transpose(1, 2) for seed in (1, 2))
    if contiguous:
        q, k = q.contiguous(), k.contiguous()
    expected = (q.double() @ k.double().transpose(-2, -1) * 0.3).mean(dim=2).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = mean_logits(q, k, 0.3)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_captured_batch_equals_its_pairs_one_by_one(tiny_network, tokens) -> None:
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(*tokens, GRID)
        together = captured.take()
        for i in range(3):
            tiny_network.decode(*(t[i : i + 1] for t in tokens), GRID)
            for maps, alone in zip(together, captured.take(), strict=True):
                torch.testing.assert_close(maps[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_captured_forward_pass_is_bit_identical_to_a_plain_one(tiny_network, tokens, standin, random_images) -> None:
    plain = tiny_network.decode(*tokens, GRID)
    views = [view(random_images(2, 16, 24, seed=seed)) for seed in (1, 2)]
    plain_answers = standin(*views)
    with capture_attention(tiny_network), capture_attention(standin):
        watched = tiny_network.decode(*tokens, GRID)
        answers = standin(*views)
    assert_same_tokens(watched, plain, 0)
    for answer, expected in zip(answers, plain_answers, strict=True):
        assert all(torch.equal(answer[name], expected[name]) for name in expected)


def test_the_last_of_two_forward_passes_is_taken(tiny_network, tokens) -> None:
    first, second = tokens
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(second, first, GRID)
        tiny_network.decode(first[:1], second[:1], GRID)
        after_two = captured.take()
        tiny_network.decode(first[:1], second[:1], GRID)
        alone = captured.take()
    for ours, expected in zip(after_two, alone, strict=True):
        assert ours.shape[0] == 1 and torch.equal(ours, expected)


def test_a_forward_pass_that_broke_off_leaves_nothing_to_the_next(tiny_network, tokens) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with capture_attention(tiny_network) as captured:
        broken = tiny_network.dec_blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            tiny_network.decode(*tokens, GRID)
        broken.remove()
        tiny_network.decode(*tokens, GRID)
        after_failure = captured.take()
        tiny_network.decode(*tokens, GRID)
        alone = captured.take()
    assert all(torch.equal(*pair) for pair in zip(after_failure, alone, strict=True))


def test_maps_of_a_bfloat16_network_are_float32_means_of_its_logits(tiny_network, tokens) -> None:
    network, halves = tiny_network.to(torch.bfloat16), [t.to(torch.bfloat16) for t in tokens]
    with recorded_logits(network) as logits, capture_attention(network) as captured:
        network.decode(*halves, GRID)
    source, _ = captured.take()
    expected = torch.cat([layer.mean(dim=2) for layer in logits["dec_blocks"]], dim=1).transpose(1, 2)
    assert source.dtype == torch.float32
    torch.testing.assert_close(source, expected, rtol=1e-5, atol=1e-5)


def test_maps_of_a_network_in_training_carry_no_gradient(tiny_network, tokens) -> None:
    tiny_network.requires_grad_(True)
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(*tokens, GRID).first[-1].sum().backward()
    source, reference = captured.take()
    assert not source.requires_grad and not reference.requires_grad
    assert tiny_network.dec_blocks[0].cross_attn.projk.weight.grad.abs().max() > 0


# --- cut -----------------------------------------------------------------------------------------------------------


def random_masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.rand(3, NUM_TOKENS, generator=generator) < 0.4 for _ in range(2))
    assert len({tuple(row) for row in torch.cat([query, key], dim=1).tolist()}) == 3
    return query, key


NOTHING, EVERYTHING = torch.zeros(3, NUM_TOKENS, dtype=torch.bool), torch.ones(3, NUM_TOKENS, dtype=torch.bool)
MASKS = {
    "different masks in a batch": random_masks(),
    "no dynamic key": (random_masks()[0], NOTHING),
    "no static query": (NOTHING, random_masks()[1]),
    "all keys dynamic": (random_masks()[0], EVERYTHING),
    "everything": (EVERYTHING, EVERYTHING),
    "one pair": (EVERYTHING & (torch.arange(NUM_TOKENS) == 2), EVERYTHING & (torch.arange(NUM_TOKENS) == 7)),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_cut_equals_zeroed_softmax_weights_that_are_not_renormalised(tiny_network, tokens, masks) -> None:
    query, key = masks

    def zeroed(weights: Tensor) -> Tensor:
        for b, i, j in torch.cartesian_prod(torch.arange(3), *[torch.arange(NUM_TOKENS)] * 2).tolist():
            if query[b, i] and key[b, j]:
                weights[b, :, i, j] = 0
        return weights

    with explicit_cross_attention(tiny_network, zeroed):
        expected = tiny_network.decode(*tokens, GRID)
    with cut_attention(tiny_network, query, key):
        ours = tiny_network.decode(*tokens, GRID)
    assert_same_tokens(ours, expected, 1e-5)
    plain = tiny_network.decode(*tokens, GRID)
    changed = (ours.first[0] - plain.first[0]).abs().max() > 1e-3
    assert changed == bool((query[:, :, None] & key[:, None]).any())


def only_their_own_kind(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """The slow twin of separation: [B, heads, Nq, Nk] without the weights between what moves and what does not."""
    for b, i, j in torch.cartesian_prod(torch.arange(3), *[torch.arange(NUM_TOKENS)] * 2).tolist():
        if first[b, i] != second[b, j]:
            weights[b, :, i, j] = 0
    return weights


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_separation_zeroes_the_weights_between_static_and_dynamic_tokens_in_both_directions(
    tiny_network, tokens, masks
) -> None:
    with explicit_cross_attention(tiny_network, partial(only_their_own_kind, *masks)):
        expected = tiny_network.decode(*tokens, GRID)
    with separate_attention(tiny_network, *masks):
        ours = tiny_network.decode(*tokens, GRID)
    assert_same_tokens(ours, expected, 1e-5)
    plain = tiny_network.decode(*tokens, GRID)
    changed = (ours.first[0] - plain.first[0]).abs().max() > 1e-3
    assert changed == bool((masks[0][:, :, None] != masks[1][:, None]).any())
    assert all_hooks(tiny_network) == []


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_separation_in_other_peoples_networks_is_the_same_edit(standin, random_images, masks) -> None:
    class Edited(nn.Module):
        def forward(self, weights: Tensor) -> Tensor:
            return only_their_own_kind(*masks, weights.clone())

    views = [view(random_images(3, 24, 32, seed=seed)) for seed in (0, 1)]
    plain = standin(*views)
    with separate_attention(standin, *masks):
        ours = standin(*views)
    for block in standin.dec_blocks:
        block.cross_attn.attn_drop = Edited()
    expected = standin(*views)
    for one, other in zip(ours, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0]["conf"], plain[0]["conf"]) == bool((masks[0][:, :, None] == masks[1][:, None]).all())


def test_renormalised_weights_would_be_another_result(tiny_network, tokens) -> None:
    query, key = random_masks()
    pairs = query[:, None, :, None] & key[:, None, None]

    def renormalised(weights: Tensor) -> Tensor:
        zeroed = weights.masked_fill(pairs, 0)
        return zeroed / zeroed.sum(dim=-1, keepdim=True)

    with explicit_cross_attention(tiny_network, renormalised):
        other = tiny_network.decode(*tokens, GRID)
    with cut_attention(tiny_network, query, key):
        ours = tiny_network.decode(*tokens, GRID)
    assert (ours.first[0] - other.first[0]).abs().max() > 1e-2


def test_cut_hooks_the_cross_attention_of_decoder_one_alone(tiny_network, tokens) -> None:
    with cut_attention(tiny_network, *random_masks()):
        hooked = [name for name, module in tiny_network.named_modules() if module._forward_hooks]
        assert len(all_hooks(tiny_network)) == len(hooked)
        tiny_network.decode(*tokens, GRID)
    assert hooked == [f"dec_blocks.{layer}.cross_attn.attend" for layer in range(4)]


def test_first_layer_of_decoder_two_is_the_same_under_a_cut(tiny_network, tokens) -> None:
    outputs = {name: [] for name in ("dec_blocks", "dec_blocks2")}
    for name, kept in outputs.items():
        getattr(tiny_network, name)[0].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    tiny_network.decode(*tokens, GRID)
    with cut_attention(tiny_network, *random_masks()):
        tiny_network.decode(*tokens, GRID)
    assert torch.equal(*outputs["dec_blocks2"])
    assert not torch.allclose(*outputs["dec_blocks"])


def test_cut_batch_equals_its_pairs_one_by_one(tiny_network, tokens) -> None:
    masks = random_masks()
    with cut_attention(tiny_network, *masks):
        together = tiny_network.decode(*tokens, GRID)
    for i in range(3):
        with cut_attention(tiny_network, *(m[i : i + 1] for m in masks)):
            alone = tiny_network.decode(*(t[i : i + 1] for t in tokens), GRID)
        part = Decoded([t[i : i + 1] for t in together.first], [t[i : i + 1] for t in together.second], GRID, GRID)
        assert_same_tokens(part, alone, 1e-5)


def test_a_cut_of_decoder_two_hides_tokens_of_the_first_view(tiny_network, tokens) -> None:
    tiny_network.dec_blocks2.load_state_dict(tiny_network.dec_blocks.state_dict())
    masks = random_masks()
    with cut_attention(tiny_network, *masks, location="decoder2"):
        ours = tiny_network.decode(*tokens, GRID)
    with cut_attention(tiny_network, *masks):
        mirrored = tiny_network.decode(*reversed(tokens), GRID)
    assert_same_tokens(ours, Decoded(mirrored.second, mirrored.first, GRID, GRID), 1e-6)


def test_cut_of_a_bfloat16_network_follows_float32(tiny_network, tokens) -> None:
    masks = random_masks()
    with cut_attention(tiny_network, *masks):
        exact = tiny_network.decode(*tokens, GRID)
        rounded = tiny_network.to(torch.bfloat16).decode(*(t.to(torch.bfloat16) for t in tokens), GRID)
    assert rounded.first[0].dtype == torch.bfloat16
    assert (rounded.first[0].float() - exact.first[0]).norm() < 0.05 * exact.first[0].norm()


def test_capture_and_cut_work_together_in_either_order(tiny_network, tokens) -> None:
    results = []
    for capture_first in (True, False):
        capture, cut = capture_attention(tiny_network), cut_attention(tiny_network, *random_masks())
        with capture if capture_first else cut as one, cut if capture_first else capture as other:
            tiny_network.decode(*tokens, GRID)
        results.append((one if capture_first else other).take())
    assert all(torch.equal(*maps) for maps in zip(*results, strict=True))


# --- manners -------------------------------------------------------------------------------------------------------


def hooking(network: nn.Module, kind: str) -> AbstractContextManager[Any]:
    return capture_attention(network) if kind == "capture" else cut_attention(network, NOTHING, NOTHING)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("kind", ["capture", "cut"])
def test_hooks_are_there_in_the_block_and_gone_after_it_and_after_an_error(
    tiny_network, standin, random_images, kind: str, whose: str
) -> None:
    network = tiny_network if whose == "ours" else standin
    call = {"ours": tiny_network, "theirs": lambda *images: standin(*map(view, images))}[whose]
    images = random_images(3, 24, 32), random_images(3, 24, 32, seed=1)
    with hooking(network, kind):
        assert all_hooks(network)
        call(*images)
    assert not all_hooks(network)
    with pytest.raises(KeyboardInterrupt), hooking(network, kind):
        raise KeyboardInterrupt
    assert not all_hooks(network)


@pytest.mark.parametrize("kind", ["capture", "cut"])
def test_an_error_inside_the_block_is_not_hidden_by_a_hook_error(tiny_network, kind: str) -> None:
    with pytest.raises(ZeroDivisionError) as caught, hooking(tiny_network, kind):
        raise ZeroDivisionError("mine")
    assert str(caught.value) == "mine" and caught.value.__context__ is None


@pytest.mark.parametrize("kind", ["capture", "cut"])
def test_a_network_without_decoders_is_refused_before_the_block_runs(kind: str, fails_with) -> None:
    with fails_with(HookError, "Linear", "'dec_blocks'"), hooking(nn.Linear(2, 2), kind):
        pytest.fail("the block ran")


@pytest.mark.parametrize("kind", ["capture", "cut"])
def test_blocks_without_known_attention_are_refused_by_name(tiny_network, kind: str, fails_with) -> None:
    tiny_network.dec_blocks[1].cross_attn = nn.Linear(2, 2)
    with fails_with(HookError, "'dec_blocks.1.cross_attn'", "Linear", "projq"), hooking(tiny_network, kind):
        pytest.fail("the block ran")
    assert not all_hooks(tiny_network)


@pytest.mark.parametrize(("kind", "count"), [("capture", 8), ("cut", 4)])
def test_a_block_without_a_forward_pass_is_an_error(tiny_network, kind: str, count: int, fails_with) -> None:
    expected = fails_with(HookError, f"{count} attention sites", "'dec_blocks.0.cross_attn.attend'")
    with expected, hooking(tiny_network, kind):
        pass
    assert not all_hooks(tiny_network)


@pytest.mark.parametrize("kind", ["capture", "cut"])
def test_sites_that_a_forward_pass_skips_are_named(tiny_network, tokens, kind: str, fails_with) -> None:
    tiny_network.dec_blocks[2].forward = lambda x, *others: x
    expected = fails_with(HookError, "1 attention sites", "'dec_blocks.2.cross_attn.attend'")
    with expected, hooking(tiny_network, kind):
        tiny_network.decode(*tokens, GRID)


def test_taking_twice_from_one_forward_pass_is_an_error(tiny_network, tokens, fails_with) -> None:
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(*tokens, GRID)
        captured.take()
        with fails_with(HookError, "8 attention sites"):
            captured.take()


def test_unknown_locations_are_refused_with_the_known_ones(tiny_network, fails_with) -> None:
    with fails_with(HookError, "'decoder3'", "decoder1", "decoder2"):
        find_sites(tiny_network, "decoder3")


def test_sites_are_one_per_layer_in_order(tiny_network, standin) -> None:
    names = [site.name for site in find_sites(tiny_network, "decoder2")]
    assert names == [f"dec_blocks2.{layer}.cross_attn.attend" for layer in range(4)]
    assert [site.name for site in find_sites(standin, "decoder1")] == [f"dec_blocks.{i}.cross_attn" for i in range(2)]


# --- keys that are left out, and queries and keys as they meet --------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_dropped_keys_leave_the_softmax(tiny_network, tokens, batch: int) -> None:
    kept = torch.rand(batch, NUM_TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3
    tokens = [some[:batch] for some in tokens]

    def renormalised(weights: Tensor) -> Tensor:
        weights = weights.masked_fill(~kept[:, None, None], 0)
        return weights / weights.sum(dim=-1, keepdim=True)

    with explicit_cross_attention(tiny_network, renormalised):
        expected = tiny_network.decode(*tokens, GRID)
    with drop_keys(tiny_network, kept, location="decoder1"):
        ours = tiny_network.decode(*tokens, GRID)
    assert_same_tokens(ours, expected, 1e-5)
    plain = tiny_network.decode(*tokens, GRID)
    assert not torch.allclose(ours.first[0], plain.first[0], atol=1e-3)
    assert all_hooks(tiny_network) == []


def test_keys_are_dropped_in_chosen_layers_and_in_other_peoples_networks(standin, random_images) -> None:
    views = [view(random_images(2, 48, 80, seed=seed)) for seed in (1, 2)]
    dropout = standin.dec_blocks[0].cross_attn.attn_drop

    def weights() -> Tensor:
        """Of the first layer, as they are behind all hooks that are there already."""
        seen: list[Tensor] = []
        handle = dropout.register_forward_hook(lambda _, __, out: seen.append(out))
        standin(*views)
        handle.remove()
        return seen[0]

    plain = weights()
    kept = torch.ones(1, plain.shape[-1], dtype=torch.bool)
    kept[0, ::3] = False
    with drop_keys(standin, kept, location="decoder1", layers=range(1)):
        dropped = weights()
        assert len(standin.dec_blocks[1].cross_attn.attn_drop._forward_hooks) == 0
    left = plain * kept[0]
    torch.testing.assert_close(dropped, left / left.sum(dim=-1, keepdim=True))
    assert (left.sum(-1) < 0.99).any()


def test_queries_and_keys_are_observed_as_they_meet(tiny_network, tokens, fails_with) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with observe_attention(
        tiny_network, lambda layer, q, k: seen.update({layer: (q, k)}), location="decoder2", layers=frozenset({1, 3})
    ):
        tiny_network.attend(*tokens, GRID)
    assert sorted(seen) == [1, 3] and seen[1][0].shape == (3, 3, NUM_TOKENS, 16)
    with capture_attention(tiny_network) as captured:
        tiny_network.decode(*tokens, GRID)
    reference = captured.take()[1].unflatten(2, (4, 3))
    q, k = seen[3]
    torch.testing.assert_close((q @ k.mT / 4).mean(dim=2).mT, reference[:, :, 3], rtol=1e-4, atol=1e-5)
    with (
        fails_with(HookError, "never reached", "dec_blocks2.3"),
        observe_attention(tiny_network, lambda *_: None, location="decoder2", layers=frozenset({3})),
    ):
        pass
    with (
        fails_with(HookError, "never reached", "dec_blocks.0"),
        drop_keys(tiny_network, torch.ones(1, NUM_TOKENS, dtype=torch.bool), location="decoder1"),
    ):
        pass


# --- memory --------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that were made while it is on and still live; ``peak`` since ``mark`` was last called."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.live())
        return outputs

    def live(self) -> int:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())

    def mark(self) -> int:
        self.peak = self.live()
        return self.peak


Capture = Callable[[nn.Module], AbstractContextManager[Any]]


@contextmanager
def naive_capture(network: nn.Module) -> Iterator[list[Tensor]]:
    """What capture must not do: form the N x N logits of all heads."""
    maps: list[Tensor] = []
    handles = []
    for block in (*network.dec_blocks, *network.dec_blocks2):

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            q, k, _ = inputs
            maps.append((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).mean(dim=2))

        handles.append(block.cross_attn.attend.register_forward_pre_hook(before))
    yield maps
    for handle in handles:
        handle.remove()


@contextmanager
def key_copying_capture(network: nn.Module) -> Iterator[list[Tensor]]:
    """Also too much: no N x N matrix, but a copy of the keys."""
    maps: list[Tensor] = []
    handles = []
    for block in (*network.dec_blocks, *network.dec_blocks2):

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            q, k, _ = inputs
            maps.append((q.mean(dim=2, keepdim=True) @ k.clone().transpose(2, 3)).squeeze(2))

        handles.append(block.cross_attn.attend.register_forward_pre_hook(before))
    yield maps
    for handle in handles:
        handle.remove()


def live_bytes_at_sites(
    network: nn.Module, capture: Capture, run: Callable[[], Any]
) -> tuple[list[int], list[int], int]:
    """Live bytes before and the peak inside the hooks of each site, and the size of the captured maps."""
    sites = [block.cross_attn.attend for block in (*network.dec_blocks, *network.dec_blocks2)]
    before, peaks = [], []
    with LiveBytes() as meter:
        handles = [site.register_forward_pre_hook(lambda *_: before.append(meter.mark())) for site in sites]
        with capture(network) as captured:
            handles += [site.register_forward_pre_hook(lambda *_: peaks.append(meter.peak)) for site in sites]
            run()
        for handle in handles:
            handle.remove()
    assert len(before) == len(peaks) == len(sites)
    maps = captured.take() if hasattr(captured, "take") else captured
    return before, peaks, sum(values.nbytes for values in maps)


@pytest.mark.parametrize(
    ("batch", "dtype", "controls"),
    [(1, torch.float32, True), (2, torch.float32, False), (2, torch.bfloat16, False)],
)
def test_capture_takes_under_two_percent_of_one_layers_full_maps(
    make_network, batch: int, dtype: torch.dtype, controls: bool
) -> None:
    grid, heads, head_dim = (18, 32), 12, 64
    num_tokens = grid[0] * grid[1]
    network = make_network(dec_embed_dim=heads * head_dim, dec_num_heads=heads, dec_depth=2).to(dtype)
    for block in (*network.dec_blocks, *network.dec_blocks2):
        block.mlp = nn.Identity()  # most of the time, no part of the question
    tokens = [random_tensor(batch, num_tokens, 32, seed=seed).to(dtype) for seed in (1, 2)]
    full_maps = batch * heads * num_tokens**2 * 4

    def run() -> None:
        network.decode(*tokens, grid)

    run()
    plain, _, _ = live_bytes_at_sites(network, lambda _: nullcontext([]), run)

    def extra(capture: Capture) -> float:
        """The most that is held at any site beyond a plain forward pass and the returned maps, in full maps."""
        _, peaks, returned = live_bytes_at_sites(network, capture, run)
        assert returned >= 4 * batch * num_tokens * heads * 4
        return (max(peak - base for peak, base in zip(peaks, plain, strict=True)) - returned) / full_maps

    assert 0 < extra(capture_attention) < 0.02
    if controls:
        assert extra(key_copying_capture) > 0.08
        assert extra(naive_capture) > 0.98


def test_capture_adds_nothing_to_the_peak_of_other_peoples_networks(standin, random_images) -> None:
    views = [view(random_images(1, 96, 160, seed=seed)) for seed in (1, 2)]

    def peak(context: AbstractContextManager[Any]) -> int:
        with context, LiveBytes() as meter:
            standin(*views)
        return meter.peak

    full_maps = 3 * (12 * 20) ** 2 * 4
    plain = peak(nullcontext())
    assert plain > full_maps
    assert peak(capture_attention(standin)) - plain < 0.02 * full_maps + 4 * 3 * 240 * 4


# --- statistics ----------------------------------------------------------------------------------------------------


def stream(values: dict[int, Tensor], num_frames: int, batch: int) -> FrameStatistics:
    """Fold in all maps, frames interleaved."""
    indices = [frame for frame, maps in values.items() for _ in maps]
    stacked = torch.cat(list(values.values()))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    statistics = FrameStatistics(num_frames)
    for part in order.split(batch):
        statistics.update([indices[i] for i in part.tolist()], stacked[part])
    return statistics


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_streamed_statistics_equal_those_of_stacked_maps(batch: int) -> None:
    values = {frame: random_tensor(count, 5, 3, seed=frame) * 2 + 10 for frame, count in enumerate((7, 2, 1, 5))}
    statistics = stream(values, 5, batch)
    assert statistics.counts.tolist() == [7, 2, 1, 5, 0]
    assert statistics.mean.shape == statistics.std.shape == (5, 5, 3)
    for frame, maps in values.items():
        torch.testing.assert_close(statistics.mean[frame], maps.mean(dim=0), rtol=1e-5, atol=1e-5)
        if len(maps) > 1:
            torch.testing.assert_close(statistics.std[frame], maps.std(dim=0), rtol=1e-4, atol=1e-5)


def test_a_frame_seen_once_has_its_mean_and_no_deviation_and_one_never_seen_has_neither() -> None:
    statistics = FrameStatistics(2)
    statistics.update([0], torch.tensor([[3.0, -1.0]]))
    assert statistics.mean.tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert statistics.std.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_pooled_deviation_is_that_of_all_maps_together() -> None:
    values = {frame: random_tensor(count, 4, seed=frame) + frame for frame, count in ((0, 6), (1, 1), (3, 2))}
    pooled = stream(values, 5, 3).pooled_std()
    torch.testing.assert_close(pooled, torch.cat(list(values.values())).std(dim=0), rtol=1e-5, atol=1e-5)


def test_pooled_deviation_of_a_single_map_is_zero() -> None:
    assert stream({0: random_tensor(1, 4)}, 2, 1).pooled_std().tolist() == [0.0] * 4


def test_small_deviations_around_large_means_survive() -> None:
    values = {0: random_tensor(50, 4) * 0.01 + 1000}
    torch.testing.assert_close(stream(values, 1, 8).std[0], values[0].double().std(dim=0).float(), rtol=2e-2, atol=0)


def test_statistics_of_bfloat16_maps_are_float32() -> None:
    statistics = FrameStatistics(1)
    statistics.update([0, 0], torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16))
    assert statistics.mean.dtype == statistics.std.dtype == torch.float32
    assert float(statistics.std) == pytest.approx(0.5**0.5)


def test_statistics_of_nothing_are_refused(fails_with) -> None:
    for read in (lambda s: s.mean, lambda s: s.std, lambda s: s.pooled_std()):
        with fails_with(ValueError, "update"):
            read(FrameStatistics(3))


def test_a_map_without_a_frame_is_refused() -> None:
    with pytest.raises(ValueError):
        FrameStatistics(3).update([0], random_tensor(2, 4))


def test_attend_is_softmax_attention() -> None:
    q, k, v = (random_tensor(2, 3, n, 8, seed=n) for n in (5, 7, 7))
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1) @ v
    torch.testing.assert_close(Attend()(q, k, v), expected, rtol=1e-5, atol=1e-5)

"""Networks that somebody else built: same results as from their files, and left exactly as they were."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from standin import AsymmetricCroCo3DStereo, Rope, view
from torch import Tensor, nn

from easi3r import Easi3R
from easi3r.backbones.adoption import adopt_network
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.errors import InputError
from easi3r.inference import to_network_input
from hooks import capture_attention, cut_attention

SIZES = {
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 48,
    "dec_depth": 3,
    "dec_num_heads": 3,
    "patch_size": 8,
    "img_size": (64, 64),
}
ANSWERS = (("points_first", 0, "pts3d"), ("confidence_first", 0, "conf"))
ANSWERS += (("points_second", 1, "pts3d_in_other_view"), ("confidence_second", 1, "conf"))


def make_standin() -> AsymmetricCroCo3DStereo:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AsymmetricCroCo3DStereo(**SIZES).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "projq" in name or "projk" in name:
                weight.mul_(4)
    return network


@pytest.fixture
def standin() -> AsymmetricCroCo3DStereo:
    return make_standin()


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in's weights in a checkpoint file."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in {**SIZES, "head_type": "linear"}.items())
    path = tmp_path_factory.mktemp("adoption") / "standin.pth"
    text = f"AsymmetricCroCo3DStereo({arguments})"
    torch.save({"args": argparse.Namespace(model=text), "model": make_standin().state_dict()}, path)
    return path


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Wrapper(nn.Module):
    """As nn.DataParallel and torch.compile wrap a network."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, network)


# --- the stand-in is the published network -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(parity_file, parity_figures) -> tuple[AsymmetricCroCo3DStereo, Path, NpzFile]:
    path = parity_file("linear", "pth")
    content = torch.load(path, weights_only=False)
    figures = parity_figures("linear")
    sizes = {key: value for key, value in load_checkpoint(path)[0].config.__dict__.items() if key in SIZES}
    network = AsymmetricCroCo3DStereo(**sizes).eval().requires_grad_(False)
    network.load_state_dict({"mask_token": network.mask_token, **content["model"]})
    return network, path, figures


def test_standin_gives_the_published_attention_points_and_masked_points(published) -> None:
    network, _, figures = published
    frames = to_network_input(figures["frames"])
    first, second = figures["pairs"][figures["kept_pairs"]].T
    views = view(frames[first]), view(frames[second])
    patches = figures["given_masks"].reshape(len(frames), 6, 16, 8, 16).any(axis=(2, 4))
    dynamic = torch.from_numpy(patches).flatten(1)
    with capture_attention(network) as captured:
        plain = network(*views)
    source, reference = captured.take()
    with cut_attention(network, ~dynamic[first], dynamic[second]):
        masked = network(*views)
    for maps, name in ((source, "attention_source"), (reference, "attention_reference")):
        expected = torch.from_numpy(figures[name][figures["kept_pairs"]]).flatten(1, 2)
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)
    for answers, run in ((plain, "first"), (masked, "second")):
        for name, side in (("pts3d", 0), ("pts3d_in_other_view", 1), ("conf", 0), ("conf", 1)):
            expected = torch.from_numpy(figures[f"{run}_{'conf' if name == 'conf' else 'pts'}{side + 1}"])
            assert relative(answers[side][name], expected) < 1e-4


def test_adopted_parity_network_segments_as_its_file_does(published) -> None:
    network, path, figures = published
    options = {"image_size": "native", "passes": 1, "max_frames": 3}
    ours = Easi3R(network).segment(figures["frames"], **options)
    theirs = Easi3R.from_pretrained(path, device="cpu").segment(figures["frames"], **options)
    assert_same_motion(ours, theirs)


# --- same results --------------------------------------------------------------------------------------------------


def assert_same_motion(ours: Any, theirs: Any) -> None:
    for name, maps in theirs.attention.arrays().items():
        np.testing.assert_array_equal(getattr(ours.attention, name), maps)
    np.testing.assert_array_equal(ours.dynamic_mask, theirs.dynamic_mask)
    np.testing.assert_array_equal(ours.dynamic_score, theirs.dynamic_score)


def test_hooks_on_the_standin_capture_what_they_capture_on_ours(standin, saved, random_images) -> None:
    network, _ = load_checkpoint(saved)
    images = random_images(3, 24, 40), random_images(3, 24, 40, seed=1)
    with capture_attention(standin) as theirs, capture_attention(network) as ours, torch.no_grad():
        standin(*map(view, images))
        network(*images)
    for one, other in zip(ours.take(), theirs.take(), strict=True):
        assert one.shape == other.shape and other.std() > 0.1
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("location", ["decoder1", "decoder2"])
@torch.no_grad()
def test_hooks_on_the_standin_cut_what_they_cut_on_ours(standin, saved, random_images, location: str) -> None:
    network, _ = load_checkpoint(saved)
    images = random_images(3, 24, 40), random_images(3, 24, 40, seed=1)
    query, key = (torch.rand(3, 15, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in (1, 2))
    plain = network(*images)
    with cut_attention(network, query, key, location=location):
        ours = network(*images)
    with cut_attention(standin, query, key, location=location):
        theirs = standin(*map(view, images))
    for name, side, key_name in ANSWERS:
        assert relative(getattr(ours, name), theirs[side][key_name]) < 1e-4
    assert relative(plain.points_first, ours.points_first) > 1e-3


@pytest.mark.parametrize("passes", [1, 2])
def test_an_adopted_network_segments_as_its_file_does(standin, saved, clip, passes: int) -> None:
    ours, theirs = Easi3R(standin), Easi3R.from_pretrained(saved, device="cpu")
    assert_same_motion(ours.segment(clip, passes=passes), theirs.segment(clip, passes=passes))


def test_an_adopted_network_predicts_what_the_object_predicts(standin, random_images) -> None:
    network, info = adopt_network(standin)
    images = random_images(2, 24, 40), random_images(2, 24, 40, seed=1)
    with torch.no_grad():
        ours, theirs = network(*images), standin(*map(view, images))
    for name, side, key in ANSWERS:
        assert relative(getattr(ours, name), theirs[side][key]) < 1e-4
    assert info.path is None and info.sha256() is None and "AsymmetricCroCo3DStereo" in info.name


def test_sizes_ranges_and_rotary_base_are_read_off_the_object(standin) -> None:
    standin.rope.base, standin.conf_mode = 50.0, ("exp", 2, 9)
    config = adopt_network(standin)[0].config
    assert {key: getattr(config, key) for key in SIZES} == SIZES
    assert config.rope_base == 50.0 and config.conf_range == (2.0, 9.0) and config.head_type == "linear"


@pytest.mark.parametrize("names", [("module",), ("_orig_mod",), ("_orig_mod", "module")])
def test_wrapped_objects_give_the_same_network(standin, saved, clip, names: tuple[str, ...]) -> None:
    wrapped = standin
    for name in names:
        wrapped = Wrapper(wrapped, name)
    expected = Easi3R.from_pretrained(saved, device="cpu").segment(clip, passes=1)
    assert_same_motion(Easi3R(wrapped).segment(clip, passes=1), expected)


def test_objects_with_dpt_heads_and_extra_tensors_are_adopted(make_network, random_images) -> None:
    dpt = make_network(head_type="dpt", **SIZES)
    standin = make_standin()
    standin.load_state_dict({k: v for k, v in dpt.state_dict().items() if "head" not in k}, strict=False)
    for side in ("downstream_head1", "downstream_head2"):
        head = copy.deepcopy(getattr(dpt, side))
        head.dpt.scratch.layer_rn = nn.ModuleList(
            [head.dpt.scratch.get_submodule(f"layer{i}_rn") for i in (1, 2, 3, 4)]
        )
        head.head_local_features = nn.Linear(2, 2)
        setattr(standin, side, head)
    network, _ = adopt_network(standin)
    images = random_images(1, 24, 40), random_images(1, 24, 40, seed=1)
    assert network.config == dpt.config
    assert torch.equal(network(*images).points_first, dpt(*images).points_first)


def test_our_own_network_is_taken_as_it_is(tiny_network) -> None:
    assert adopt_network(tiny_network)[0] is tiny_network


# --- left as it was ------------------------------------------------------------------------------------------------


def portrait(network: nn.Module) -> dict[str, Any]:
    """Everything about an object that a visitor could have changed."""
    return {
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad, p.dtype) for name, p in network.named_parameters()],
        "grads": [id(p.grad) for p in network.parameters()],
        "modules": [(name, id(m), m.training) for name, m in network.named_modules()],
        "attributes": [{key: id(value) for key, value in vars(m).items()} for m in network.modules()],
        "hooks": [
            (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in network.modules()
        ],
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_object_is_unchanged_after_adoption_and_use(standin, clip, training: bool) -> None:
    standin.train(training)
    standin.dec_norm.requires_grad_(False)
    sum(p.sum() for p in standin.parameters() if p.requires_grad).backward()
    values = {key: value.clone() for key, value in standin.state_dict().items()}
    before = portrait(standin)
    Easi3R(standin).reconstruct(clip, passes=2, align="none")
    after = portrait(standin)
    assert {key: after[key] == before[key] for key in before} == dict.fromkeys(before, True)
    assert values.keys() == standin.state_dict().keys()
    assert all(torch.equal(standin.state_dict()[key], value) for key, value in values.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in standin.modules())


def test_tensors_are_shared_with_the_object_not_copied(standin) -> None:
    network, _ = adopt_network(standin)
    theirs = standin.state_dict()
    assert [name for name, ours in network.state_dict().items() if ours.data_ptr() != theirs[name].data_ptr()] == []


def test_an_adopted_network_follows_a_change_of_the_objects_weights(standin, random_images) -> None:
    network, _ = adopt_network(standin)
    before = network.encode(random_images(1, 16, 16))
    with torch.no_grad():
        standin.enc_norm.bias.add_(1)
    torch.testing.assert_close(network.encode(random_images(1, 16, 16)), before + 1)


# --- other shapes --------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[AsymmetricCroCo3DStereo], nn.Module]:
    def change(network: AsymmetricCroCo3DStereo) -> nn.Module:
        owner, _, last = name.rpartition(".")
        delattr(network.get_submodule(owner), last)
        return network

    return change


def with_tensor(name: str, *shape: int) -> Callable[[AsymmetricCroCo3DStereo], nn.Module]:
    def change(network: AsymmetricCroCo3DStereo) -> nn.Module:
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, nn.Parameter(torch.zeros(*shape)))
        return network

    return change


def without_rope(network: AsymmetricCroCo3DStereo) -> nn.Module:
    for module in network.modules():
        if hasattr(module, "rope"):
            module.rope = None
    return network


def with_another_head(network: AsymmetricCroCo3DStereo) -> nn.Module:
    network.downstream_head1 = network.downstream_head2 = nn.Sequential(nn.Linear(48, 256))
    return network


def with_limited_depth(network: AsymmetricCroCo3DStereo) -> nn.Module:
    network.depth_mode = ("linear", -1, 1)
    return network


OTHERS = {
    "another kind of network": (lambda _: nn.Sequential(nn.Linear(3, 4)), "Sequential"),
    "no tensors": (lambda _: nn.ReLU(), "none"),
    "an encoder alone": (lambda network: network.patch_embed, "PatchEmbed"),
    "no decoder": (without("dec_blocks"), "dec_blocks.0.cross_attn.projq.weight"),
    "no encoder": (without("enc_blocks"), "enc_blocks.0.attn.qkv.weight"),
    "no head": (without("downstream_head2"), "downstream_head2.proj.bias"),
    "no normalisation": (without("dec_norm"), "dec_norm.weight"),
    "no head counts": (without("enc_blocks.0.attn.num_heads"), "num_heads"),
    "no rotary positions": (without_rope, "rope"),
    "another head": (with_another_head, "downstream_head1.proj.weight"),
    "other widths": (with_tensor("dec_blocks.1.mlp.fc1.weight", 48, 48), "(48, 48) instead of (192, 48)"),
    "patches that are no squares": (with_tensor("patch_embed.proj.weight", 32, 3, 4, 8), "(32, 3, 4, 8)"),
    "other value ranges": (with_limited_depth, "depth_mode"),
}


@pytest.mark.parametrize(("change", "named"), OTHERS.values(), ids=OTHERS.keys())
def test_an_object_of_another_shape_is_one_clear_input_error(standin, change, named: str, fails_with) -> None:
    network = change(standin)
    with fails_with(InputError, type(network).__name__, named):
        Easi3R(network)


def test_rope_without_a_stated_base_counts_as_the_public_one(standin) -> None:
    del standin.rope.base
    assert isinstance(standin.rope, Rope) and adopt_network(standin)[0].config.rope_base == 100.0

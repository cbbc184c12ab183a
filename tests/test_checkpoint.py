"""Checkpoints as people have them: training files, folders, other models' files, broken ones, and ones that attack."""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from easi3r import Easi3R
from easi3r.backbones.checkpoint import UNKNOWN_LICENCE, licence_of, load_checkpoint
from easi3r.backbones.configuration import LIMITS, parse_config, parse_constructor
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.errors import CheckpointError, MissingExtraError

SIZES = {
    "enc_embed_dim": 32,
    "enc_depth": 2,
    "enc_num_heads": 2,
    "dec_embed_dim": 48,
    "dec_depth": 4,
    "dec_num_heads": 3,
    "patch_size": 8,
}
INFINITY = float("inf")
ARGUMENTS = {
    "pos_embed": "RoPE100",
    "img_size": (64, 48),
    "head_type": "linear",
    "output_mode": "pts3d",
    "depth_mode": ("exp", -INFINITY, INFINITY),
    "conf_mode": ("exp", 1, INFINITY),
    **SIZES,
}


def constructor(name: str = "AsymmetricCroCo3DStereo", **changes: Any) -> str:
    arguments = {**ARGUMENTS, **changes}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def write_pth(path: Path, tensors: dict[str, Tensor], text: str | None = None, **extras: Any) -> Path:
    namespace = argparse.Namespace(model=constructor() if text is None else text, lr=1e-4, output_dir="x")
    torch.save({"args": namespace, "model": tensors, **extras}, path)
    return path


def write_folder(folder: Path, tensors: dict[str, Tensor], config: str | dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def network(make_network) -> Dust3r:
    return make_network(img_size=(64, 48))


@pytest.fixture
def tensors(network: Dust3r) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same_network(ours: Dust3r, theirs: Dust3r) -> None:
    assert ours.config == theirs.config
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert {p.device.type for p in ours.parameters()} == {"cpu"}


# --- what loads ----------------------------------------------------------------------------------------------------


def test_a_file_gives_its_network_and_says_where_it_came_from(tmp_path, network, tensors) -> None:
    path = write_pth(tmp_path / "a.pth", tensors)
    loaded, info = load_checkpoint(path)
    assert_same_network(loaded, network)
    assert (info.name, info.path, info.licence) == (str(path), path, UNKNOWN_LICENCE)
    assert info.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def training_extras() -> dict[str, Any]:
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    scores = {"best_so_far": np.float64(0.25), "loss": np.float32(0.5), "iterations": np.int64(7)}
    return {"optimizer": optimizer, "scaler": {"scale": 2.0}, "epoch": 12, **scores}


@pytest.mark.parametrize("numpy_module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_training_files_with_optimizer_and_numpy_scores_load(tmp_path, network, tensors, numpy_module: str) -> None:
    path = write_pth(tmp_path / "new.pth", tensors, **training_extras())
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                assert b"multiarray" in content
                content = content.replace(np.float64(0).__reduce__()[0].__module__.encode(), numpy_module.encode())
                assert f"c{numpy_module}\n".encode() in content
            old.writestr(name, content)
    assert_same_network(load_checkpoint(tmp_path / "old.pth")[0], network)


def test_files_of_torchs_old_format_load(tmp_path, network, tensors) -> None:
    content = {"args": argparse.Namespace(model=constructor()), "model": tensors}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_network(load_checkpoint(tmp_path / "old.pth")[0], network)


INFINITIES = {"words": ("-inf", "inf"), "JSON's own": (-INFINITY, INFINITY)}


@pytest.mark.parametrize(("low", "high"), INFINITIES.values(), ids=INFINITIES.keys())
def test_a_folder_gives_the_same_network_as_a_file(tmp_path, network, tensors, low: Any, high: Any) -> None:
    config = {**ARGUMENTS, "depth_mode": ["exp", low, high], "conf_mode": ["exp", 1, high]}
    folder = write_folder(tmp_path / "hf", tensors, config)
    assert ("Infinity" in (folder / "config.json").read_text()) == (high == INFINITY)
    loaded, info = load_checkpoint(str(folder))
    assert_same_network(loaded, network)
    assert info.path == folder / "model.safetensors"
    assert info.sha256() == hashlib.sha256(info.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["pth", "folder"])
def test_weights_of_any_precision_become_float32(tmp_path, network, tensors, layout: str, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if layout == "pth":
        loaded, _ = load_checkpoint(write_pth(tmp_path / "a.pth", stored))
    else:
        loaded, _ = load_checkpoint(write_folder(tmp_path / "hf", stored, ARGUMENTS))
    assert_same_network(loaded, network.to(dtype).float())


def test_a_file_without_decoder_two_gets_a_copy_of_decoder_one(tmp_path, network, tensors) -> None:
    single = {name: tensor for name, tensor in tensors.items() if not name.startswith("dec_blocks2.")}
    loaded, _ = load_checkpoint(write_pth(tmp_path / "a.pth", single))
    network.dec_blocks2.load_state_dict(network.dec_blocks.state_dict())
    assert_same_network(loaded, network)


def test_a_missing_part_of_decoder_two_is_not_replaced(tmp_path, tensors, fails_with) -> None:
    del tensors["dec_blocks2.1.norm1.weight"]
    with fails_with(CheckpointError, "missing: dec_blocks2.1.norm1.weight)"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors))


def test_mast3r_files_load_without_their_local_features(tmp_path, make_network) -> None:
    network = make_network(head_type="dpt", img_size=(64, 48))
    local = {
        f"downstream_head{side}.head_local_features.fc{layer}.{kind}": torch.zeros(4)
        for side in (1, 2)
        for layer in (1, 2)
        for kind in ("weight", "bias")
    }
    changes = {"head_type": "catmlp+dpt", "output_mode": "pts3d+desc24", "patch_embed_cls": "PatchEmbedDust3R"}
    changes |= {"two_confs": True, "desc_conf_mode": ("exp", 0, INFINITY), "landscape_only": False}
    text = constructor("AsymmetricMASt3R", **changes)
    assert_same_network(
        load_checkpoint(write_pth(tmp_path / "a.pth", {**network.state_dict(), **local}, text))[0], network
    )


@pytest.mark.parametrize("names", ["both", "aliases"])
def test_convolutions_under_their_second_name_are_found(tmp_path, make_network, names: str) -> None:
    network = make_network(head_type="dpt", img_size=(64, 48))
    tensors = dict(network.state_dict())
    for name in list(tensors):
        head, found, layer = name.partition(".scratch.layer")
        if found:
            tensors[f"{head}.scratch.layer_rn.{int(layer[0]) - 1}.weight"] = tensors[name].clone()
            if names == "aliases":
                del tensors[name]
    assert sum("layer_rn" in name for name in tensors) == 8
    path = write_pth(tmp_path / "a.pth", tensors, constructor(head_type="dpt"))
    assert_same_network(load_checkpoint(path)[0], network)


def test_tensors_that_are_never_read_may_be_there(tmp_path, network, tensors) -> None:
    unread = {"mask_token": torch.zeros(1, 1, 48), "prediction_head.weight": torch.zeros(3)}
    assert_same_network(load_checkpoint(write_pth(tmp_path / "a.pth", {**tensors, **unread}))[0], network)


def test_loaded_weights_outlive_their_file(tmp_path, tensors) -> None:
    path = write_pth(tmp_path / "a.pth", tensors)
    loaded, _ = load_checkpoint(path)
    path.unlink()
    assert torch.equal(loaded.decoder_embed.weight, tensors["decoder_embed.weight"])


# --- names, hub, licences ------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_and_loaded(tmp_path, network, tensors, monkeypatch) -> None:
    folder = write_folder(tmp_path / "snapshot", tensors, ARGUMENTS)
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, sorted(options["allow_patterns"])))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded, info = load_checkpoint("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")
    assert_same_network(loaded, network)
    assert asked == [("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt", ["config.json", "model.safetensors"])]
    assert info.name == asked[0][0] and "non-commercial" in info.licence


def test_a_hub_id_without_a_network_is_one_sentence(monkeypatch, fails_with) -> None:
    def fetch(name: str, **options: Any) -> str:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection. See the docs.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with fails_with(CheckpointError, "'somebody/weights'", "couldn't connect"):
        load_checkpoint("somebody/weights")


@pytest.mark.parametrize("name", ["missing.pth", "no such thing", "folder/missing.pth", "a/b/c", "/nowhere/x"])
def test_a_name_that_is_nothing_asks_no_hub(name: str, monkeypatch, fails_with) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with fails_with(CheckpointError, repr(name), "hub id"):
        load_checkpoint(name)


def test_a_missing_file_of_an_existing_folder_asks_no_hub(tmp_path, monkeypatch, fails_with) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with fails_with(CheckpointError, "'weights/mine'"):
        load_checkpoint("weights/mine")


def test_an_absent_package_names_the_extra_that_brings_it(monkeypatch, fails_with) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, module, None)
    with fails_with(MissingExtraError, "huggingface_hub", "easi3r[hub]"):
        load_checkpoint("somebody/weights")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt", "Naver"),
        ("naver/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric", "training data"),
        ("Junyi42/MonST3R_PO-TA-S-W_ViTLarge_BaseDecoder_512_dpt", "its authors"),
        ("/home/me/dust3r/checkpoints/MonST3R_PO-TA-S-W_ViTLarge_BaseDecoder_512_dpt.pth", "its authors"),
    ],
)
def test_public_names_show_their_licence(name: str, expected: str) -> None:
    assert expected in licence_of(name) and "non-commercial" in licence_of(name)


def test_a_licence_in_the_configuration_counts_and_others_are_unknown(tmp_path, tensors) -> None:
    folder = write_folder(tmp_path / "dust3r", tensors, {**ARGUMENTS, "license": "CC0"})
    assert load_checkpoint(folder)[1].licence == "CC0"
    assert licence_of("mine.pth") == UNKNOWN_LICENCE


# --- other models' files -------------------------------------------------------------------------------------------


def save(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


VGGT = {f"aggregator.patch_embed.blocks.{i}.attn.qkv.weight": torch.zeros(2, 2) for i in range(5)}
OTHERS = {
    "a bare state dict": (save(VGGT), "aggregator.patch_embed.blocks.0.attn.qkv.weight"),
    "no args": (save({"model": {"weight": torch.ones(2)}}), "model"),
    "a training file": (save({"state_dict": VGGT, "epoch": 3}), "state_dict"),
    "a tensor": (save(torch.ones(3)), "Tensor"),
    "a list": (save([1, 2]), "list"),
    "model is a tensor": (save({"args": argparse.Namespace(model=constructor()), "model": torch.ones(2)}), "'model'"),
}


@pytest.mark.parametrize(("write", "named"), OTHERS.values(), ids=OTHERS.keys())
def test_files_of_other_shapes_say_what_they_hold(tmp_path, write, named: str, fails_with) -> None:
    write(tmp_path / "other.pth")
    with fails_with(CheckpointError, "other.pth", named, "DUSt3R"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "text", ["VGGT(img_size=518, patch_size=14)", "CroCoNet(enc_depth=2)", "not a call", "3", "", "f(a)(b=1)", "("]
)
def test_other_constructors_are_named(tmp_path, tensors, text: str, fails_with) -> None:
    with fails_with(CheckpointError, repr(text), "AsymmetricCroCo3DStereo"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors, text))


@pytest.mark.parametrize("layout", ["pth", "folder"])
def test_weights_of_another_model_under_our_constructor_are_named(tmp_path, layout: str, fails_with) -> None:
    path = write_pth(tmp_path / "a.pth", VGGT) if layout == "pth" else write_folder(tmp_path / "a", VGGT, ARGUMENTS)
    with fails_with(CheckpointError, "another model's", "aggregator.patch_embed.blocks.0", "and 2 more", "MonST3R"):
        load_checkpoint(path)


def test_an_empty_state_dict_is_named(tmp_path, fails_with) -> None:
    with fails_with(CheckpointError, "none", "missing"):
        load_checkpoint(write_pth(tmp_path / "a.pth", {}))


def test_missing_and_unexpected_tensors_are_named(tmp_path, tensors, fails_with) -> None:
    del tensors["enc_norm.weight"], tensors["dec_blocks.3.norm_y.bias"]
    tensors |= {"dec_blocks.9.norm1.weight": torch.ones(48), "surprise": torch.ones(1)}
    missing, unexpected = "dec_blocks.3.norm_y.bias, enc_norm.weight", "dec_blocks.9.norm1.weight, surprise"
    with fails_with(CheckpointError, f"missing: {missing};", f"unexpected: {unexpected})"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors))


def test_tensors_of_wrong_shapes_are_named_with_both_shapes(tmp_path, tensors, fails_with) -> None:
    tensors["decoder_embed.weight"] = torch.ones(48, 31)
    with fails_with(CheckpointError, "decoder_embed.weight (48, 31) instead of (48, 32)"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors))


def test_values_that_are_no_tensors_count_as_missing(tmp_path, tensors, fails_with) -> None:
    tensors["enc_norm.weight"] = "not a tensor"
    with fails_with(CheckpointError, "missing: enc_norm.weight"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors))


# --- broken files --------------------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": b"<!doctype html><html>404</html>",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "a zip of something else": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content: bytes, fails_with) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with fails_with(CheckpointError, "a.pth cannot be read", "download"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, tensors, share: float, new_format: bool, fails_with) -> None:
    content = {"args": argparse.Namespace(model=constructor()), "model": tensors}
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with fails_with(CheckpointError, "a.pth cannot be read", "download"):
        load_checkpoint(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_files_load_or_are_refused_and_raise_nothing_else(tmp_path, new_format: bool) -> None:
    path = tmp_path / "a.pth"
    content = {"args": argparse.Namespace(model=constructor()), "model": {"enc_norm.weight": torch.ones(3)}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_folder_with_a_broken_configuration_is_refused(
    tmp_path, tensors, config: str, named: str, fails_with
) -> None:
    folder = write_folder(tmp_path / "hf", tensors, "{}")
    (folder / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    with fails_with(CheckpointError, "config.json", named):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"garbage garbage", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}"])
def test_a_folder_with_broken_safetensors_is_refused(tmp_path, tensors, content: bytes, fails_with) -> None:
    folder = write_folder(tmp_path / "hf", tensors, ARGUMENTS)
    (folder / "model.safetensors").write_bytes(content)
    with fails_with(CheckpointError, "model.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_names_it(tmp_path, tensors, name: str, fails_with) -> None:
    folder = write_folder(tmp_path / "hf", tensors, ARGUMENTS)
    (folder / name).unlink()
    with fails_with(CheckpointError, f"no {name}"):
        load_checkpoint(folder)


# --- files that attack ---------------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class CallsGetattr:
    """Reaches through an allowed class for one of its attributes."""

    def __reduce__(self) -> Any:
        return getattr, (argparse.Namespace, "mro")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", ["beside", "args", "model"])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, tensors, place: str, new_format: bool, fails_with) -> None:
    marker = tmp_path / "ran"
    attack = RunsCode(marker)
    content = {"args": argparse.Namespace(model=constructor()), "model": tensors, "beside": attack}
    if place != "beside":
        del content["beside"]
        content[place] = attack
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    with fails_with(CheckpointError, "was not loaded", "could run code", "mkdir"):
        load_checkpoint(tmp_path / "a.pth")
    assert not marker.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    "thing", [CallsGetattr(), Path("x"), torch.nn.Linear(2, 2), print], ids=lambda t: type(t).__name__
)
def test_anything_but_tensors_and_plain_values_is_refused(tmp_path, tensors, thing: Any, fails_with) -> None:
    with fails_with(CheckpointError, "was not loaded", "could run code"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors, thing=thing))


EVALUATED = [
    "AsymmetricCroCo3DStereo(enc_depth=open('{marker}', 'w'))",
    "AsymmetricCroCo3DStereo(open('{marker}', 'w'))",
    "AsymmetricCroCo3DStereo(*[open('{marker}', 'w')])",
    "AsymmetricCroCo3DStereo(**open('{marker}', 'w'))",
    "AsymmetricCroCo3DStereo(enc_depth=(1, [open('{marker}', 'w')]))",
    "AsymmetricCroCo3DStereo(enc_depth=-open('{marker}', 'w'))",
    "AsymmetricCroCo3DStereo(enc_depth=[open('{marker}', 'w') for _ in '1'])",
    "AsymmetricCroCo3DStereo(enc_depth=open('{marker}', 'w').close)",
    "AsymmetricCroCo3DStereo(enc_depth=(lambda: 1)())",
    "AsymmetricCroCo3DStereo(enc_depth=().__class__)",
    "AsymmetricCroCo3DStereo(enc_depth=f'{{open}}')",
    "AsymmetricCroCo3DStereo(enc_depth=2 ** 99)",
    "AsymmetricCroCo3DStereo(enc_depth=True if open else 1)",
    "AsymmetricCroCo3DStereo(enc_depth=os)",
    "AsymmetricCroCo3DStereo(enc_depth={{1: 2}})",
    "AsymmetricCroCo3DStereo(enc_depth=-'a')",
    "AsymmetricCroCo3DStereo.from_pretrained(enc_depth=1)",
    "(open('{marker}', 'w'), AsymmetricCroCo3DStereo)[1](enc_depth=1)",
    "AsymmetricCroCo3DStereo(enc_depth=1); open('{marker}', 'w')",
    "AsymmetricCroCo3DStereo(enc_depth=1)\nopen('{marker}', 'w')",
    "AsymmetricCroCo3DStereo(enc_depth=(x := 3))",
    *(
        "AsymmetricCroCo3DStereo(enc_depth=" + sign * count + "1)"
        for sign, count in (("-", 2000), ("-", 20_000), ("1+", 600))
    ),
    "AsymmetricCroCo3DStereo(enc_depth=" + "(" * 5000 + "1" + ",)" * 5000 + ")",
    "AsymmetricCroCo3DStereo(enc_depth=\0)",
]


@pytest.mark.parametrize("text", EVALUATED, ids=[text[:60] for text in EVALUATED])
def test_constructor_text_is_never_evaluated(tmp_path, tensors, text: str, monkeypatch, fails_with) -> None:
    marker = tmp_path / "ran"
    path = write_pth(tmp_path / "a.pth", tensors, text.format(marker=marker))
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, lambda *_, name=name: pytest.fail(f"called {name}"))
    with fails_with(CheckpointError):
        load_checkpoint(path)
    assert not marker.exists()


def test_constructor_text_gives_plain_values() -> None:
    text = " AsymmetricCroCo3DStereo(a=1, b=('exp', -inf, inf), c='x', d=[1.5, -2], e=None, f=True,\n g=()) "
    expected = {"a": 1, "b": ("exp", -INFINITY, INFINITY), "c": "x", "d": (1.5, -2), "e": None, "f": True, "g": ()}
    assert parse_constructor(text) == expected


# --- configurations ------------------------------------------------------------------------------------------------


def test_a_configuration_is_read_in_full() -> None:
    changes = {"conf_mode": ["exp", "0.5", "Infinity"], "pos_embed": "RoPE57.5", "img_size": 224}
    config = parse_config({**ARGUMENTS, **changes, "freeze": "encoder", "landscape_only": True}, "x")
    expected = {"img_size": (224, 224), "conf_range": (0.5, INFINITY), "rope_base": 57.5, "head_type": "linear"}
    assert config == Dust3rConfig(**SIZES, **expected)


def test_the_large_public_configuration_is_the_default() -> None:
    assert parse_config({"head_type": "dpt"}, "x") == Dust3rConfig()


SUPPORTED = [
    {"patch_embed_cls": "ManyAR_PatchEmbed"},
    {"patch_embed_cls": "PatchEmbedDust3R"},
    {"output_mode": "pts3d+desc24", "head_type": "catmlp+dpt"},
    {"img_size": [512, 512]},
    {"depth_mode": ["exp", "-inf", "inf"]},
]


@pytest.mark.parametrize("change", SUPPORTED, ids=str)
def test_public_variants_are_supported(change: dict[str, Any]) -> None:
    assert parse_config({**ARGUMENTS, **change}, "x").enc_depth == 2


ABSURD = [
    *(
        {key: value}
        for key in LIMITS
        for value in (0, -1, LIMITS[key] + 1, 10**30, "12", 2.0, True, None, [2], INFINITY)
    ),
    *({"img_size": value} for value in (0, -5, (64, -64), "64", "12", ("64", "64"), (64,), (1, 2, 3), None, 10**9)),
    *({"img_size": value} for value in (INFINITY, (INFINITY, 64), 64.5, True, {})),
    *(
        {"pos_embed": value}
        for value in ("cosine", "RoPE", "RoPE0", "RoPE0.5", "RoPE-100", "RoPE1e2", "RoPE1.2.3", 100)
    ),
    {"pos_embed": "RoPE" + "9" * 400},
    *({"head_type": value} for value in ("", "gs", "linear+dpt", "lineardpt", None, 3)),
    *({"output_mode": value} for value in ("pts3d_desc", "depth", None)),
    {"patch_embed_cls": "PatchEmbed"},
    *({"depth_mode": value} for value in (("linear", -INFINITY, INFINITY), ("exp", 0, 5), ("exp",), None, "exp", 3)),
    *({"conf_mode": value} for value in (("exp", 5, 1), ("exp", "a", "b"), ("sigmoid", 0, 1), None, ("exp", None, 1))),
    *({"conf_mode": value} for value in (("exp", "nan", 3), ("exp", -INFINITY, 1), ("exp", 10**400, 10**500))),
    {"enc_embed_dim": 30},
    {"dec_num_heads": 5},
    {"enc_num_heads": 16},
    {"head_type": "dpt", "dec_depth": 1},
]


def abbreviated(change: dict[str, Any]) -> str:
    return str(change)[:50]


@pytest.mark.parametrize("change", ABSURD, ids=abbreviated)
def test_absurd_configurations_are_refused_by_name(change: dict[str, Any], fails_with) -> None:
    side = next(iter(change)).partition("_")[0]
    with fails_with(CheckpointError, "the file x", f"{list(change)[-1]}=" if side == "head" else f"{side}_", "expect"):
        parse_config({**ARGUMENTS, **change}, "the file x")


def test_a_configuration_of_another_size_than_the_weights_names_tensors(tmp_path, tensors, fails_with) -> None:
    with fails_with(CheckpointError, "dec_blocks.3.", "unexpected"):
        load_checkpoint(write_pth(tmp_path / "a.pth", tensors, constructor(dec_depth=3)))
    with fails_with(CheckpointError, "dec_blocks.4.", "missing"):
        load_checkpoint(write_pth(tmp_path / "b.pth", tensors, constructor(dec_depth=5)))
    with fails_with(CheckpointError, "(32,) instead of (64,)"):
        load_checkpoint(write_pth(tmp_path / "c.pth", tensors, constructor(enc_embed_dim=64)))


def test_the_public_interface_raises_the_same_errors(tmp_path, fails_with) -> None:
    with fails_with(CheckpointError, "missing.pth"):
        Easi3R.from_pretrained(tmp_path / "missing.pth", device="cpu")

"""Networks that somebody else built: our own code takes over their tensors, without copying or changing them.

Why not call the object itself?  Its attention writes every N x N matrix out and it encodes each frame once per pair;
the same tensors in our network give the same numbers at a fraction of the cost.  (The hooks attach to such objects
as well: ``with capture_attention(network): network(view1, view2)``.)
"""

from __future__ import annotations

import dataclasses
import math
import re

from torch import Tensor, nn

from easi3r.backbones.checkpoint import UNKNOWN_LICENCE, build_network
from easi3r.backbones.configuration import parse_config
from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.files import CheckpointInfo, some_of
from easi3r.backbones.interface import Backbone
from easi3r.backbones.vggt_checkpoint import LICENCE as VGGT_LICENCE
from easi3r.backbones.vggt_checkpoint import build_vggt, is_vggt
from easi3r.errors import CheckpointError, InputError

NEEDED = (
    "patch_embed.proj.weight",
    "enc_blocks.0.attn.qkv.weight",
    "decoder_embed.weight",
    "dec_blocks.0.cross_attn.projq.weight",
)
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # DataParallel, torch.compile


def adopt_network(network: nn.Module) -> tuple[Backbone, CheckpointInfo]:
    """Build a Backbone on the tensors of a DUSt3R- or VGGT-shaped ``network`` (public names), which stays as it is.

    Sizes are read from names and shapes; DUSt3R's head counts, value ranges and rotary base from the modules.
    Raises InputError for an object of another shape.
    """
    name = f"the given {type(network).__name__}"
    info = CheckpointInfo(name, None, UNKNOWN_LICENCE)
    if isinstance(network, Backbone):
        return network, info
    tensors = {WRAPPERS.sub("", key): value for key, value in network.state_dict().items()}
    try:
        if is_vggt(tensors):
            return build_vggt(tensors, name), dataclasses.replace(info, licence=VGGT_LICENCE)
        return _on_tensors_of(network, tensors, name), info
    except CheckpointError as error:
        raise InputError(str(error)) from error


def _on_tensors_of(network: nn.Module, tensors: dict[str, Tensor], name: str) -> Dust3r:
    modules = {WRAPPERS.sub("", f"{key}."): value for key, value in network.named_modules()}
    lacking = [key for key in NEEDED if key not in tensors]
    if lacking:
        raise InputError(
            f"The tensors of {name} are {some_of(sorted(tensors)) or 'none'}, without {some_of(lacking)}; expected a "
            "DUSt3R-shaped network."
        )
    heads = {side: getattr(modules.get(f"{side}_blocks.0.attn."), "num_heads", None) for side in ("enc", "dec")}
    if None in heads.values():
        raise InputError(f"The attention of {name} does not say its num_heads; expected them at every blocks.0.attn.")
    trunk = next(module for module in network.modules() if hasattr(module, "dec_blocks"))
    ropes = (getattr(module, "rope", None) for module in (trunk, modules["dec_blocks.0.cross_attn."]))
    rope = next((rope for rope in ropes if rope is not None), None)
    if rope is None:
        raise InputError(f"The attention of {name} has no rope; expected rotary positions, as in DUSt3R.")
    patch = tensors["patch_embed.proj.weight"]
    arguments = {
        "enc_embed_dim": patch.shape[0],
        "enc_depth": _count_blocks(tensors, "enc_blocks"),
        "enc_num_heads": heads["enc"],
        "dec_embed_dim": tensors["decoder_embed.weight"].shape[0],
        "dec_depth": _count_blocks(tensors, "dec_blocks"),
        "dec_num_heads": heads["dec"],
        "patch_size": patch.shape[-1],
        "img_size": getattr(modules["patch_embed."], "img_size", 512),
        "head_type": "dpt" if "downstream_head1.dpt.head.0.weight" in tensors else "linear",
        "pos_embed": f"RoPE{float(getattr(rope, 'base', 100.0))}",
        "depth_mode": getattr(trunk, "depth_mode", ("exp", -math.inf, math.inf)),
        "conf_mode": getattr(trunk, "conf_mode", ("exp", 1.0, math.inf)),
    }
    return build_network(parse_config(arguments, name), tensors, name, extras_allowed=True)


def _count_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{prefix}.")})

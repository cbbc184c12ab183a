"""Networks that somebody else built: our own code takes over their tensors, without copying or changing them.

Why not call the object itself?  Its attention writes every N x N matrix out and it encodes each frame once per pair;
the same tensors in our network give the same numbers at a fraction of the cost.  (The hooks attach to such objects
as well: ``with capture_attention(network): network(view1, view2)``.)
"""

from __future__ import annotations

import math
import re

from torch import nn

from easi3r.backbones.checkpoint import UNKNOWN_LICENCE, CheckpointInfo, build_network, parse_config, some_of
from easi3r.backbones.dust3r import Dust3r
from easi3r.errors import InputError

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # DataParallel, torch.compile


def adopt_network(network: nn.Module) -> tuple[Dust3r, CheckpointInfo]:
    """Build a Dust3r on the tensors of a DUSt3R-shaped ``network`` (public names), which stays as it is.

    Sizes are read from names and shapes; head counts, value ranges and the rotary base from the modules.
    Raises InputError for an object of another shape, CheckpointError for tensors that are missing.
    """
    name = f"the given {type(network).__name__}"
    info = CheckpointInfo(name, None, UNKNOWN_LICENCE)
    if isinstance(network, Dust3r):
        return network, info
    tensors = {WRAPPERS.sub("", key): value for key, value in network.state_dict().items()}
    modules = {WRAPPERS.sub("", f"{key}."): value for key, value in network.named_modules()}
    if not {"patch_embed.proj.weight", "decoder_embed.weight"} <= tensors.keys():
        raise InputError(
            f"The tensors of {name} are {some_of(sorted(tensors)) or 'none'}; expected a DUSt3R-shaped network with "
            "patch_embed, enc_blocks, decoder_embed, dec_blocks, dec_blocks2, downstream_head1 and downstream_head2."
        )
    heads = {side: getattr(modules.get(f"{side}_blocks.0.attn."), "num_heads", None) for side in ("enc", "dec")}
    if None in heads.values():
        raise InputError(f"The attention of {name} does not say its num_heads; expected it at enc_blocks.0.attn.")
    trunk = next(module for module in network.modules() if hasattr(module, "dec_blocks"))
    patch = tensors["patch_embed.proj.weight"]
    size = getattr(modules.get("patch_embed."), "img_size", 512)
    arguments = {
        "enc_embed_dim": patch.shape[0],
        "enc_depth": _count_blocks(tensors, "enc_blocks"),
        "enc_num_heads": heads["enc"],
        "dec_embed_dim": tensors["decoder_embed.weight"].shape[0],
        "dec_depth": _count_blocks(tensors, "dec_blocks"),
        "dec_num_heads": heads["dec"],
        "patch_size": patch.shape[-1],
        "img_size": size,
        "head_type": "dpt" if "downstream_head1.dpt.head.0.weight" in tensors else "linear",
        "pos_embed": f"RoPE{float(getattr(getattr(trunk, 'rope', None), 'base', 100.0))}",
        "depth_mode": getattr(trunk, "depth_mode", ("exp", -math.inf, math.inf)),
        "conf_mode": getattr(trunk, "conf_mode", ("exp", 1.0, math.inf)),
    }
    return build_network(parse_config(arguments, name), tensors, name, extras_allowed=True), info


def _count_blocks(tensors: dict[str, object], prefix: str) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{prefix}.")})

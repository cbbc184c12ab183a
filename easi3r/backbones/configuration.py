"""What a checkpoint says about its network: the constructor's arguments, parsed and checked, never run."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, cast

from easi3r.backbones.dust3r import Dust3rConfig
from easi3r.errors import CheckpointError

MODEL_CLASSES = ("AsymmetricCroCo3DStereo", "AsymmetricMASt3R")

LIMITS = {  # far above any network of this family: keeps absurd configurations from being built
    "enc_embed_dim": 1 << 14,
    "enc_depth": 1 << 8,
    "enc_num_heads": 1 << 8,
    "dec_embed_dim": 1 << 14,
    "dec_depth": 1 << 8,
    "dec_num_heads": 1 << 8,
    "patch_size": 1 << 8,
}
MAX_IMAGE_SIZE = 1 << 16
MAX_TEXT = 10_000  # characters of a constructor

WORDS = {  # argument: what of it counts, how a message describes it, and its value where the file has none
    "pos_embed": (r"RoPE(0*[1-9]\d{0,8}(?:\.\d+)?)", "RoPE with its base, as in RoPE100,", "RoPE100"),
    "head_type": (r"(?:catmlp\+)?(linear|dpt)", "linear or dpt", ""),
    "output_mode": (r"(pts3d)(?:\+\w+)?", "pts3d", "pts3d"),
    "patch_embed_cls": (
        r"(PatchEmbedDust3R|ManyAR_PatchEmbed)",
        "PatchEmbedDust3R or ManyAR_PatchEmbed",
        "PatchEmbedDust3R",
    ),
}


def parse_constructor(text: str) -> dict[str, Any]:
    """Keyword arguments of ``Class(a=1, b=('exp', -inf, inf))`` as plain values; nothing is evaluated.

    >>> parse_constructor("AsymmetricMASt3R(depth_mode=('exp', -inf, inf), enc_depth=24)")["enc_depth"]
    24
    """
    given = f"The checkpoint calls its model {' '.join(text.split())[:80]!r}"
    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} characters")
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in MODEL_CLASSES:
            raise CheckpointError(f"{given}, which is another model; expected {' or '.join(MODEL_CLASSES)}.")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise CheckpointError(f"{given}; expected 'name=value' arguments alone.")
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{given}; expected a constructor such as {MODEL_CLASSES[0]}(enc_depth=24).") from error


def parse_config(arguments: Mapping[str, Any], what: str) -> Dust3rConfig:
    """Turn constructor arguments (or config.json) into a Dust3rConfig; CheckpointError says what is unsupported.

    what: whose arguments they are, for the message: 'the checkpoint x.pth'.
    """
    try:
        size = arguments.get("img_size", 512)
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"img_size={_shown(size)}, where height and width were expected")
        height, width = (_whole_number("img_size", side, MAX_IMAGE_SIZE) for side in sides)
        words = {key: _word(arguments, key, *rule) for key, rule in WORDS.items()}
        if _exponential_range(arguments, "depth_mode", -math.inf) != (-math.inf, math.inf):
            raise ValueError(f"depth_mode={_shown(arguments['depth_mode'])}, where no limits were expected")
        config = Dust3rConfig(
            **{key: _whole_number(key, arguments[key], limit) for key, limit in LIMITS.items() if key in arguments},
            img_size=(height, width),
            head_type=cast(Literal["linear", "dpt"], words["head_type"]),
            rope_base=float(words["pos_embed"]),
            conf_range=_exponential_range(arguments, "conf_mode", 1.0),
        )
        _check_divisions(config)
    except ValueError as error:
        raise CheckpointError(f"The configuration of {what} says {error}.") from error
    return config


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _word(arguments: Mapping[str, Any], key: str, pattern: str, expected: str, default: str) -> str:
    match = re.fullmatch(pattern, str(arguments.get(key, default)))
    if match is None:
        raise ValueError(f"{key}={_shown(arguments.get(key, default))}, where {expected} was expected")
    return match[1]


def _whole_number(key: str, value: Any, limit: int) -> int:
    if type(value) is not int or not 0 < value <= limit:
        raise ValueError(f"{key}={_shown(value)}, where a whole number from 1 to {limit} was expected")
    return value


def _exponential_range(arguments: Mapping[str, Any], key: str, default_low: float) -> tuple[float, float]:
    mode = arguments.get(key, ("exp", default_low, math.inf))
    try:
        kind, low, high = mode
        limits = float(low), float(high)
    except (TypeError, ValueError, OverflowError):
        kind, limits = None, (math.nan, math.nan)
    if kind != "exp" or not limits[0] < limits[1] or (key == "conf_mode" and math.isinf(limits[0])):
        raise ValueError(f"{key}={_shown(mode)}, where ('exp', low, high) was expected")
    return limits


def _check_divisions(config: Dust3rConfig) -> None:
    for side in ("enc", "dec"):
        dim, heads = getattr(config, f"{side}_embed_dim"), getattr(config, f"{side}_num_heads")
        if dim % (4 * heads):  # rotary positions turn pairs of channels in both halves of a head
            raise ValueError(f"{side}_embed_dim={dim}, where a multiple of 4 * {side}_num_heads ({heads}) was expected")
    if config.head_type == "dpt" and config.dec_depth < 2:
        raise ValueError(f"dec_depth={config.dec_depth}, where the dpt head expects 2 layers or more")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Constant):
        return node.value
    raise CheckpointError(f"The model's constructor text holds {ast.unparse(node)[:60]!r}; expected plain values.")

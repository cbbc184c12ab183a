"""In which number format the network computes: matrices low where the hardware is fast at it, the rest in float32.

Residual streams, norms, softmax and all statistics stay in float32, and so does each head's last layer with the
exponentials behind it.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from easi3r.backbones.interface import Backbone
from easi3r.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
Network = TypeVar("Network", bound=Backbone)

SMALL = 128  # channels, below which a product is too small to gain


def choose_dtype(name: str, network: Backbone) -> torch.dtype:
    """'auto' is the format in which the network's device is fastest; raises InputError for one it cannot use."""
    device = network.device
    if name == "auto" and network.narrowest < SMALL:
        return torch.float32
    if name == "auto":
        if device.type == "cuda":
            major, _ = torch.cuda.get_device_capability(device)
            return torch.bfloat16 if major >= 8 else torch.float16 if major >= 7 else torch.float32
        return torch.bfloat16 if device.type == "cpu" and fast_bf16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise InputError("The dtype float16 was given for the CPU, which is slow at it; expected bfloat16 or float32.")
    return DTYPES[name]


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def in_precision(network: Network, dtype: torch.dtype) -> Network:
    """The network with its matrices in ``dtype`` and everything else in float32.

    Tensors that already are what they should be are shared, all others copied; ``network`` stays as it is (and is
    returned where there is nothing to change).
    """
    low = {
        name for name, part in network.named_modules() if isinstance(part, MATRICES) and not network.stays_float32(name)
    }
    state = {
        name: tensor.detach().to(dtype if name.rpartition(".")[0] in low else torch.float32)
        for name, tensor in network.state_dict().items()
    }
    if all(state[name].dtype == tensor.dtype for name, tensor in network.state_dict().items()):
        return network
    with torch.device("meta"):
        twin = type(network)(network.config)
    twin.load_state_dict(state, assign=True)
    return twin.requires_grad_(False).eval()


def computing(network: Backbone) -> torch.autocast:
    """A context in which the network's float32 activations meet its matrices in their format."""
    low = network.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(network.device.type, network.dtype if low else None, enabled=low)

"""The two hooks on VGGT's attention: patches are observed in global blocks, and dropped in the first of all blocks.

The special tokens of a frame (camera, registers) are what makes these more than ``hooks.observe_attention`` and
``hooks.drop_keys``: the method neither reads nor hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from easi3r.backbones.vggt import Vggt
from hooks import drop_keys, observe_attention

CUT_LAYERS = range(5)  # the blocks of the second pass that do not see dynamic patches (VGGT4D; the paper's 1 to 5)

# Called with the layer (from 0), and queries and keys [heads, S, P, D] of the patches, after norm and rotation.
PatchObserver = Callable[[int, Tensor, Tensor], None]


@contextmanager
def observe_patches(network: Vggt, num_frames: int, layers: frozenset[int], observer: PatchObserver) -> Iterator[None]:
    """Show ``observer`` the patches' queries and keys at some layers of the global attention while the block runs.

    The network's output is untouched and the hooks are removed on exit, exceptions included.  Raises HookError if a
    layer was not reached inside the block.
    """

    def observe(layer: int, q: Tensor, k: Tensor) -> None:
        q, k = (x[0].unflatten(1, (num_frames, -1))[:, :, network.num_special :] for x in (q, k))
        observer(layer, q, k)

    with observe_attention(network, observe, location="global", layers=layers):
        yield


@contextmanager
def drop_patches(network: Vggt, dynamic: Tensor, layers: range = CUT_LAYERS) -> Iterator[None]:
    """While the block runs, ``dynamic`` patches take no part in keys and values of the first blocks.

    dynamic: [S, P] bool, True = nobody attends to this patch, in frame and global attention alike; the softmax is over
    what remains.  Its own query and the special tokens are untouched (VGGT4D, arXiv 2511.19971).

    The hooks are removed on exit, exceptions included.  Raises HookError if a site was not reached inside the block.
    """
    kept = nn.functional.pad(~dynamic.to(network.device), (network.num_special, 0), value=True)
    with (
        drop_keys(network, kept, location="frame", layers=layers),
        drop_keys(network, kept.view(1, -1), location="global", layers=layers),
    ):
        yield

"""Masks refined by the video predictor of SAM 2 (Ravi et al. 2024; Apache-2.0), which is imported only when it is used.

Easi3R, section 3.1: the masks of even frames prompt the prediction of odd frames, and the reverse; what is predicted is
united with the mask that a frame has.  SAM 2 needs no torchvision for it, and configures itself by hydra, globally:
nothing else here may use hydra.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from easi3r.backbones.checkpoint import UNKNOWN_LICENCE
from easi3r.backbones.files import CheckpointInfo, some_of
from easi3r.config import Sam2Settings, Settings
from easi3r.errors import CheckpointError, MissingExtraError
from easi3r.progress import Progress
from easi3r.structures import Array

LICENCE = "Apache-2.0 (Meta)"
STRIDE = 16  # pixels of SAM 2's input per feature of its memory
SIZES = {12: "t", 16: "s", 24: "b+", 48: "l"}  # blocks of the image encoder -> piece of the configuration's name


@dataclass(frozen=True)
class Sam2Refiner:
    """A predictor that is ready, and how it is used."""

    predictor: Any  # sam2's SAM2VideoPredictor, on whichever device it is
    checkpoint: CheckpointInfo
    settings: Sam2Settings

    def __call__(self, images: Array, instances: Array, progress: Progress) -> Array:
        """Arguments and result as for ``refine_masks``."""
        return refine_masks(self.predictor, images, instances, self.settings, progress)


def refine_masks(predictor: Any, images: Array, instances: Array, settings: Sam2Settings, progress: Progress) -> Array:
    """Add to each object what SAM 2 makes of its masks in the neighbouring frames; nothing is taken away.

    images: [n, H, W, 3] uint8 RGB.  instances: [n, H, W] object ids, 0 = static, or bool, which is one object.  Returns
    the same shape and dtype: ids stay, and each pixel that was static gets the id of the object that SAM 2 is surest
    of there, if of any.  Every ``settings.chunk`` frames are a clip of their own, so that the length of the whole does
    not decide the memory.  SAM 2 is not called where no other frame holds an object.
    """
    refined = instances.copy()
    for frames in np.array_split(np.arange(len(images)), math.ceil(len(images) / settings.chunk)):
        part = slice(frames[0], frames[-1] + 1)
        if len(frames) > 1 and instances[part].any():
            refined[part] = _refine_chunk(predictor, images[part], instances[part], settings.offload, progress)
    return refined


def _refine_chunk(predictor: Any, images: Array, instances: Array, offload: bool, progress: Progress) -> Array:
    refined = instances.copy()
    with torch.autocast(predictor.device.type, torch.bfloat16):  # outside of which some of SAM 2 fails
        state = _open_clip(predictor, images, offload)
        for parity in (0, 1):
            predictor.reset_state(state)
            prompting = [i for i in range(parity, len(images), 2) if instances[i].any()]
            for i in progress(prompting, "SAM 2, prompts"):
                for number in np.unique(instances[i][instances[i] != 0]):
                    mask = torch.from_numpy(instances[i] == number)
                    predictor.add_new_mask(state, frame_idx=i, obj_id=int(number), mask=mask)
                predictor.propagate_in_video_preflight(state)  # now, while the features of this frame are there
            for i in progress(range(1 - parity, len(images), 2) if prompting else (), "SAM 2, masks"):
                with _no_bars():
                    ((_, numbers, logits),) = predictor.propagate_in_video(
                        state, start_frame_idx=i, max_frame_num_to_track=0
                    )
                refined[i] = _unite(instances[i], numbers, logits[:, 0].float().cpu().numpy())
    return refined


def _unite(own: Array, numbers: list[int], logits: Array) -> Array:
    """own: [H, W] ids, which stay.  logits: [k, H, W] of the objects ``numbers``, positive inside."""
    surest = np.array(numbers)[logits.argmax(axis=0)]
    return np.where((own == 0) & (logits.max(axis=0) > 0), surest, own).astype(own.dtype)


def _open_clip(predictor: Any, images: Array, offload: bool) -> Any:
    """The predictor's state of a clip, which it reads from a folder of NUMBER.jpg."""
    with tempfile.TemporaryDirectory(prefix="easi3r_sam2_") as folder, _no_bars():
        for i, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / f"{i}.jpg", quality=95, subsampling=0)
        return predictor.init_state(folder, offload_video_to_cpu=offload, offload_state_to_cpu=offload)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """SAM 2 shows a bar on stderr for every call, and has no switch for it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def load_refiner(settings: Settings, device: torch.device) -> Sam2Refiner | None:
    """SAM 2 as ``settings`` ask for it, ready on the device; None where they do not, or where masks are given.

    Raises MissingExtraError without sam2, CheckpointError for weights that are not there or another model's.
    """
    return load_sam2(settings.sam2, device) if check_sam2(settings) else None


@lru_cache(maxsize=1)
def load_sam2(given: Sam2Settings, device: torch.device) -> Sam2Refiner:
    """Once for all clips; errors as for ``load_refiner``."""
    path = _find_weights(given.checkpoint)
    tensors = _read_weights(path)
    config = given.config or config_of(tensors, path)
    predictor = build_predictor(config, given.image_size)
    if wrong := sorted({name for name, _ in _shapes(tensors) ^ _shapes(predictor.state_dict())}):
        raise CheckpointError(
            f"The SAM 2 weights {path} do not fit the configuration {config} (missing, unexpected or of another shape: "
            f"{some_of(wrong)}); leave sam2.config out, or name the one that they were trained with."
        )
    predictor.load_state_dict(tensors)
    licence = LICENCE if "sam2" in Path(given.checkpoint).name.lower() else UNKNOWN_LICENCE
    return Sam2Refiner(predictor.to(device), CheckpointInfo(given.checkpoint, path, licence), given)


def check_sam2(settings: Settings) -> bool:
    """Whether masks are to be refined by SAM 2 (given ones never are); MissingExtraError if they cannot be."""
    if settings.motion.refine != "sam2" or settings.motion.masks is not None:
        return False
    _build_function()
    return True


def build_predictor(config: str, image_size: int) -> Any:
    """SAM 2's video predictor with random weights, on the CPU.

    config: the name of one of sam2's configurations.  image_size: side in pixels of the square that it sees.
    """
    features = image_size // STRIDE
    overrides = [f"++model.image_size={image_size}"] + [
        f"++model.memory_attention.layer.{kind}_attention.feat_sizes=[{features},{features}]"
        for kind in ("self", "cross")
    ]
    build = _build_function()
    try:
        with torch.random.fork_rng(devices=[]):
            predictor = build(config, ckpt_path=None, device="cpu", hydra_overrides_extra=overrides)
    except Exception as error:  # of hydra, of omegaconf, of the modules that a configuration names
        raise CheckpointError(
            f"SAM 2 cannot be built by the configuration {config!r} ({_reason(error)}); expected the name of one that "
            "sam2 has, such as configs/sam2.1/sam2.1_hiera_l.yaml."
        ) from error
    predictor.fill_hole_area = 0  # a compiled extension would do it, which is not always there: the same everywhere
    return predictor.requires_grad_(False).eval()


def config_of(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name of the configuration of Meta's that these tensors were trained with; CheckpointError if of none."""
    blocks = {match[1] for name in tensors if (match := re.match(r"image_encoder\.trunk\.blocks\.(\d+)\.", name))}
    if len(blocks) not in SIZES or "maskmem_tpos_enc" not in tensors:
        raise CheckpointError(
            f"The weights {path} are another model's ({some_of(list(tensors)) or 'no tensors'}); expected a "
            "file of SAM 2 or 2.1, such as sam2.1_hiera_large.pt, or sam2.config."
        )
    version = "sam2.1" if "no_obj_embed_spatial" in tensors else "sam2"
    return f"configs/{version}/{version}_hiera_{SIZES[len(blocks)]}.yaml"


def _build_function() -> Any:
    try:
        return import_module("sam2.build_sam").build_sam2_video_predictor
    except Exception as error:  # absent; or run beside its checkout; or its packages do not go together
        raise MissingExtraError(
            f"Refinement by SAM 2 needs the package sam2, which cannot be imported here ({_reason(error)}); "
            "pip install 'easi3r[sam2]', or choose refine 'none'."
        ) from error


def _find_weights(checkpoint: str) -> Path:
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or path.suffix in (".pt", ".pth") or path.parent.is_dir():
        raise CheckpointError(
            f"There are no SAM 2 weights at {checkpoint!r}; expected a .pt file, or a hub id such as "
            "facebook/sam2.1-hiera-large."
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtraError(
            f"Fetching {checkpoint} needs the package huggingface_hub: pip install 'easi3r[hub]'."
        ) from error
    try:
        return Path(hf_hub_download(checkpoint, path.name.replace("-", "_") + ".pt"))
    except Exception as error:  # the hub's client raises errors of several libraries: network, authorisation, cache
        raise CheckpointError(
            f"There is no file {checkpoint!r}, and fetching it as a hub id failed ({_reason(error)}); give a .pt file "
            "of SAM 2 as sam2.checkpoint."
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(
            f"The SAM 2 weights {path} cannot be read ({type(error).__name__}); expected a .pt file of SAM 2, such as "
            "sam2.1_hiera_large.pt."
        ) from error
    tensors = content.get("model") if isinstance(content, dict) else None
    return {str(k): v for k, v in tensors.items() if isinstance(v, Tensor)} if isinstance(tensors, dict) else {}


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(value.shape)) for name, value in tensors.items()}


def _reason(error: Exception) -> str:
    """The first sentence of what it says, for use within one of ours."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:160]}"

"""``Easi3R``: a network, and what it makes of a clip."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import nn

from easi3r.backbones.adoption import adopt_network
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.config import Settings, load_settings
from easi3r.device import choose_device
from easi3r.pipeline import run
from easi3r.progress import Progress, bar, silent
from easi3r.scene import Motion, Scene

logger = logging.getLogger("easi3r")

DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"  # its model card: demo/README.md


class Easi3R:
    """Motion masks and 4D scenes from a DUSt3R, MonST3R or VGGT network, without training.

    >>> model = Easi3R.from_pretrained("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")  # doctest: +SKIP
    >>> scene = model.reconstruct("clip.mp4", max_frames=24)  # doctest: +SKIP
    >>> scene.camera_to_world.shape  # doctest: +SKIP
    (24, 4, 4)
    """

    def __init__(self, network: nn.Module) -> None:
        """Take a DUSt3R- or VGGT-shaped network object that somebody already built; it is neither copied nor changed.

        Raises InputError or CheckpointError if its modules or tensors are neither's.
        """
        self.network, self.checkpoint = adopt_network(network)

    @classmethod
    def from_pretrained(cls, name: str | Path = "demo", *, device: str = "auto") -> Easi3R:
        """Load weights: 'demo', a file (``.pth``, ``.pt``, ``.safetensors``), a Hugging Face folder, or a hub id.

        What the file holds says which network it is for.
        device: 'auto' (the GPU where there is one), 'cpu', 'cuda', 'cuda:1'.
        Raises CheckpointError, MissingExtraError or InputError (device), each in one sentence.
        """
        where = choose_device(device)
        model = cls.__new__(cls)
        model.network, model.checkpoint = load_checkpoint(DEMO_WEIGHTS if str(name) == "demo" else name)
        model.checkpoint = dataclasses.replace(model.checkpoint, name=str(name))
        model.network.to(where)
        # a restriction on use must be seen where nobody has set logging up, too
        level = logging.WARNING if "non-commercial" in model.checkpoint.licence else logging.INFO
        logger.log(level, "weights: %s; licence: %s", model.checkpoint.name, model.checkpoint.licence)
        return model

    def segment(
        self, source: Any, *, config: Settings | str | Path | None = None, progress: bool = False, **options: Any
    ) -> Motion:
        """Find what moves; no head is run, nothing is aligned.

        source: a video file, a folder of images, a list of paths, or a uint8 array [n, H, W, 3] (RGB).
        config: Settings, or a YAML file of overrides.
        progress: show bars on stderr for what takes longer than two seconds.
        options: short names (``fps, stride, start, end, max_frames, image_size, window, passes, masks, keep, seed,
            device``) or dotted ones (``**{"motion.clusters": 32}``); they win over ``config``.

        Raises Easi3RError (InputError, ConfigError), each in one sentence.
        """
        settings, bars = self._prepare(config, options), _progress(progress)
        return run(self.network, self.checkpoint, source, settings, bars, masks_only=True)

    def reconstruct(
        self, source: Any, *, config: Settings | str | Path | None = None, progress: bool = False, **options: Any
    ) -> Scene:
        """Masks, cameras, depth and points of a clip.  Arguments as for ``segment``, and ``align``."""
        settings, bars = self._prepare(config, options), _progress(progress)
        scene = run(self.network, self.checkpoint, source, settings, bars, masks_only=False)
        assert isinstance(scene, Scene)
        return scene

    def _prepare(self, config: Settings | str | Path | None, options: dict[str, Any]) -> Settings:
        settings = config if isinstance(config, Settings) else Settings() if config is None else load_settings(config)
        settings = settings.with_options(options)
        if settings.device != "auto":
            self.network.to(choose_device(settings.device))
        return settings


def _progress(shown: bool) -> Progress:
    return bar if shown else silent

"""What training leaves on disk: a state to go on from, and weights in the project's ordinary checkpoint format."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.safetensors import read_safetensors, write_safetensors


def save_state(state: dict[str, Any], folder: Path, shard_mb: float = 0.0) -> None:
    """Write ``state`` under ``folder`` so that at every moment a whole one is there; parts of ``shard_mb`` if > 0."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    part = int(shard_mb * 1e6) or len(content)
    name = f"step-{state['step']:08d}"
    new = folder / name
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for index, start in enumerate(range(0, len(content), part)):
        (new / f"part-{index:03d}").write_bytes(content[start : start + part])
    replace_text(folder / "latest", name)
    for old in folder.glob("step-*"):
        if old.name != name:
            shutil.rmtree(old)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The last whole state, None where there is none."""
    latest = folder / "latest"
    if not latest.is_file():
        return None
    parts = sorted((folder / latest.read_text().strip()).glob("part-*"))
    buffer = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    state: dict[str, Any] = torch.load(buffer, map_location="cpu", weights_only=True)
    return state


def write_weights(network: Dust3r, folder: Path, about: dict[str, Any]) -> None:
    """``model.safetensors`` in float16 and ``config.json``, each replaced whole."""
    config = network.config
    arguments = {
        "license": "Apache-2.0",
        **{key: value for key, value in vars(config).items() if key not in ("rope_base", "conf_range")},
        "pos_embed": f"RoPE{config.rope_base:g}",
        **about,
    }
    tensors = {name: value.to(torch.float16) for name, value in network.state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors)
    replace_text(folder / "config.json", json.dumps(arguments, indent=1) + "\n")


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float32 and the configuration that :func:`write_weights` wrote."""
    tensors = {name: value.float() for name, value in read_safetensors(folder / "model.safetensors").items()}
    return tensors, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

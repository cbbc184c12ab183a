"""Results in the formats of other programs, each written whole or not at all; points all from ``Scene.points``.

One module per format, imported when it is asked for: it has ``FILES``, which says in words what each file is, and
``write(scene, folder, options)``, which fills an empty folder.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from easi3r.errors import Easi3RError, InputError, OutputError, nearest_name
from easi3r.export.options import ExportOptions as ExportOptions
from easi3r.storage import MARKER, whole_file, whole_folder

if TYPE_CHECKING:
    from easi3r.scene import Motion

FORMAT_VERSION = 1
SAVED = ("keep", "min_confidence", "max_points", "original_images")  # the options that say what an export holds


@dataclass(frozen=True)
class Format:
    """What is to be known of a format before it is used."""

    summary: str
    file: str | None = None  # the name of the one file that the format consists of
    of_motion: bool = False  # whether it needs no cameras and depth, so that what ``segment`` finds has it too


FORMATS = {
    "colmap": Format("images, masks, cameras and tracks for COLMAP and Gaussian splatting"),
    "nerfstudio": Format("transforms.json with images, masks and depth"),
    "ply": Format("clouds: the static one, and one per frame"),
    "glb": Format("one animated file for 3D programs and browsers", "scene.glb"),
    "npz": Format("all arrays and the points in one NumPy file", "scene.npz"),
    "tum": Format("the camera path", "trajectory.txt"),
    "monst3r": Format("the folder that viewers of MonST3R's results read"),
    "depth-png": Format("depth as 16-bit PNG, with its scale"),
    "depth-exr": Format("depth as 32-bit EXR"),
    "masks": Format("masks and scores at the size of the source frames", of_motion=True),
}


def export_scene(scene: Motion, path: str | Path, format: str, options: ExportOptions | None = None) -> Path:
    """Write ``scene``, a Motion only in formats that are ``of_motion``, in one format and return the absolute path.

    ``path`` becomes a folder.  Of a format that is one file (``FORMATS[format].file``) a path with that file's suffix
    becomes the file itself.  Raises InputError for an unknown format, OutputError where it cannot be written: then
    nothing is left behind, and what was there before stays.
    """
    if format not in FORMATS:
        raise InputError(
            f"The format {format!r} is unknown{nearest_name(format, FORMATS)}; expected one of {', '.join(FORMATS)}."
        )
    if scene.kind == "motion" and not FORMATS[format].of_motion:
        raise InputError(
            f"The format {format!r} needs cameras and depth, but this result holds masks alone (segment); make it with "
            "reconstruct (easi3r run)."
        )
    options = options or ExportOptions()
    target, file = Path(path).absolute(), FORMATS[format].file
    if file and target.suffix == Path(file).suffix:
        _write_file(scene, target, format, file, options)
    else:
        if options.overwrite:
            _refuse_other_results(target)
        with whole_folder(path, overwrite=options.overwrite) as folder:
            _write_folder(scene, folder, format, options)
    return target


def export_formats(
    scene: Motion, where: str | Path, formats: Iterable[str], options: ExportOptions | None = None
) -> tuple[dict[str, Path], dict[str, Easi3RError]]:
    """Write every format into a folder of its own name below ``where``; one that fails does not stop the others.

    Returns the paths of those that were written and the errors of those that were not, by format.
    """
    written: dict[str, Path] = {}
    failed: dict[str, Easi3RError] = {}
    for name in dict.fromkeys(formats):
        try:
            written[name] = export_scene(scene, Path(where) / name, name, options)
        except Easi3RError as error:
            failed[name] = error
    return written, failed


def _write_folder(scene: Motion, folder: Path, name: str, options: ExportOptions) -> None:
    module = importlib.import_module(f"easi3r.export.{name.replace('-', '_')}")
    module.write(scene, folder, options)
    header = {
        "kind": "export",
        "format_version": FORMAT_VERSION,
        "format": name,
        "num_frames": scene.num_frames,
        "options": {name: getattr(options, name) for name in SAVED} | {"keep": options.keep or scene.keep},
        "files": module.FILES,
    }
    (folder / MARKER).write_text(json.dumps(header, indent=1), encoding="utf-8")  # so that it may be overwritten


def _refuse_other_results(target: Path) -> None:
    """An export never replaces a saved scene, which is marked by a file of the same name."""
    try:
        header = (target / MARKER).read_text(encoding="utf-8", errors="replace")
    except OSError:  # nothing of ours is there; whole_folder says what else is wrong
        return
    if '"kind": "export"' not in header:
        raise OutputError(
            f"The output {target} holds a saved result that is no export, so it is not replaced; choose another name."
        )


def _write_file(scene: Motion, target: Path, name: str, file: str, options: ExportOptions) -> None:
    if target.is_dir() or (target.exists() and not options.overwrite):
        raise OutputError(f"The output {target} exists; choose another name, or replace a file with overwrite=True.")
    with whole_file(target) as partial, tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        _write_folder(scene, Path(scratch), name, options)
        (Path(scratch) / file).replace(partial)

"""Every setting with its default, in one tree of dataclasses; keyword options, flags and YAML are read off it.

A setting is addressed as ``group.name`` (``alignment.iterations``).  Those people use daily have a short
name too (``OPTIONS``): the keyword of ``Easi3R.reconstruct``, the flag of the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from easi3r.errors import ConfigError, nearest_name
from easi3r.untrusted import read_bytes


@dataclass(frozen=True)
class FrameSettings:
    """Which frames are taken, and how large."""

    fps: float | None = None  # video: frames kept per second; images: the rate at which they were taken
    stride: int = 1  # keep every stride-th of the frames that fps left
    start: float | None = None  # seconds; images without fps count one per second
    end: float | None = None  # seconds, exclusive
    max_frames: int | None = None  # the first so many of the frames that the other options left
    image_size: int | Literal["native"] | None = None  # long side in pixels; None: what the checkpoint was trained for
    collection: bool = False  # photographs of a still scene, of any sizes: all pairs, a lens each, no flow, no motion


@dataclass(frozen=True)
class PairSettings:
    """Which pairs of frames the network sees; both directions of each."""

    graph: Literal["window", "complete", "logarithmic", "reference"] = "window"
    window: int = 5  # partners after each frame
    stride: int = 2  # step between partners: i+1, i+3, i+5, ...
    reference: int = 0  # graph='reference': the frame paired with all others


@dataclass(frozen=True)
class MotionSettings:
    """How attention becomes masks."""

    passes: Literal[1, 2] = 2  # 2: decode again with attention to moving regions cut off
    masks: Any = None  # array [n, H, W] or folder of PNGs; 'none': nothing moves; None: find them
    mask_polarity: Literal["moving", "static"] = "moving"  # what True / 255 means in given masks
    clusters: int = 64  # k-means over encoder tokens; as many as there are tokens at most
    evidence: Literal["both", "attention", "flow"] = "both"  # attention: masks as published; flow: what leaves the
    # epipolar lines; both: flow, and attention in close calls
    min_motion: float = 0.0024  # distance from the epipolar line that counts as motion, over the images' long side;
    # more in a pair whose flow is noisier
    reprojection: bool = True  # networks that see all frames at once: clear what their cameras and depths explain
    instances: bool = True  # tell things that move apart, and follow them; it needs optical flow
    # what of the score counts as motion; auto: multi-otsu, as published, by attention alone, elsewhere 0.5, where flow
    # reaches its limit; a number is the threshold itself:
    threshold: Literal["auto", "multi-otsu", "otsu", "percentile"] | float = "auto"
    threshold_per: Literal["clip", "frame"] = "clip"
    percentile: float = 90.0  # threshold='percentile': so many per cent of the pixels stay static
    # what becomes of the masks that were found (given ones stay as they are); 0 = off:
    smoothing: int = 0  # frames, an odd number: each pixel takes the majority of so many frames about its own
    min_area: float = 0.0  # smaller moving regions are dropped; a share of the image, 0.001 = a thousandth
    fill_holes: float = 0.0  # holes in moving regions up to this size are filled; a share of the image
    refine: Literal["none", "sam2"] = "none"  # of the masks that were found; sam2: SAM 2's video predictor (extra sam2)


@dataclass(frozen=True)
class Sam2Settings:
    """What ``motion.refine`` = sam2 uses."""

    checkpoint: str = "facebook/sam2.1-hiera-large"  # a hub id (-tiny, -small, -base-plus, -large), or a .pt file
    config: str | None = None  # sam2's name of a configuration; None: the one that fits the weights
    image_size: int = 1024  # side of the square that SAM 2 sees, a multiple of 32; below 1024: faster and coarser
    chunk: int = 32  # frames that it sees at once; more cost memory, and time by their square
    offload: bool = False  # keep its frames and memories on the host


@dataclass(frozen=True)
class FlowSettings:
    """Optical flow between the frames of a pair."""

    method: Literal["dis", "raft"] = "dis"  # raft: torchvision's (extra raft)
    weights: str | None = None  # raft: a state dict of torchvision's raft_large or raft_small; None: fetched once
    max_inconsistency_px: float = 3.0  # forward-backward disagreement beyond which a pixel counts as occluded


@dataclass(frozen=True)
class HeadSettings:
    """What is taken of a network that sees all frames at once (VGGT), whose heads give several things."""

    points: Literal["depth", "head"] = "depth"  # depth: its depth head; head: z of its point head's points
    tracks: Any = None  # pixels of the first source frame to follow: [t, 2] (x, y), 'x,y;x,y', 'grid:16' or a file


Use = Literal["fixed", "init", "prior"]


@dataclass(frozen=True)
class KnownSettings:
    """What is known beforehand, of all frames or some: arrays, {frame: value} or files (``easi3r.known``).

    fixed: it stays as it is.  init: the solver starts there.  prior: it is pulled there, with a weight of 1 as by a
    measurement whose standard deviation is 1 % (focal length, depth), 1 degree and 1 % of the median depth (poses).
    """

    intrinsics: Any = None  # K in pixels of the source frames: f | fx,fy,cx,cy | 'exif' | file | [3, 3] | [n, 3, 3]
    intrinsics_use: Use = "fixed"
    intrinsics_weight: float = 1.0
    camera_to_world: Any = None  # [n, 4, 4] or a file (TUM, npz, npy); OpenCV axes
    world_to_camera: Any = None  # the same the other way round (COLMAP's direction)
    poses_use: Use = "fixed"
    poses_weight: float = 1.0
    depth: Any = None  # z-depth [n, H, W] or files
    depth_use: Use = "fixed"
    depth_weight: float = 1.0
    scale_from: Any = None  # 'poses' | 'depth' | frame,x1,y1,x2,y2,distance in pixels of the source frames


@dataclass(frozen=True)
class AlignmentSettings:
    """Global alignment (Easi3R section 3.3, DUSt3R section 3.4)."""

    # auto: fast; of a network that gives cameras itself (VGGT) none, unless something is known beforehand
    # none: cameras as the network gives them; of pairs, the spanning-tree start as it is
    method: Literal["auto", "fast", "published", "none"] = "auto"
    focal: Literal["shared", "per-frame"] | float = "shared"  # a number: known, in pixels of the source frames
    principal_point: Literal["centre", "solve"] = "centre"
    camera: Literal["moving", "static"] = "moving"  # static: a tripod, one pose for all frames
    smoothness_weight: float = 0.0  # of changes of velocity; 1: a degree or 1 % of the median depth is a deviation
    flow_weight: float = 0.01  # published; fast measures its weights, and 0 leaves flow out
    flow_ignore_px: float = 50.0  # residuals above are left out
    # of the published optimiser alone, with its values:
    iterations: int = 300
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-3
    flow_start: float = 0.1  # fraction of the iterations before the flow term joins
    flow_drop_px: float = 25.0  # the whole term is left out of an iteration in which its mean exceeds this

    @property
    def shared_focal(self) -> bool:
        """Whether all frames have one focal length."""
        return self.focal != "per-frame"


@dataclass(frozen=True)
class PieceSettings:
    """A clip that is longer is reconstructed in overlapping pieces, so that its length does not decide the memory."""

    frames: int = 110  # of a piece, at most; fewer where memory is short
    overlap: int = 10  # frames that two pieces share, by which they are joined


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a result.  The defaults are the published method, but for ``motion.evidence`` and
    ``alignment.method``."""

    frames: FrameSettings = field(default_factory=FrameSettings)
    pairs: PairSettings = field(default_factory=PairSettings)
    motion: MotionSettings = field(default_factory=MotionSettings)
    sam2: Sam2Settings = field(default_factory=Sam2Settings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    heads: HeadSettings = field(default_factory=HeadSettings)
    known: KnownSettings = field(default_factory=KnownSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    pieces: PieceSettings = field(default_factory=PieceSettings)
    keep: Literal["all", "static", "dynamic"] = "all"  # the points that are wanted; dynamic: movers are matched with
    # movers alone, at the price of one more pass
    seed: int = 0
    device: str = "auto"  # auto: where the network is; else cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the network's matrices; auto: the fastest
    batch_size: int | Literal["auto"] = "auto"  # pairs decoded at once; auto: as many as pay and fit
    memory: float | Literal["auto"] = "auto"  # GiB on the device to stay within; auto: most of what is free
    offload: bool = False  # keep the encoder's tokens on the host; each batch's go to the device when it is decoded

    def __post_init__(self) -> None:
        check_ranges(self)

    def with_options(self, options: Mapping[str, Any]) -> Settings:
        """Return a copy with ``options`` changed; keys are short names or dotted ones, text is converted.

        >>> Settings().with_options({"window": 3, "alignment.iterations": "50"}).alignment.iterations
        50
        """
        kinds = setting_kinds()
        changes: dict[str, dict[str, Any]] = {}  # group ('' at the top) -> name -> value; all at once, for ranges
        for given, value in options.items():
            path = OPTIONS.get(given, given)
            if path not in kinds:
                raise ConfigError(_not_an_option(given))
            group, _, name = path.rpartition(".")
            changes.setdefault(group, {})[name] = convert(value, kinds[path], given)
        top = changes.pop("", {})
        groups = {group: dataclasses.replace(getattr(self, group), **values) for group, values in changes.items()}
        return dataclasses.replace(self, **top, **groups)

    def of_collection(self) -> Settings:
        """As it is for photographs instead of a clip (then itself), where nothing else was asked for.

        All pairs, a focal length per image, no optical flow, no search for motion (given masks are kept).
        """
        if not self.frames.collection:
            return self
        graph = "complete" if self.pairs.graph == "window" else self.pairs.graph
        focal = "per-frame" if self.alignment.focal == "shared" else self.alignment.focal
        return dataclasses.replace(
            self,
            pairs=dataclasses.replace(self.pairs, graph=graph),
            motion=dataclasses.replace(self.motion, masks="none" if self.motion.masks is None else self.motion.masks),
            alignment=dataclasses.replace(self.alignment, focal=focal, flow_weight=0.0),
        )

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON; what is given as arrays is named, not stored."""
        tree: dict[str, Any] = {}
        for path in setting_kinds():
            value = get_setting(self, path)
            if value is not None and not isinstance(value, (str, int, float)):
                value = str(value) if isinstance(value, os.PathLike) else "given"
            group, _, name = path.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[name] = value
        return tree


OPTIONS: dict[str, str] = {  # short name -> dotted name; the keywords and flags of the contract
    "fps": "frames.fps",
    "stride": "frames.stride",
    "start": "frames.start",
    "end": "frames.end",
    "max_frames": "frames.max_frames",
    "image_size": "frames.image_size",
    "collection": "frames.collection",
    "window": "pairs.window",
    "passes": "motion.passes",
    "masks": "motion.masks",
    "mask_polarity": "motion.mask_polarity",
    "evidence": "motion.evidence",
    "refine": "motion.refine",
    "instances": "motion.instances",
    "keep": "keep",
    "threshold": "motion.threshold",
    "clusters": "motion.clusters",
    "smoothing": "motion.smoothing",
    "min_area": "motion.min_area",
    "fill_holes": "motion.fill_holes",
    "intrinsics": "known.intrinsics",
    "camera_to_world": "known.camera_to_world",
    "world_to_camera": "known.world_to_camera",
    "depth": "known.depth",
    "scale_from": "known.scale_from",
    "flow": "flow.method",
    "points": "heads.points",
    "tracks": "heads.tracks",
    "align": "alignment.method",
    "focal": "alignment.focal",
    "camera": "alignment.camera",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
    "batch_size": "batch_size",
    "memory": "memory",
}

MAX_YAML = 1 << 16  # bytes of a configuration
MOST = (1 << 31) - 1  # of a whole number

ZERO_ALLOWED = {  # every other number must be greater than 0
    "frames.start",
    "frames.end",
    "pairs.reference",
    "motion.smoothing",
    "motion.min_area",
    "motion.fill_holes",
    "alignment.flow_weight",
    "alignment.flow_start",
    "alignment.smoothness_weight",
    "seed",
}


_AREA = "it is a share of the image, such as 0.001 for a thousandth"
BELOW = {  # numbers with an end, and what they mean
    "motion.threshold": (1, "scores lie between 0 and 1"),
    "motion.percentile": (100, "it is the per cent of the pixels that stay static"),
    "motion.min_area": (1, _AREA),
    "motion.fill_holes": (1, _AREA),
}


def check_ranges(settings: Settings) -> None:
    """Raise ConfigError for a value that is of the right type and still impossible."""
    for path in setting_kinds():
        value = get_setting(settings, path)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not (0 < value < math.inf or (value == 0 and path in ZERO_ALLOWED)):  # NaN is not either
            bound = "0 or greater" if path in ZERO_ALLOWED else "greater than 0"
            raise ConfigError(f"{path} is {shown(value)}, but it must be {bound}.")
        least, most = (0, MOST) if isinstance(value, int) else (1e-12, 1e12)
        if value and not least <= value <= most:  # the libraries below cannot count with it
            raise ConfigError(f"{path} is {shown(value)}, but it must be from {least:g} to {most:.10g}.")
        limit, meaning = BELOW.get(path, (math.inf, ""))
        if value >= limit:
            raise ConfigError(f"{path} is {shown(value)}, but it must be below {limit}: {meaning}.")
    frames, pieces = settings.frames, settings.pieces
    if settings.motion.smoothing and settings.motion.smoothing % 2 == 0:
        raise ConfigError(
            f"motion.smoothing is {settings.motion.smoothing}, but it must be an odd number of frames, as many before "
            "a frame as after it (or 0: off)."
        )
    if pieces.overlap < 2 or pieces.frames < 2 * pieces.overlap:
        raise ConfigError(
            f"pieces.frames is {pieces.frames} and pieces.overlap {pieces.overlap}, but the overlap must be at least 2 "
            "and at most half of a piece."
        )
    if settings.sam2.chunk < 2:
        raise ConfigError(f"sam2.chunk is {settings.sam2.chunk}, but it must be at least 2: frames prompt each other.")
    if settings.sam2.image_size % 32:
        raise ConfigError(f"sam2.image_size is {settings.sam2.image_size}, but it must be a multiple of 32.")
    if frames.start is not None and frames.end is not None and frames.end <= frames.start:
        raise ConfigError(f"frames.end is {frames.end} s, but it must lie after frames.start ({frames.start} s).")


def get_setting(settings: Settings, path: str) -> Any:
    """Read ``group.name``."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def setting_kinds() -> dict[str, Any]:
    """All dotted names, in the order of the dataclasses, and their annotations."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Settings).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{inner}": annotation for inner, annotation in typing.get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def load_settings(path: str | Path) -> Settings:
    """Read a YAML file of overrides: groups as mappings, or short and dotted names at the top level.

    Raises ConfigError for a file that cannot be read, an unknown name (with the nearest right one) or a bad value.
    """
    tree = _read_yaml(Path(path))
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{_name(key)}.{_name(name)}": inner for name, inner in value.items()})
        elif value is not None or not dataclasses.is_dataclass(getattr(Settings(), _name(key), None)):
            flat[_name(key)] = value  # (a group whose lines are all commented out says nothing)
    try:
        return Settings().with_options(flat)
    except ConfigError as error:
        raise ConfigError(f"In {path}: {error}") from error


def _name(key: Any) -> str:
    return key if isinstance(key, str) else shown(key)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        tree = yaml.load(read_bytes(path, MAX_YAML).decode("utf-8"), Loader=_PlainLoader)
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read ({error.strerror}); expected a YAML file."
        ) from error
    except Exception as error:  # beside its own errors PyYAML raises half a dozen types: !!int '' is an IndexError
        mark = getattr(error, "problem_mark", None)
        where, what = (f"line {mark.line + 1}: ", getattr(error, "problem", "")) if mark else ("", error)
        reason = where + (" ".join(str(what).split())[:120].rstrip(".") or type(error).__name__)
        raise ConfigError(f"The configuration {path} is not YAML ({reason}); expected 'name: value' lines.") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"The configuration {path} holds a {type(tree).__name__}; expected 'name: value' lines.")
    return tree or {}


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases: a few lines of them stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not taken", event.start_mark)
        return super().compose_node(parent, index)


def _not_an_option(given: str) -> str:
    names = list(setting_kinds())
    if len(given) > 100:
        return f"{shown(given)} is not an option; expected names of options."
    inside = [name for name in names if name.startswith(f"{given}.")]
    if inside:
        return f"{given!r} is a group of options, not an option; expected one of {', '.join(inside)}."
    return f"{given!r} is not an option{nearest_name(given, [*OPTIONS, *names])}."


def convert(value: Any, annotation: Any, name: str) -> Any:
    """Turn ``value`` (often text from the command line) into ``annotation``; ConfigError says what was expected."""
    if annotation is Any:
        return value
    choices = _choices(annotation)
    for choice in choices:
        with contextlib.suppress(TypeError, ValueError, OverflowError, LookupError):
            return _as_type(value, choice) if isinstance(choice, type) else _as_literal(value, choice)
    *others, last = [_IN_WORDS.get(choice, repr(choice)) for choice in choices]
    expected = f"{', '.join(others)} or {last}" if others else last
    raise ConfigError(f"{name} is {shown(value)}; expected {expected}.")


def shown(value: Any) -> str:
    """Any value in one short line."""
    if isinstance(value, int) and abs(value) > 1 << 128:  # Python refuses to write very long ones
        return "a number of more than 38 digits"
    return " ".join(_SHORT.repr(value).split())


_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", None: "none"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _choices(annotation: Any) -> list[Any]:
    """Flatten unions and literals: the types and the values (None among them) that are allowed."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    if origin is Literal:
        return list(typing.get_args(annotation))
    return [None if annotation is types.NoneType else annotation]


def _as_literal(value: Any, literal: Any) -> Any:
    """The literal itself, if ``value`` equals it or spells it; ValueError otherwise."""
    spelt = isinstance(value, str) and value.strip().lower() == str(literal).lower()
    if spelt or (not isinstance(value, bool) and value == literal):
        return literal
    raise ValueError(value)


def _as_type(value: Any, kind: type) -> Any:
    """The value as int, float, bool or str; an error of the kinds that ``convert`` expects if it is no such thing."""
    if kind is bool:
        return _TRUTH[str(value).strip().lower()]
    if value is None or isinstance(value, bool):
        raise ValueError(value)
    converted = kind(value)
    if kind is int and not isinstance(value, str) and converted != value:
        raise ValueError(value)
    if kind is float and not math.isfinite(converted):
        raise ValueError(value)
    return converted

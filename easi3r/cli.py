"""The command line: ``easi3r run | segment | show | export | demo | doctor``.

Exit codes: 0 done; 1 the work failed, one sentence on stderr says why; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from easi3r._version import __version__
from easi3r.config import OPTIONS, FrameSettings, Settings, get_setting, load_settings
from easi3r.errors import ConfigError, Easi3RError, QualityError, nearest_name
from easi3r.export import FORMATS

if TYPE_CHECKING:
    from easi3r.scene import Motion

logger = logging.getLogger("easi3r")

HELP = {
    "fps": "frames per second to keep of a video; the rate at which a folder of images was taken",
    "stride": "keep every STRIDE-th frame",
    "start": "first second to take",
    "end": "second to stop before",
    "max_frames": "the first so many frames of what the other options leave",
    "image_size": "long side in pixels for the network, or 'native' (default: what the checkpoint was trained for)",
    "window": "partners of each frame in the pair graph",
    "passes": "1: stop after the first pass; 2: decode again with attention to moving regions cut off",
    "masks": "folder of PNG masks, one per frame, 255 = moves; or 'none' for plain DUSt3R",
    "evidence": "of motion: attention (as published), flow (off the epipolar lines), or both (default)",
    "instances": "true or false: tell things that move apart and follow them, by optical flow",
    "intrinsics": "of the source frames: f | f,cx,cy | fx,fy,cx,cy | exif | a text, npy, npz or COLMAP file",
    "camera_to_world": "known poses, a file: TUM, npz or npy; frames that are not in it are solved for",
    "world_to_camera": "the same the other way round: npz, npy or COLMAP",
    "depth": "known z-depth: a folder of npy or npz files, or one file",
    "scale_from": "poses | depth | FRAME,X1,Y1,X2,Y2,DISTANCE between two pixels of a source frame",
    "flow": "optical flow: dis, or raft (extra raft)",
    "align": "fast; published: the published optimiser, slow; none: the spanning-tree start as it is",
    "focal": "shared, per-frame, or a number of pixels of the source frames",
    "camera": "moving, or static: a tripod, one pose for all frames",
    "seed": "for the clustering",
    "device": "auto, cpu, cuda, cuda:1",
    "dtype": "of the network's matrices: float32, bfloat16, float16, or the fastest here",
    "batch_size": "pairs decoded at once; auto: as many as pay and fit",
    "memory": "GiB of the device to stay within; auto: most of what is free",
}


class Parser(argparse.ArgumentParser):
    """Names the nearest right flag when one is unknown."""

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments:.*?(--[\w-]+)", message):
            subparsers = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
            parsers = [self, *(parser for action in subparsers for parser in action.choices.values())]
            flags = {flag for parser in parsers for flag in parser._option_string_actions}
            message += nearest_name(unknown[1], sorted(flags))
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags; every short option is a flag of the same name."""
    parser = Parser(prog="easi3r", description="A video of a moving world in, a 4D scene out.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"easi3r {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    shared = Parser(add_help=False)
    shared.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    work = Parser(add_help=False, parents=[shared])
    work.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier result")
    clip = Parser(add_help=False, parents=[work])
    clip.add_argument("input", metavar="INPUT", help="a video file, or a folder of images")
    clip.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to write")
    clip.add_argument("--checkpoint", default="demo", help="'demo', a .pth file, a Hugging Face folder or a hub id")
    clip.add_argument("--config", metavar="FILE.yaml", help="a YAML file of overrides")
    clip.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="one setting, such as pairs.graph=complete"
    )
    clip.add_argument("--strict", action="store_true", help="exit code 1 if the verdict on the result is 'bad'")
    for name, path in OPTIONS.items():
        default = get_setting(Settings(), path)
        text = HELP[name] + ("" if default is None else f" (default: {default})")
        clip.add_argument(f"--{name.replace('_', '-')}", dest=f"option_{name}", metavar=name.upper(), help=text)

    for name, text in (("run", "one video or folder, everything"), ("segment", "masks only")):
        commands.add_parser(name, parents=[clip], help=text, description=text, allow_abbrev=False)
    demo = commands.add_parser("demo", parents=[work], help="a generated clip, end to end", allow_abbrev=False)
    demo.add_argument("-o", "--output", metavar="OUT", default="easi3r_demo", help="the folder to write (easi3r_demo)")
    _add_show(commands, shared)
    _add_export(commands, shared)
    commands.add_parser("doctor", parents=[shared], help="versions, device, extras", allow_abbrev=False)
    return parser


def _add_show(commands: argparse._SubParsersAction[Parser], shared: Parser) -> None:
    text = "a saved scene in a browser (extra viewer), as one HTML file, or as a video"
    show = commands.add_parser("show", parents=[shared], help=text, description=text, allow_abbrev=False)
    show.add_argument("result", metavar="OUT", help="the folder of a saved scene")
    show.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    show.add_argument("--port", type=int, default=8080, help="to listen on, or the next free one (default: 8080)")
    show.add_argument("--html", metavar="FILE", help="write one self-contained page instead")
    show.add_argument("--video", metavar="FILE.mp4", help="write the points as seen along the recovered camera path")
    show.add_argument("--orbit", action="store_true", help="let the camera of --video circle smoothly instead")
    show.add_argument("--overlay", metavar="FILE.mp4", help="write the frames with what moves marked")


def _add_export(commands: argparse._SubParsersAction[Parser], shared: Parser) -> None:
    text = "a saved scene in the formats of other programs: " + "; ".join(
        f"{name}: {known.summary}" for name, known in FORMATS.items()
    )
    export = commands.add_parser(
        "export", parents=[shared], help="a saved scene for other programs", description=text, allow_abbrev=False
    )
    export.add_argument("result", metavar="OUT", help="the folder of a saved scene")
    export.add_argument(
        "--to", metavar="FORMAT,...", required=True, action="extend", type=_formats, help=", ".join(FORMATS)
    )
    export.add_argument("-o", "--output", metavar="WHERE", help="each format becomes WHERE/FORMAT (default: OUT)")
    export.add_argument("--overwrite", action="store_true", help="replace earlier exports")
    export.add_argument(
        "--keep", choices=("all", "static", "dynamic"), default="all", help="which points ply, glb and npz hold"
    )
    export.add_argument(
        "--min-confidence", metavar="X", type=float, default=1.0, help="leave out points of less (default: 1, none)"
    )
    export.add_argument(
        "--max-points",
        metavar="N",
        type=_positive,
        help="points in all (default: 100000 in colmap and nerfstudio, 1000000 in glb, else all)",
    )
    export.add_argument(
        "--original-images",
        action="store_true",
        help="colmap and nerfstudio: the frames of the source at their full size",
    )


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(
                f"unknown format {name!r}{nearest_name(name, FORMATS)}; there are {', '.join(FORMATS)}"
            )
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        with _log_to_stderr(logging.WARNING if options.quiet else logging.INFO), warnings.catch_warnings():
            if not sys.warnoptions:  # what libraries warn of is for developers (python -W default)
                warnings.simplefilter("ignore")
            if options.command == "doctor":
                from easi3r.doctor import report

                print(report())
            elif options.command == "demo":
                _demo(options)
            elif options.command == "show":
                if options.orbit and not options.video:
                    parser.error("--orbit is for --video FILE")
                _show(options)
            elif options.command == "export":
                return _export(options)
            else:
                _work(options, _settings(parser, options))
    except KeyboardInterrupt:
        print("easi3r: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Easi3RError as error:
        print("easi3r:", *str(error).splitlines(), file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("easi3r: %(message)s"))
    previous = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(previous)


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Settings:
    """Defaults, then --config (mistakes there are exit code 1), then --set and flags (wrong usage, exit code 2)."""
    settings = load_settings(options.config) if options.config else Settings()
    changes: dict[str, Any] = {}
    for assignment in options.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            parser.error(f"--set takes name=value, such as pairs.graph=complete, not {assignment!r}")
        changes[name.strip()] = value
    changes |= {name: value for name in OPTIONS if (value := getattr(options, f"option_{name}")) is not None}
    try:
        return settings.with_options(changes)
    except ConfigError as error:
        parser.error(str(error))


def _work(options: argparse.Namespace, settings: Settings) -> None:
    from easi3r.frames import read_frames
    from easi3r.storage import check_output

    # what is wrong already is said before the weights are loaded, not after hours of work
    check_output(options.output, overwrite=options.overwrite)
    read_frames(options.input, FrameSettings(max_frames=1, image_size="native"), patch_size=1, trained_size=1)
    from easi3r.model import Easi3R

    model = Easi3R.from_pretrained(options.checkpoint, device=settings.device)
    act = model.segment if options.command == "segment" else model.reconstruct
    result = act(options.input, config=settings, progress=not options.quiet)
    _finish(result, options)
    quality = result.meta.get("quality", {})
    if options.strict and quality.get("verdict") == "bad":
        raise QualityError(f"The result was written, but is bad: {' '.join(quality['reasons'])}")


def _demo(options: argparse.Namespace) -> None:
    import imageio.v3 as iio

    from easi3r.demo.clip import FPS, demo_clip, geometry_errors, overview
    from easi3r.metrics import jaccard
    from easi3r.model import Easi3R
    from easi3r.storage import check_output, whole_file

    check_output(options.output, overwrite=options.overwrite)
    model, clip = Easi3R.from_pretrained("demo"), demo_clip()
    scene = model.reconstruct(clip.images, fps=FPS, progress=not options.quiet)
    _finish(scene, options)
    picture = Path(options.output) / "overview.png"
    with whole_file(picture) as partial:
        iio.imwrite(partial, overview(scene, clip))
    if not options.quiet:
        truth = geometry_errors(scene, clip)
        mask_j = jaccard(scene.dynamic_mask, clip.dynamic_mask).mean()
        print(
            "against the truth of this clip, which a generator made:\n"
            f"  masks   J {mask_j:.2f} (intersection over union, mean of the frames)\n"
            f"  cameras ATE {truth.ate_percent:.1f} % of the path, focal length {truth.focal_percent:.1f} % off\n"
            f"  depth   {truth.depth_abs_rel_percent:.1f} % off where nothing moves, "
            f"{truth.depth_abs_rel_percent_moving:.1f} % where something does (one scale for the clip)\n"
            f"see {picture}: frames; masks found and true; depth found and true"
        )


def _show(options: argparse.Namespace) -> None:
    from easi3r.progress import bar, silent
    from easi3r.scene import Scene

    scene, progress = Scene.load(options.result), silent if options.quiet else bar
    written = [file for file in (options.html, options.video, options.overlay) if file]
    if options.html:
        from easi3r.viewer.player import write_player

        write_player(scene, options.html, progress=progress)
    if options.video or options.overlay:
        from easi3r.viewer.video import write_overlay_video, write_scene_video

        if options.video:
            write_scene_video(scene, options.video, orbit=options.orbit, progress=progress)
        if options.overlay:
            write_overlay_video(scene, options.overlay, progress=progress)
    if written:
        if not options.quiet:
            print(f"wrote {', '.join(written)}")
        return
    from easi3r.viewer.live import Viewer

    with Viewer(scene, host=options.host, port=options.port, progress=progress) as viewer:
        print(f"{viewer.address} (Ctrl-C ends it)\nfrom another machine: {viewer.ssh_command}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            viewer.wait()


def _export(options: argparse.Namespace) -> int:
    """Every format that can be written is; 1 if any cannot, each with its sentence."""
    from easi3r.export import ExportOptions, export_formats
    from easi3r.progress import bar, silent
    from easi3r.scene import Scene

    chosen = ExportOptions(
        keep=options.keep,
        min_confidence=options.min_confidence,
        max_points=options.max_points,
        original_images=options.original_images,
        overwrite=options.overwrite,
        progress=silent if options.quiet else bar,
    )
    scene = Scene.load(options.result)
    written, failed = export_formats(scene, options.output or options.result, options.to, chosen)
    if not options.quiet:
        for name, path in written.items():
            print(f"wrote {path}: {FORMATS[name].summary}")
    for name, error in failed.items():
        print(f"easi3r: {name} was not exported:", *str(error).splitlines(), file=sys.stderr)
    return 1 if failed else 0


def _finish(result: Motion, options: argparse.Namespace) -> None:
    folder = result.save(options.output, overwrite=options.overwrite)
    if options.quiet:
        return
    n, height, width = result.images.shape[:3]
    seconds = sum(result.meta["timings_s"].values())
    print(
        f"{n} frames of {width}x{height} pixels in {seconds:.1f} s; {result.dynamic_mask.mean():.1%} of the pixels move"
    )
    if "scale" in result.meta:
        print(f"cameras and depth are {result.meta['scale']}")
    if "quality" in result.meta:
        quality = result.meta["quality"]
        print(f"verdict without ground truth: {quality['verdict']}")
        for sentence in (*quality["reasons"], *quality["not_checked"]):
            print(f"  {sentence}")
    print(f"wrote {folder}: open report.html first; scene.json says what each file is")


if __name__ == "__main__":
    raise SystemExit(main())

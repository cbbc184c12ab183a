"""The command line: ``easi3r run | segment | batch | show | export | demo | doctor``.

Exit codes: 0 done; 1 the work failed, one sentence on stderr says why; 2 wrong usage; 130 interrupted (batch: 143 by
SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from easi3r._version import __version__
from easi3r.config import OPTIONS, FrameSettings, Settings, get_setting, load_settings, setting_kinds
from easi3r.errors import ConfigError, Easi3RError, QualityError, nearest_name
from easi3r.export import FORMATS

if TYPE_CHECKING:
    from easi3r.progress import Progress
    from easi3r.scene import Motion, Scene

logger = logging.getLogger("easi3r")

HELP = {
    "fps": "frames per second to keep of a video; the rate at which a folder of images was taken",
    "stride": "keep every STRIDE-th frame",
    "start": "first second to take",
    "end": "second to stop before",
    "max_frames": "the first so many frames of what the other options leave",
    "image_size": "long side in pixels for the network, or 'native' (default: what the checkpoint was trained for)",
    "collection": "photographs of one still scene, of any sizes and orientations, on one canvas",
    "window": "partners of each frame in the pair graph",
    "passes": "1: stop after the first pass; 2: decode again with attention to moving regions cut off",
    "masks": "folder of PNG masks, one per frame, 255 = moves; or 'none' for plain DUSt3R",
    "mask_polarity": "what 255 means in --masks: moving, or static",
    "evidence": "of motion: attention (as published), flow (off the epipolar lines), or both (default)",
    "instances": "tell things that move apart, and follow them (default); --no-instances: not",
    "refine": "the masks that were found: none, or sam2: by SAM 2's video predictor (extra sam2)",
    "keep": "the points that are wanted: all, static or dynamic (one more pass: movers matched with movers alone)",
    "threshold": "of the score: multi-otsu, otsu, percentile, a number from 0 to 1, or auto: the evidence's own",
    "clusters": "of tokens, over which the score is averaged",
    "smoothing": "majority of so many frames, an odd number; 0: off",
    "min_area": "smallest moving region that is kept, as a share of the image, such as 0.001; 0: off",
    "fill_holes": "largest hole in a moving region that is filled, as a share of the image; 0: off",
    "intrinsics": "of the source frames: f | f,cx,cy | fx,fy,cx,cy | exif | a text, npy, npz or COLMAP file",
    "camera_to_world": "known poses, a file: TUM, npz or npy; frames that are not in it are solved for",
    "world_to_camera": "the same the other way round: npz, npy or COLMAP",
    "depth": "known z-depth: a folder of npy or npz files, or one file",
    "scale_from": "poses | depth | FRAME,X1,Y1,X2,Y2,DISTANCE between two pixels of a source frame",
    "flow": "optical flow: dis, or raft (extra raft)",
    "points": "VGGT: unprojected depth, or the z of its point head's points (head)",
    "tracks": "VGGT: pixels of the first source frame to follow: x,y;x,y | grid:16 | a text, npy or npz file",
    "align": "fast; published: the published optimiser, slow; none: cameras as the network gives them; auto: fast, of "
    "VGGT none",
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
    settings = _settings_parser()
    clip = Parser(add_help=False, parents=[work, settings])
    clip.add_argument("input", metavar="INPUT", help="a video file, or a folder of images")
    clip.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to write")
    clip.add_argument("--strict", action="store_true", help="exit code 1 if the verdict on the result is 'bad'")

    for name, text in (("run", "one video or folder, everything"), ("segment", "masks only")):
        commands.add_parser(name, parents=[clip], help=text, description=text, allow_abbrev=False)
    _add_batch(commands, shared, settings)
    demo = commands.add_parser("demo", parents=[work], help="a generated clip, end to end", allow_abbrev=False)
    demo.add_argument("-o", "--output", metavar="OUT", default="easi3r_demo", help="the folder to write (easi3r_demo)")
    _add_show(commands, shared)
    _add_export(commands, shared)
    commands.add_parser("doctor", parents=[shared], help="versions, device, extras", allow_abbrev=False)
    return parser


def _settings_parser() -> Parser:
    """What shapes a result: the same flags for one clip and for many."""
    settings = Parser(add_help=False)
    settings.add_argument(
        "--checkpoint", default="demo", help="'demo', a file of weights (DUSt3R's or VGGT's), a folder, a hub id"
    )
    settings.add_argument("--config", metavar="FILE.yaml", help="a YAML file of overrides")
    settings.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="one setting, such as pairs.graph=complete"
    )
    kinds = setting_kinds()
    for name, path in OPTIONS.items():
        default = get_setting(Settings(), path)
        flag, dest = f"--{name.replace('_', '-')}", f"option_{name}"
        if kinds[path] is bool:
            settings.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=HELP[name])
        else:
            text = HELP[name] + ("" if default is None else f" (default: {default})")
            settings.add_argument(flag, dest=dest, metavar=name.upper(), help=text)
    return settings


def _add_batch(commands: argparse._SubParsersAction[Parser], *parents: Parser) -> None:
    text = "every video and folder of images below a folder, resumable"
    many = commands.add_parser("batch", parents=list(parents), help=text, description=text, allow_abbrev=False)
    many.add_argument("folder", metavar="FOLDER", help="searched for clips, however deep")
    many.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to write, or to go on with")
    many.add_argument("--jobs", metavar="N", help="clips at once, one process each; on GPUs one each (default: 1)")
    many.add_argument("--threads-per-job", metavar="N", help="(default: the cores, shared out among the jobs)")
    many.add_argument("--retry-failed", action="store_true", default=None, help="work again on clips that failed")
    many.add_argument("--engine", help="local, or ray: on a cluster (extra ray) (default: local)")
    many.add_argument("--address", help="of a Ray cluster (default: the one on this machine, or a new one)")


def _add_show(commands: argparse._SubParsersAction[Parser], shared: Parser) -> None:
    text = "a saved scene in a browser (extra viewer), as one HTML file, or as a video"
    show = commands.add_parser("show", parents=[shared], help=text, description=text, allow_abbrev=False)
    show.add_argument("result", metavar="OUT", help="the folder of a saved scene (--overlay: of masks too)")
    show.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    show.add_argument("--port", type=int, default=8080, help="to listen on, or the next free one (default: 8080)")
    show.add_argument("--html", metavar="FILE", help="write one self-contained page instead")
    show.add_argument("--video", metavar="FILE.mp4", help="write the points as seen along the recovered camera path")
    show.add_argument("--orbit", action="store_true", help="let the camera of --video circle smoothly instead")
    _add_keep(show, "which points are shown")
    show.add_argument("--overlay", metavar="FILE.mp4", help="write the frames with what moves marked")


def _add_export(commands: argparse._SubParsersAction[Parser], shared: Parser) -> None:
    text = "a saved scene in the formats of other programs: " + "; ".join(
        f"{name}: {known.summary}" for name, known in FORMATS.items()
    )
    export = commands.add_parser(
        "export", parents=[shared], help="a saved scene for other programs", description=text, allow_abbrev=False
    )
    export.add_argument("result", metavar="OUT", help="the folder of a saved scene (--to masks: of masks too)")
    export.add_argument(
        "--to", metavar="FORMAT,...", required=True, action="extend", type=_formats, help=", ".join(FORMATS)
    )
    export.add_argument("-o", "--output", metavar="WHERE", help="each format becomes WHERE/FORMAT (default: OUT)")
    export.add_argument("--overwrite", action="store_true", help="replace earlier exports")
    _add_keep(export, "which points ply, glb and npz hold")
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


def _add_keep(parser: argparse.ArgumentParser, help: str) -> None:
    choices = ("all", "static", "dynamic")
    parser.add_argument("--keep", choices=choices, help=f"{help} (default: those OUT was reconstructed for)")


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
            elif options.command == "batch":
                return _batch(parser, options)
            else:
                _work(options, _settings(parser, options))
    except KeyboardInterrupt as stop:
        print(f"easi3r: {stop if str(stop) else 'interrupted; nothing was written'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except Easi3RError as error:
        print("easi3r:", on_one_line(str(error)), file=sys.stderr)
        return 1
    return 0


def on_one_line(text: str) -> str:
    """``text`` as a terminal may have it: names of files may hold line breaks, and codes that terminals obey."""
    joined = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return on_one_line(super().format(record))


@contextlib.contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("easi3r: %(message)s"))
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
    if settings.motion.refine != "none":
        from easi3r.sam2_refinement import check_sam2

        check_sam2(settings)
    read_frames(options.input, FrameSettings(max_frames=1, image_size="native"), patch_size=1, trained_size=1)
    from easi3r.model import Easi3R

    model = Easi3R.from_pretrained(options.checkpoint, device=settings.device)
    act = model.segment if options.command == "segment" else model.reconstruct
    result = act(options.input, config=settings, progress=not options.quiet)
    _finish(result, options)
    quality = result.meta.get("quality", {})
    if options.strict and quality.get("verdict") == "bad":
        raise QualityError(f"The result was written, but is bad: {' '.join(quality['reasons'])}")


def _batch(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from easi3r.batches import batch
    from easi3r.batches.options import BatchOptions

    names = [field.name for field in dataclasses.fields(BatchOptions)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings = _settings(parser, options)
    try:
        BatchOptions.taken_from(given)
    except ConfigError as error:
        parser.error(str(error))
    summary = batch(
        options.folder,
        options.output,
        checkpoint=options.checkpoint,
        config=settings,
        progress=not options.quiet,
        **given,
    )
    counts, before = summary.counts, len(summary.old)
    if not options.quiet:
        print(f"{counts['done']} clips done, {counts['failed']} failed ({before} of them in an earlier run)")
        print(f"see {summary.out / 'index.html'}, or summary.json and summary.csv")
    return 1 if counts["failed"] else 0


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
    from easi3r.scene import Scene, load_result

    progress = silent if options.quiet else bar
    written = [file for file in (options.html, options.video, options.overlay) if file]
    if options.overlay and len(written) == 1:  # which needs no scene: what segment found has it too
        from easi3r.viewer.video import write_overlay_video

        write_overlay_video(load_result(options.result), options.overlay, progress=progress)
    else:
        _show_scene(Scene.load(options.result), options, progress)
    if written and not options.quiet:
        print(f"wrote {on_one_line(', '.join(written))}")


def _show_scene(scene: Scene, options: argparse.Namespace, progress: Progress) -> None:
    if options.html:
        from easi3r.viewer.player import write_player

        write_player(scene, options.html, keep=options.keep, progress=progress)
    if options.video or options.overlay:
        from easi3r.viewer.video import write_overlay_video, write_scene_video

        if options.video:
            write_scene_video(scene, options.video, orbit=options.orbit, keep=options.keep, progress=progress)
        if options.overlay:
            write_overlay_video(scene, options.overlay, progress=progress)
    if options.html or options.video or options.overlay:
        return
    from easi3r.viewer.live import Viewer

    with Viewer(scene, host=options.host, port=options.port, keep=options.keep, progress=progress) as viewer:
        print(f"{viewer.address} (Ctrl-C ends it)\nfrom another machine: {viewer.ssh_command}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            viewer.wait()


def _export(options: argparse.Namespace) -> int:
    """Every format that can be written is; 1 if any cannot, each with its sentence."""
    from easi3r.export import ExportOptions, export_formats
    from easi3r.progress import bar, silent
    from easi3r.scene import Scene, load_result

    chosen = ExportOptions(
        keep=options.keep,
        min_confidence=options.min_confidence,
        max_points=options.max_points,
        original_images=options.original_images,
        overwrite=options.overwrite,
        progress=silent if options.quiet else bar,
    )
    for_all = any(FORMATS[name].of_motion for name in options.to)
    result = load_result(options.result) if for_all else Scene.load(options.result)
    written, failed = export_formats(result, options.output or options.result, options.to, chosen)
    if not options.quiet:
        for name, path in written.items():
            print(f"wrote {on_one_line(str(path))}: {FORMATS[name].summary}")
    for name, error in failed.items():
        print(f"easi3r: {name} was not exported: {on_one_line(str(error))}", file=sys.stderr)
    return 1 if failed else 0


def _finish(result: Motion, options: argparse.Namespace) -> None:
    folder = result.save(options.output, overwrite=options.overwrite)
    if options.quiet:
        return
    n, height, width = result.images.shape[:3]
    seconds = sum(result.meta["timings_s"].values())
    shares = result.meta["moving_share"]
    print(
        f"{n} frames of {width}x{height} pixels in {seconds:.1f} s; {sum(shares) / n:.1%} of the pixels move "
        f"({min(shares):.1%} to {max(shares):.1%} per frame)"
    )
    if "scale" in result.meta:
        print(f"cameras and depth are {result.meta['scale']}")
    if "quality" in result.meta:
        quality = result.meta["quality"]
        print(f"verdict without ground truth: {quality['verdict']}")
        for sentence in (*quality["reasons"], *quality["not_checked"]):
            print(f"  {sentence}")
    print(f"wrote {on_one_line(str(folder))}: open report.html first; scene.json says what each file is")


if __name__ == "__main__":
    raise SystemExit(main())

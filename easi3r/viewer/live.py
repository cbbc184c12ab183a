"""The viewer in a browser, live, by viser: time, points, cameras, and how they are coloured and thinned."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from easi3r.errors import InputError, MissingExtraError
from easi3r.progress import Progress, silent
from easi3r.viewer.cameras import frame_rate
from easi3r.viewer.shown import FRUSTUM_DEPTH, palette, shown_points

if TYPE_CHECKING:
    from easi3r.scene import Keep, Scene
    from easi3r.structures import Array

HOST, PORT = "127.0.0.1", 8080  # this machine alone, unless told otherwise
MAX_POINTS = 2_000_000
MAX_FRUSTA = 40  # of a long path not every camera is drawn, but always the current one
THUMBNAIL_SIDE = 160  # pixels, the longer side of the images in the frusta
IMAGE, TIME, SCORE = "image", "time", "dynamic score"


class Viewer:
    """Serves a scene until it is closed.

    >>> with Viewer(scene) as viewer:
    ...     viewer.wait()
    """

    def __init__(
        self,
        scene: Scene,
        *,
        host: str = HOST,
        port: int = PORT,
        max_points: int = MAX_POINTS,
        keep: Keep | None = None,
        progress: Progress = silent,
    ) -> None:
        """Start serving; the next free port is taken if ``port`` is in use.

        keep: all points, or the static or moving ones; None: as the scene was made for.

        Raises MissingExtraError without viser, InputError for a host or port that cannot be listened on.
        """
        viser = find_viser()
        _check_address(host, port)
        self.shown = shown_points(scene, max_points, keep=keep, progress=progress)
        self.num_frames = scene.num_frames
        self._rate = frame_rate(scene.timestamps)
        self._host = host
        self._closed = threading.Event()
        self._outdated: set[int] = set()  # frames whose node does not yet heed the controls
        self._lock = threading.RLock()  # viser calls back from many threads
        with _quiet_console():
            self.server = viser.ViserServer(host=host, port=port, label="easi3r", verbose=False)
        self._add_controls()
        self._add_points()
        self._add_cameras(scene)
        self.show_frame(0)
        threading.Thread(target=self._play, daemon=True).start()

    @property
    def port(self) -> int:
        """The port that is served, which may be another one than asked for."""
        return int(self.server.get_port())

    @property
    def address(self) -> str:
        """What to open in a browser on this machine."""
        host = "localhost" if self._host in ("127.0.0.1", "0.0.0.0", "::", "::1", "") else self._host
        return f"http://{host}:{self.port}"

    @property
    def ssh_command(self) -> str:
        """What to type on another machine, so that the address works there too."""
        return f"ssh -L {self.port}:localhost:{self.port} {socket.gethostname()}"

    def __repr__(self) -> str:
        return f"Viewer({self.address}, {self.shown.summary})"

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Return once the viewer is closed; interrupt it with Ctrl-C."""
        while not self._closed.wait(0.5):  # with a timeout, so that Ctrl-C is heard on Windows too
            pass

    def close(self) -> None:
        """Stop serving."""
        if not self._closed.is_set():
            self._closed.set()
            with _quiet_console():
                self.server.stop()

    def show_frame(self, frame: int) -> None:
        """Show the moving part and the camera of ``frame``; negative ones count from the end."""
        with self._lock, self.server.atomic():
            self._frame = frame % self.num_frames
            if self._frame in self._outdated:
                self._refresh(self._frame)
            for i, node in enumerate(self._moving):
                node.visible = i == self._frame and self._show_moving.value
            self._static.visible = self._show_static.value
            step = -(-self.num_frames // MAX_FRUSTA)
            for i, frustum in enumerate(self._frusta):
                wanted = {"all": i % step == 0 or i == self._frame, "current": i == self._frame, "none": False}
                frustum.visible = wanted[self._show_cameras.value]
                frustum.color = (255, 255, 255) if i == self._frame else self._time_colors[i]
        if self._time.value != self._frame:
            self._time.value = self._frame

    def look_through(self, frame: int) -> None:
        """Put every visitor's eye where the camera was; the drawn cameras, which would be in the way, are hidden."""
        self._show_cameras.value = "none"
        pose = self._poses[frame]
        for client in self.server.get_clients().values():
            with client.atomic():
                client.camera.wxyz = _quaternion(pose)
                client.camera.position = pose[:3, 3]
                client.camera.look_at = pose[:3, 3] + self.shown.depth * pose[:3, 2]
                client.camera.fov = self._fov[frame]

    def _add_controls(self) -> None:
        gui = self.server.gui
        gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, control_width="medium")
        gui.add_markdown(f"{self.shown.summary}; {self.num_frames} frames")
        last = max(self.num_frames - 1, 1)
        self._time = gui.add_slider("frame", 0, last, 1, 0, disabled=self.num_frames < 2)
        self._playing = gui.add_checkbox("play", False, disabled=self.num_frames < 2)
        self._speed = gui.add_slider("frames/s", 1, 60, 1, round(min(60, max(1, self._rate))))
        self._color_by = gui.add_dropdown("colour by", (IMAGE, TIME, SCORE))
        self._least_rank = gui.add_slider("confidence", 0, 95, 1, 0, hint="hides so many per cent, the least confident")
        self._point_size = gui.add_slider("point size", 0.1, 5.0, 0.1, 1.0)
        self._show_static = gui.add_checkbox("static part", True)
        self._show_moving = gui.add_checkbox("moving part", True)
        self._show_cameras = gui.add_dropdown("cameras", ("all", "current", "none"))
        look = gui.add_button("look through the camera")

        self._time.on_update(lambda _: self.show_frame(int(self._time.value)))
        for control in (self._show_static, self._show_moving, self._show_cameras):
            control.on_update(lambda _: self.show_frame(self._frame))
        for control in (self._color_by, self._least_rank):
            control.on_update(lambda _: self._refresh_all())
        self._point_size.on_update(lambda _: self._resize())
        look.on_click(lambda _: self.look_through(self._frame))

    def _add_points(self) -> None:
        add = self.server.scene.add_point_cloud
        self._typical_size = float(np.median(self.shown.size)) if len(self.shown.size) else 1.0
        look: dict[str, Any] = {"point_size": self._typical_size, "precision": "float32"}
        look |= {"point_shape": "circle", "point_shading": "flat"}
        self._static = add("/static", *self._chosen(self.shown.static), **look)
        self._moving = [
            add(f"/moving/frame_{i:05d}", *self._chosen(self.shown.moving(i)), visible=False, **look)
            for i in range(self.num_frames)
        ]

    def _add_cameras(self, scene: Scene) -> None:
        height, width = scene.images.shape[1:3]
        self._poses = scene.camera_to_world.astype(np.float64)
        focal = scene.intrinsics[:, [0, 1], [0, 1]].astype(np.float64)
        self._fov = 2 * np.arctan(height / 2 / focal[:, 1])
        self._time_colors = [
            (int(r), int(g), int(b))
            for r, g, b in palette(np.linspace(0.05, 0.95, self.num_frames), cv2.COLORMAP_TURBO)
        ]
        scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        self._frusta = [
            self.server.scene.add_camera_frustum(
                f"/cameras/frame_{i:05d}",
                fov=float(self._fov[i]),
                aspect=float(width / focal[i, 0] / (height / focal[i, 1])),
                scale=FRUSTUM_DEPTH * self.shown.depth,
                thickness=1.5,
                thickness_units="screen",
                color=self._time_colors[i],
                image=cv2.resize(scene.images[i], size, interpolation=cv2.INTER_AREA),
                format="jpeg",
                wxyz=_quaternion(pose),
                position=pose[:3, 3],
                visible=False,
            )
            for i, pose in enumerate(self._poses)
        ]
        up = -self._poses[:, :3, 1].mean(axis=0)
        first = self._poses[0]
        self.server.scene.set_up_direction(up)
        camera = self.server.initial_camera  # behind and beside the first camera, looking at what it looks at
        camera.look_at = first[:3, 3] + self.shown.depth * first[:3, 2]
        camera.position = first[:3, :3] @ (self.shown.depth * np.array([-0.35, -0.3, -0.45])) + first[:3, 3]
        camera.up = up

    def _chosen(self, rows: slice) -> tuple[Array, Array]:
        """Points and colours of some rows, as the controls ask."""
        kept = self.shown.confidence_rank[rows] >= self._least_rank.value * 2.55
        return self.shown.points[rows][kept], self.shown.colored_by(self._color_by.value, rows)[kept]

    def _refresh(self, frame: int) -> None:
        self._outdated.discard(frame)
        self._moving[frame].points, self._moving[frame].colors = self._chosen(self.shown.moving(frame))

    def _refresh_all(self) -> None:
        with self._lock:
            with self.server.atomic():
                self._static.points, self._static.colors = self._chosen(self.shown.static)
            self._outdated = set(range(self.num_frames))  # the others when they are shown
            self._refresh(self._frame)

    def _resize(self) -> None:
        with self._lock:
            for node in (self._static, *self._moving):
                node.point_size = self._typical_size * self._point_size.value

    def _play(self) -> None:
        while not self._closed.wait(1 / self._speed.value):
            if self._playing.value:
                self.show_frame(self._frame + 1)


def find_viser() -> ModuleType:
    """viser, or MissingExtraError that says how to install it."""
    try:
        import viser
    except ImportError as error:
        raise MissingExtraError(
            "The viewer needs the package viser, which is not installed; pip install 'easi3r[viewer]', or write a page "
            "with --html FILE."
        ) from error
    return viser


@contextmanager
def _quiet_console() -> Iterator[None]:
    """viser prints a box with its address and says good-bye; here the caller says what there is to say."""
    from rich import get_console  # viser needs it, so it is there

    console = get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _check_address(host: str, port: int) -> None:
    if not 0 <= port <= 65535:
        raise InputError(f"The port {port} does not exist; expected a number from 0 to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"The viewer cannot listen on {host!r} ({error.strerror}); expected an address of this machine, such as "
            f"{HOST} or 0.0.0.0."
        ) from error


def _quaternion(pose: Array) -> Array:
    """[4] w x y z."""
    return np.asarray(np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(), 1))

"""Cameras, focal length and a smooth correction of every depth map: Levenberg-Marquardt on sampled static pixels.

For a directed pair (a, b), a pixel p of a that the flow sees at q in b, and y the point of p in b's camera frame:

- flow: ``project(y) - q`` (MonST3R, equation 5);
- depth: ``log y_z - log depth_b(q)``: both frames see one surface;
- pair: where the second camera is, against what the network's points say (:mod:`easi3r.alignment.relative`);
- what the user knows, and a smooth path if one is asked for.

Each is divided by its scatter, which is measured on the clip as the median of what is left, and its outliers count for
little (Geman and McClure, Cauchy), so that no term needs a weight by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import roma
import torch
from torch import Tensor

from easi3r.alignment.lens import Lenses
from easi3r.alignment.matches import Cameras, Seen
from easi3r.alignment.normal import BLOCK, BORDER, CENTRE, FOCAL, KNOT, KNOTS, POSE, SCALE, SHARED_FOCAL, Normal
from easi3r.alignment.relative import CUTOFF, RelativePoses, cross
from easi3r.alignment.surfaces import Surface
from easi3r.structures import Array

ROUNDS = (3, 2, 2)  # steps before the scatters are measured anew
CONVERGED = 1e-6  # radians, world units, logarithms
PRIOR_TURN, PRIOR_SHARE = np.deg2rad(1.0), 0.01  # one standard deviation of what a weight of 1 says
LEAST_FLOW_PX, LEAST_DEPTH = 0.02, 1e-5  # scatters below these are not believed
PATCH_PX = 8  # flow vectors within a square of this side come from one match: they say one thing
MEDIAN_2, MEDIAN_3 = 1.386, 2.366  # of chi-squared with so many degrees of freedom


@dataclass(frozen=True)
class State:
    """The unknowns."""

    rotation: Tensor  # [n, 3, 3] float64 camera to world
    translation: Tensor  # [n, 3] float64
    log_focal: Tensor  # [n] float64, change of the focal length
    correction: Tensor  # [n, G] float64, of the log depth at the knots
    log_scale: float  # of the world against the pairs' common unit
    centre: Tensor  # [2] float64 pixels, change of the principal point

    @classmethod
    def at_rest(cls, n: int) -> State:
        """Every camera at the origin, depth and focal length as they are."""
        kind = torch.float64
        return cls(
            torch.eye(3, dtype=kind).repeat(n, 1, 1),
            torch.zeros(n, 3, dtype=kind),
            torch.zeros(n, dtype=kind),
            torch.zeros(n, KNOTS, dtype=kind),
            0.0,
            torch.zeros(2, dtype=kind),
        )

    def moved(self, step: Array, border: Array) -> State:
        """After a step of :class:`Normal`; poses move in their own frames."""
        own = torch.from_numpy(step)
        return State(
            rotation=self.rotation @ roma.rotvec_to_rotmat(own[:, :3]),
            translation=self.translation + (self.rotation @ own[:, 3:6, None])[..., 0],
            log_focal=self.log_focal + own[:, FOCAL] + float(border[SHARED_FOCAL]),
            correction=self.correction + own[:, KNOT],
            log_scale=self.log_scale + float(border[SCALE]),
            centre=self.centre + torch.from_numpy(border[CENTRE]),
        )


@dataclass(frozen=True)
class Scatters:
    """Standard deviations of the terms."""

    correction: float  # of the log depth at a knot
    flow_px: float = 1.0
    log_depth: float = 0.05
    turn: float = 0.05  # of the pairs' relative rotations, radians, beyond what their pixels say
    shift: float = 0.05  # of the pairs' relative translations, their common unit, beyond what their pixels say


@dataclass(frozen=True)
class Beliefs:
    """What the user said, as normal distributions; a precision (1 / variance) of 0 says nothing."""

    rotation: Tensor  # [n, 3, 3] float64
    translation: Tensor  # [n, 3]
    pose_precision: Tensor  # [n, 6] of rotation (radians) and translation (world units), in the camera's own frame
    log_focal: Tensor  # [n] change against the start
    focal_precision: Tensor  # [n]
    centre_precision: float  # of the principal point at the start, pixels^-2
    path_precision: float  # of changes of velocity, in units of PRIOR_TURN and Problem.unit

    @classmethod
    def of_lenses(cls, lens: Lenses, path_precision: float) -> Beliefs:
        """Nothing about the poses."""
        n = len(lens.focal)
        eye, zeros = torch.eye(3, dtype=torch.float64).expand(n, 3, 3), torch.zeros(n, 6, dtype=torch.float64)
        believed = lens.log_focal, lens.log_focal_precision, lens.centre_precision
        return cls(eye, zeros[:, :3], zeros, *believed, path_precision)


@dataclass(frozen=True)
class Problem:
    """What stays while the unknowns move."""

    size: tuple[int, int]
    focal: Tensor  # [n, 2] float64 pixels at the start, along x and y
    centre: Tensor  # [n, 2] float64 pixels
    depth_precision: Tensor  # [n] float64, 1 / variance of log depth that is believed beforehand; 0: the pairs' own
    scaled: Tensor  # [n] float32: 0 for frames whose depth is known and has the world's unit already, else 1
    pairs: Tensor  # [P, 2]
    relative: RelativePoses
    surfaces: list[Surface]  # none where there is no flow
    beliefs: Beliefs
    free: Array  # [n, BLOCK] bool
    border_free: Array  # [BORDER] bool
    unit: float  # world units that PRIOR_SHARE of the median depth is
    ignore_px: float

    @property
    def num_frames(self) -> int:
        return len(self.focal)

    def cameras(self, state: State) -> Cameras:
        focal = self.focal * state.log_focal.exp()[:, None]
        return Cameras(state.rotation, state.translation, focal, self.centre + state.centre)

    # --- flow and depth ----------------------------------------------------------------------------------------------

    def seen(self, surface: Surface, state: State) -> Seen:
        shift = self.scaled * state.log_scale
        return surface.seen(self.cameras(state), state.correction, shift, self.ignore_px)

    def add_surfaces(self, normal: Normal | None, state: State, scatters: Scatters) -> float:
        cost = 0.0
        scatter = torch.tensor([scatters.flow_px, scatters.flow_px, scatters.log_depth])
        for surface in self.surfaces:
            seen = self.seen(surface, state)
            independent = min(1.0, self.size[0] * self.size[1] / PATCH_PX**2 / len(surface.log_depth))
            standard = seen.residual / scatter[:, None]
            squares = torch.stack([standard[:, :2].square().sum(dim=1), standard[:, 2].square()], dim=1)
            squares = torch.where(seen.usable[:, None], squares, 0.0) / CUTOFF**2
            cost += 0.5 * independent * CUTOFF**2 * float((squares / (1 + squares)).sum())
            if normal is None:
                continue
            robust = independent * seen.usable[:, None] / (1 + squares).square()  # [k, 2, M]
            weight = robust[:, [0, 0, 1]] / scatter[:, None].square()
            hessian, gradient = (part.double().numpy() for part in surface.normal(seen, weight, self.scaled))
            for row, second in enumerate(surface.matches.second.tolist()):
                normal.add((surface.matches.frame, second), hessian[row], gradient[row])
        return cost

    # --- what the pairs say of their cameras -------------------------------------------------------------------------

    def pair_residuals(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """[P, 6] rotation vector and translation of the second camera against what its pair says, in its own frame.

        Translations are in the pairs' common unit, for what the pairs say is what errs: in the world's, a smaller
        world would always fit better.  And the relative pose at ``state``, [P, 3, 3] and [P, 3].
        """
        a, b = self.pairs.T
        to_first = state.rotation[a].mT
        turn = to_first @ state.rotation[b]
        shift = (to_first @ (state.translation[b] - state.translation[a])[..., None])[..., 0] / np.exp(state.log_scale)
        back = self.relative.rotation.mT
        away = (back @ (shift - self.relative.translation)[..., None])[..., 0]
        return torch.cat([roma.rotmat_to_rotvec(back @ turn), away], dim=1), turn, shift

    def pair_covariance(self) -> tuple[Tensor, Tensor]:
        """[P, 6, 6] of a pair's relative pose, as its own pixels have it, in the common unit; [P] bool: it has one."""
        information = self.relative.information
        size = information.diagonal(dim1=1, dim2=2)
        known = (size.amin(dim=1) > 0) & (self.pairs[:, 0] != self.pairs[:, 1])
        information = torch.where(known[:, None, None], information + 1e-9 * torch.diag_embed(size), torch.eye(6))
        return torch.linalg.inv(information), known

    def add_pairs(self, normal: Normal, state: State, scatters: Scatters) -> float:
        residual, turn, shift = self.pair_residuals(state)
        covariance, known = self.pair_covariance()
        beyond = torch.tensor([scatters.turn**2] * 3 + [scatters.shift**2] * 3, dtype=torch.float64)
        precision = torch.linalg.inv(covariance + torch.diag(beyond)) * known[:, None, None]
        limit = 6 * CUTOFF**2  # the six numbers of a pair stand or fall together
        squares = torch.einsum("pi,pij,pj->p", residual, precision, residual) / limit
        back = self.relative.rotation.mT
        jacobian = torch.zeros(len(turn), 6, 2 * BLOCK + BORDER, dtype=torch.float64)
        jacobian[:, :3, :3] = -turn.mT
        jacobian[:, 3:, :3] = back @ cross(shift)
        jacobian[:, 3:, 3:6] = -back / np.exp(state.log_scale)
        jacobian[:, :3, BLOCK : BLOCK + 3] = torch.eye(3)
        jacobian[:, 3:, BLOCK + 3 : BLOCK + 6] = back @ turn / np.exp(state.log_scale)
        jacobian[:, 3:, 2 * BLOCK + SCALE] = -(back @ shift[..., None])[..., 0]
        weighted = jacobian.mT @ (precision / (1 + squares)[:, None, None])
        hessian, gradient = (weighted @ jacobian).numpy(), (weighted @ residual[..., None])[..., 0].numpy()
        for row in known.nonzero()[:, 0].tolist():
            normal.add(self.pairs[row].tolist(), hessian[row], gradient[row])
        return 0.5 * limit * float(squares.log1p().sum())

    # --- what is believed beforehand ---------------------------------------------------------------------------------

    def add_beliefs(self, normal: Normal, state: State, scatters: Scatters) -> float:
        beliefs, n = self.beliefs, self.num_frames
        turned = roma.rotmat_to_rotvec(beliefs.rotation.mT @ state.rotation)
        away = (state.rotation.mT @ (state.translation - beliefs.translation)[..., None])[..., 0]
        residual, precision = torch.zeros(2, n, BLOCK, dtype=torch.float64)
        residual[:, POSE], precision[:, POSE] = torch.cat([turned, away], dim=1), beliefs.pose_precision
        residual[:, KNOT], precision[:, KNOT] = (
            state.correction,
            1 / scatters.correction**2 + self.depth_precision[:, None],
        )
        residual[:, FOCAL], precision[:, FOCAL] = state.log_focal - beliefs.log_focal, beliefs.focal_precision
        for frame in range(n):
            hessian = np.zeros((BLOCK + BORDER, BLOCK + BORDER))
            np.fill_diagonal(hessian, precision[frame].numpy())
            gradient = np.append((precision * residual)[frame].numpy(), np.zeros(BORDER))
            shared = BLOCK + SHARED_FOCAL  # the border's focal length moves that of every frame
            hessian[[FOCAL, shared, shared], [shared, FOCAL, shared]] = hessian[FOCAL, FOCAL]
            gradient[shared] = gradient[FOCAL]
            normal.add([frame], hessian, gradient)
        centre = beliefs.centre_precision * np.asarray(state.centre)
        normal.border_gradient[CENTRE] += centre
        normal.corner[CENTRE, CENTRE] += beliefs.centre_precision * np.eye(2)
        return 0.5 * float((precision * residual.square()).sum() + (centre * state.centre.numpy()).sum())

    def add_path(self, normal: Normal, state: State) -> float:
        """Changes of velocity and of turning, in the world and in the camera's frame."""
        if self.beliefs.path_precision == 0 or self.num_frames < 3:
            return 0.0
        turn = state.rotation[:-1].mT @ state.rotation[1:]
        step = roma.rotmat_to_rotvec(turn)
        place = state.translation
        residual = torch.cat([step[:-1] - step[1:], place[:-2] - 2 * place[1:-1] + place[2:]], dim=1)
        jacobian = torch.zeros(self.num_frames - 2, 6, 3 * BLOCK, dtype=torch.float64)
        before, now, after = (jacobian[:, :, i * BLOCK : i * BLOCK + 6] for i in range(3))
        before[:, :3, :3], before[:, 3:, 3:] = -turn[:-1].mT, state.rotation[:-2]
        now[:, :3, :3], now[:, 3:, 3:] = torch.eye(3) + turn[1:].mT, -2 * state.rotation[1:-1]
        after[:, :3, :3], after[:, 3:, 3:] = -torch.eye(3), state.rotation[2:]
        unit = torch.tensor([PRIOR_TURN**-2] * 3 + [self.unit**-2] * 3, dtype=torch.float64)
        weighted = jacobian.mT * (self.beliefs.path_precision * unit)
        hessian, gradient = (weighted @ jacobian).numpy(), (weighted @ residual[..., None])[..., 0].numpy()
        for i in range(self.num_frames - 2):
            normal.add([i, i + 1, i + 2], hessian[i], gradient[i])
        return 0.5 * self.beliefs.path_precision * float((unit * residual.square()).sum())

    # --- all of it ---------------------------------------------------------------------------------------------------

    def linearised(self, state: State, scatters: Scatters) -> tuple[Normal, float]:
        """The normal equations at ``state`` and the cost there."""
        normal = Normal(self.num_frames)
        return normal, self.add_surfaces(normal, state, scatters) + self.add_others(normal, state, scatters)

    def cost(self, state: State, scatters: Scatters) -> float:
        """The same cost, without the work of the surfaces' derivatives."""
        others = self.add_others(Normal(self.num_frames), state, scatters)
        return self.add_surfaces(None, state, scatters) + others

    def add_others(self, normal: Normal, state: State, scatters: Scatters) -> float:
        cost = self.add_pairs(normal, state, scatters) + self.add_beliefs(normal, state, scatters)
        return cost + self.add_path(normal, state)

    def measured(self, state: State, scatters: Scatters) -> Scatters:
        """The scatters of what is left at ``state``."""
        residual, *_ = self.pair_residuals(state)
        covariance, known = self.pair_covariance()
        if known.any():
            count = int(known.sum())
            freedom = count / max(count - self.num_frames + 1, 1)

            def beyond(part: slice) -> float:
                left = freedom * float(residual[known, part].square().sum(dim=1).median()) / MEDIAN_3
                own = float(covariance[known, part, part].diagonal(dim1=1, dim2=2).mean(dim=1).median())
                return float(max(left - 1.5 * own, 1e-14) ** 0.5)

            scatters = replace(scatters, turn=beyond(slice(0, 3)), shift=beyond(slice(3, 6)))
        if self.surfaces:
            seen = [self.seen(surface, state) for surface in self.surfaces]
            flow = torch.cat([s.residual[:, :2].square().sum(dim=1)[s.usable] for s in seen])
            depth = torch.cat([s.residual[:, 2].abs()[s.usable] for s in seen])
            if len(flow):
                scatters = replace(
                    scatters,
                    flow_px=max(float((flow.median() / MEDIAN_2).sqrt()), LEAST_FLOW_PX),
                    log_depth=max(1.4826 * float(depth.median()), LEAST_DEPTH),
                )
        return scatters


def adjust(problem: Problem, state: State, scatters: Scatters) -> tuple[State, Scatters]:
    """Levenberg-Marquardt; between its rounds the scatters are measured anew."""
    for steps_of_round in ROUNDS:
        scatters = problem.measured(state, scatters)
        (normal, cost), damping = problem.linearised(state, scatters), 1e-6
        for left in reversed(range(steps_of_round)):
            try:
                steps = normal.solve(problem.free, problem.border_free, damping)
            except np.linalg.LinAlgError:  # pairs that agree to the last digit are surer than this arithmetic
                damping = max(100 * damping, 1e-4)
                continue
            tried = state.moved(*steps)
            found, new_cost = problem.linearised(tried, scatters) if left else (normal, problem.cost(tried, scatters))
            if not new_cost <= cost:
                damping = max(100 * damping, 1e-4)
                continue
            state, normal, cost, damping = tried, found, new_cost, damping / 10
            if max(float(np.abs(part).max()) for part in steps) < CONVERGED:
                break
    return state, scatters

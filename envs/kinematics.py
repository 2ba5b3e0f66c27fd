"""Where the tool is told to go, and the joint angles that take it there: for one env on the CPU, for rows of a batch.

`added_pose` is ManiSkill's `compute_target_pose` for one env in a tenth of its time, bit for bit the same.

`ToolChain` is the arm as ManiSkill simulates it (frames are PhysX's, not the URDF's), forwards and backwards, in torch,
for any number of rows on any device. ManiSkill 3.0.1 uses two different solvers: on the CPU pinocchio's, which iterates
until the tool is within 1e-4 (m and rad, one norm) and gives up otherwise; on the GPU one Levenberg-Marquardt step,
whose tool ends up to 4 mm elsewhere. A policy should not find another arm on the GPU than on the CPU, so
`ToolChain.solve` gives what the CPU's solver gives.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.utils.structs.articulation import Articulation

# of pinocchio's solver as ManiSkill calls it: every iteration leaves 0.9 of the error, at most 100 of them
CLOSE_ENOUGH, LEFT_PER_ITERATION, MAX_ITERATIONS, DAMPING = 1e-4, 0.9, 100, 1e-6
NEWTON_STEPS, MAX_TURN = 12, 0.5  # steps of ours, and the most that a joint turns in one of them (rad)
SOLVED = 1e-6  # what our steps may leave


# ---------------------------------------------------------------------------------------------------------------------
# one env
# ---------------------------------------------------------------------------------------------------------------------


def added_pose(pose: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Translation and rotation of `action` added along and about the axes of the root: float32 [1, 7], p and q (wxyz).

    pose float32 [1, 7], p and q; action float32 [1, >= 6], metres and Euler angles (rad, XYZ), each within +-pi/2.
    The same float32 operations in the same order as ManiSkill's, on plain numbers: on tensors of a few entries nearly
    all time is torch's overhead per call. Sines, roots and the last product stay torch's, which rounds in its own way.
    """
    (cx, cy, cz), (sx, sy, sz) = torch.cos(action[0, 3:6]).numpy(), torch.sin(action[0, 3:6]).numpy()
    zero, one = np.float32(0), np.float32(1)
    about_xy = np.array([[[cy, zero, sy], [sx * sy, cx, -sx * cy], [-cx * sy, sx, cx * cy]]], np.float32)
    about_z = np.array([[[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]]], np.float32)
    turn = _quaternion(torch.matmul(torch.from_numpy(about_xy), torch.from_numpy(about_z))[0].numpy())
    position = pose[0, :3].numpy() + action[0, :3].numpy()
    return torch.from_numpy(np.concatenate([position, _product(turn, pose[0, 3:].numpy())])[None])


def _quaternion(matrix: np.ndarray) -> list[np.float32]:
    """wxyz of a rotation matrix float32 [3, 3]: of four ways to compute it, the one with the largest divisor."""
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = matrix
    squares = [1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22]
    size = torch.sqrt(torch.from_numpy(np.maximum(squares, np.float32(0)))).numpy()
    i = max(range(4), key=lambda k: size[k])
    candidate = [
        lambda: [size[0] * size[0], m21 - m12, m02 - m20, m10 - m01],
        lambda: [m21 - m12, size[1] * size[1], m10 + m01, m02 + m20],
        lambda: [m02 - m20, m10 + m01, size[2] * size[2], m12 + m21],
        lambda: [m10 - m01, m20 + m02, m21 + m12, size[3] * size[3]],
    ][i]()
    quaternion = [x / (2 * size[i]) for x in candidate]
    return [-x for x in quaternion] if quaternion[0] < 0 else quaternion


def _product(a, b) -> np.ndarray:
    """Quaternion a b with a real part that is not negative, float32 [4]."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    product = np.array(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )
    return -product if product[0] < 0 else product


# ---------------------------------------------------------------------------------------------------------------------
# rows of a batch
# ---------------------------------------------------------------------------------------------------------------------


def rotation_matrix(q: torch.Tensor) -> torch.Tensor:
    """[..., 3, 3] of unit quaternions wxyz [..., 4]."""
    w, x, y, z = q.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
    return torch.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)


def rotation_vector(matrix: torch.Tensor) -> torch.Tensor:
    """Axis times angle (rad) [..., 3] of rotation matrices [..., 3, 3]; angles below pi."""
    twice_sine = torch.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        -1,
    )
    sine = torch.linalg.vector_norm(twice_sine, dim=-1) / 2
    cosine = (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    angle = torch.atan2(sine, cosine)
    small = sine < 1e-12
    return twice_sine * torch.where(small, 0.5, angle / (2 * sine.masked_fill(small, 1.0)))[..., None]


def turned_by(vector: torch.Tensor) -> torch.Tensor:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] (Rodrigues)."""
    angle = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    half = angle / 2
    xyz = vector * torch.where(angle < 1e-12, 0.5, torch.sin(half) / angle.masked_fill(angle < 1e-12, 1.0))
    return rotation_matrix(torch.cat([torch.cos(half), xyz], -1))


class ToolChain:
    """The joints between root and tool, by rows. R rows, J joints; poses are relative to the root, all float64."""

    def __init__(self, articulation: Articulation, tool: str, device: torch.device):
        joints = []
        link = articulation.links_map[tool]
        while link.joint.parent_link is not None:
            joints.append(link.joint)
            link = link.joint.parent_link
        fixed = [np.eye(4)]  # before the first joint that turns, between joints, after the last
        self.indices: list[int] = []  # of these joints among the articulation's active ones
        for joint in reversed(joints):
            of_robot = joint._objs[0]
            fixed[-1] = fixed[-1] @ _matrix(of_robot.pose_in_parent)
            if of_robot.type not in ("revolute", "revolute_unwrapped", "fixed"):
                raise ValueError(f"joint {joint.name} between root and {tool} is {of_robot.type}: it has to turn.")
            if of_robot.type != "fixed":
                self.indices.append(int(joint.active_index[0]))
                fixed.append(np.eye(4))
            fixed[-1] = fixed[-1] @ np.linalg.inv(_matrix(of_robot.pose_in_child))
        self._fixed = torch.tensor(np.array(fixed), device=device)  # [J + 1, 4, 4]

    def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [R, J] (rad) -> position [R, 3], rotation matrix [R, 3, 3], Jacobian [R, 6, J] (m and rad per rad)."""
        rotation, position = self._fixed[0, :3, :3].expand(len(q), 3, 3), self._fixed[0, :3, 3].expand(len(q), 3)
        axes, origins = [], []
        for j, (cosine, sine) in enumerate(zip(torch.cos(q).unbind(1), torch.sin(q).unbind(1))):
            x, y, z = rotation.unbind(-1)  # a joint turns about the x axis of its frame
            axes.append(x)
            origins.append(position)
            c, s = cosine[:, None], sine[:, None]
            turned = torch.stack([x, c * y + s * z, c * z - s * y], -1)
            position = position + turned @ self._fixed[j + 1, :3, 3]
            rotation = turned @ self._fixed[j + 1, :3, :3]
        axis, origin = torch.stack(axes, -1), torch.stack(origins, -1)  # [R, 3, J]
        linear = torch.linalg.cross(axis, position[:, :, None] - origin, dim=1)
        return position, rotation, torch.cat([linear, axis], dim=1)

    def solve(self, pose: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles that bring the tool to `pose`, as pinocchio's solver on the CPU would leave them.

        That solver goes straight at the target, and stops as soon as less than 1e-4 is left: 0.9^k of the error that
        it began with. Where it stops is known beforehand, and Newton's method gets there in a few steps.

        Args: pose [R, 7], p and q (wxyz); q [R, J], where to start.
        Returns: angles float64 [R, J]; bool [R], whether they are a solution (else the tool can not get there).
        """
        goal_position, goal_rotation = pose[:, :3].double(), rotation_matrix(pose[:, 3:].double())
        q = q.double()
        position, rotation, jacobian = self.forward(q)
        apart = torch.cat([goal_position - position, rotation_vector(goal_rotation @ rotation.mT)], -1)  # [R, 6]
        error = _screw_norm(rotation, apart)
        count = torch.ceil(torch.log(CLOSE_ENOUGH / error.clamp(min=1e-30)) / np.log(LEFT_PER_ITERATION)).clamp(min=0)
        left = LEFT_PER_ITERATION**count
        goal_position = goal_position - left[:, None] * apart[:, :3]
        goal_rotation = turned_by(-left[:, None] * apart[:, 3:]) @ goal_rotation
        damping = DAMPING * torch.eye(6, dtype=q.dtype, device=q.device)
        for _ in range(NEWTON_STEPS):
            error = torch.cat([goal_position - position, rotation_vector(goal_rotation @ rotation.mT)], -1)
            solution, _ = torch.linalg.solve_ex(jacobian @ jacobian.mT + damping, error[..., None])
            step = (jacobian.mT @ solution)[..., 0]
            q = q + step * (MAX_TURN / step.abs().amax(1, keepdim=True).clamp(min=MAX_TURN))
            position, rotation, jacobian = self.forward(q)
        error = torch.cat([goal_position - position, rotation_vector(goal_rotation @ rotation.mT)], -1)
        return q, (torch.linalg.vector_norm(error, dim=-1) < SOLVED) & (count < MAX_ITERATIONS)


def _matrix(pose: sapien.Pose) -> np.ndarray:
    """float64 [4, 4]; through float64 all the way, so that products of many stay rigid."""
    matrix = np.eye(4)
    q = torch.tensor(np.asarray(pose.q), dtype=torch.float64)
    matrix[:3, :3] = rotation_matrix(q / torch.linalg.vector_norm(q)).numpy()
    matrix[:3, 3] = pose.p
    return matrix


def _screw_norm(rotation: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Length [R] of the screw motion over `apart` [R, 6], in the tool's frame: what pinocchio compares with 1e-4.

    Its linear part is V(w)^-1 p with V the left Jacobian of SO(3) (Barfoot 2017, State Estimation for Robotics, 7.1.3).
    """
    p, w = (rotation.mT @ part[..., None] for part in (apart[:, :3], apart[:, 3:]))
    p, w = p[..., 0], w[..., 0]
    angle = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    safe = angle.clamp(min=1e-6)
    factor = torch.where(angle < 1e-3, 1 / 12, 1 / safe**2 - (1 + torch.cos(safe)) / (2 * safe * torch.sin(safe)))
    cross = torch.linalg.cross(w, p, dim=-1)
    linear = p - cross / 2 + factor * torch.linalg.cross(w, cross, dim=-1)
    return torch.linalg.vector_norm(torch.cat([linear, w], -1), dim=-1)


class BatchedPoseController(PDEEPoseController):
    """ManiSkill's controller of the tool's pose, with one solver on every device and without a loop over envs."""

    def _initialize_joints(self) -> None:
        super()._initialize_joints()
        self._chain = ToolChain(self.articulation, self.config.ee_link, self.device)

    def set_action(self, action: torch.Tensor) -> None:
        """action float32 [N, 6]: metres and Euler angles (rad, XYZ), added to the pose commanded so far."""
        self._target_pose = self.compute_target_pose(self._target_pose, action)
        start = self.articulation.get_qpos()[:, self._chain.indices]
        angles, solved = self._chain.solve(self._target_pose.raw_pose, start)
        self.set_drive_targets(torch.where(solved[:, None], angles.to(start.dtype), start))  # else stay

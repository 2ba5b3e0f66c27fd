"""The pose that an action commands and the joint angles that reach it, for one env or for the rows of a batch.

`added_pose` is ManiSkill's `compute_target_pose` for one env, with the same bits in a tenth of the time.

`ToolChain` holds the arm's forward and inverse kinematics in torch, for any number of rows on any device. Its frames
are PhysX's, not the URDF's. ManiSkill 3.0.1 has two solvers. On the CPU it uses pinocchio's, which iterates until the
tool is within 1e-4 (m and rad in one norm) and gives up otherwise. On the GPU it takes one Levenberg-Marquardt step,
whose tool ends up to 4 mm away. A policy should find the same arm on both, so `ToolChain.solve` gives the answers of
the CPU's solver.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.utils.structs.articulation import Articulation

from envs.rotations import matrix_entries

# pinocchio's solver as ManiSkill calls it
CLOSE_ENOUGH = 1e-4  # it stops below this error
LEFT_PER_ITERATION = 0.9  # share of the error that one iteration leaves
MAX_ITERATIONS = 100
DAMPING = 1e-6
# our solver
NEWTON_STEPS = 12
MAX_TURN = 0.5  # rad that a joint turns at most in one step
SOLVED = 1e-6  # error that a solution may have


# ---------------------------------------------------------------------------------------------------------------------
# one env
# ---------------------------------------------------------------------------------------------------------------------


def added_pose(pose: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Move `pose` by `action`, along and about the axes of the root: float32 [1, 7], p and q (wxyz).

    pose is float32 [1, 7], p and q. action is float32 [1, >= 6], metres and Euler angles (rad, XYZ) within +-pi/2.

    These are the same float32 operations in the same order as ManiSkill's, on plain numbers. On tensors of a few
    entries nearly all time is torch's overhead per call. Sines, roots and the last matrix product stay torch's, because
    they are rounded differently elsewhere.
    """
    angles = action[0, 3:6]
    cx, cy, cz = torch.cos(angles).numpy()
    sx, sy, sz = torch.sin(angles).numpy()
    zero, one = np.float32(0), np.float32(1)
    about_xy = np.array([[[cy, zero, sy], [sx * sy, cx, -sx * cy], [-cx * sy, sx, cx * cy]]], np.float32)
    about_z = np.array([[[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]]], np.float32)
    about_xyz = torch.matmul(torch.from_numpy(about_xy), torch.from_numpy(about_z))[0].numpy()
    position = pose[0, :3].numpy() + action[0, :3].numpy()
    rotation = _product(_quaternion(about_xyz), pose[0, 3:].numpy())
    return torch.from_numpy(np.concatenate([position, rotation])[None])


def _quaternion(matrix: np.ndarray) -> list[np.float32]:
    """wxyz of a rotation matrix float32 [3, 3]. Of the four ways to compute it, take the one with the largest divisor.

    2 |w|, 2 |x|, 2 |y| and 2 |z| follow from the diagonal. The largest of them divides the other three entries.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = matrix
    squares = [1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22]
    size = torch.sqrt(torch.from_numpy(np.maximum(squares, np.float32(0)))).numpy()
    w, x, y, z = size
    largest = max(range(4), key=lambda k: size[k])
    if largest == 0:
        scaled = [w * w, m21 - m12, m02 - m20, m10 - m01]
    elif largest == 1:
        scaled = [m21 - m12, x * x, m10 + m01, m02 + m20]
    elif largest == 2:
        scaled = [m02 - m20, m10 + m01, y * y, m12 + m21]
    else:
        scaled = [m10 - m01, m20 + m02, m21 + m12, z * z]
    quaternion = [entry / (2 * size[largest]) for entry in scaled]
    return [-entry for entry in quaternion] if quaternion[0] < 0 else quaternion


def _product(a: Sequence[np.float32] | np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product a b of two quaternions wxyz, with a real part that is not negative: float32 [4]."""
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
    rows = matrix_entries(*q.unbind(-1))
    return torch.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)


def rotation_vector(matrix: torch.Tensor) -> torch.Tensor:
    """Axis times angle (rad) [..., 3] of rotation matrices [..., 3, 3] whose angles are below pi."""
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
    safe_sine = sine.masked_fill(small, 1.0)
    factor = torch.where(small, 0.5, angle / (2 * safe_sine))
    return twice_sine * factor[..., None]


def turned_by(vector: torch.Tensor) -> torch.Tensor:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3], by way of quaternions."""
    angle = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    half = angle / 2
    small = angle < 1e-12
    safe_angle = angle.masked_fill(small, 1.0)
    xyz = vector * torch.where(small, 0.5, torch.sin(half) / safe_angle)
    return rotation_matrix(torch.cat([torch.cos(half), xyz], -1))


class ToolChain:
    """The joints between root and tool. R rows, J joints. Poses are relative to the root, all float64."""

    def __init__(self, articulation: Articulation, tool: str, device: torch.device):
        """Raises ValueError for a joint that does not turn."""
        joints = []  # from the tool to the root
        link = articulation.links_map[tool]
        while link.joint.parent_link is not None:
            joints.append(link.joint)
            link = link.joint.parent_link
        fixed = [np.eye(4)]  # transforms before the first turning joint, between the joints, and after the last
        self.indices: list[int] = []  # of the turning joints among the articulation's active ones
        for joint in reversed(joints):
            physx_joint = joint._objs[0]
            if physx_joint.type not in ("revolute", "revolute_unwrapped", "fixed"):
                raise ValueError(f"joint {joint.name} between root and {tool} is {physx_joint.type}: it has to turn.")
            fixed[-1] = fixed[-1] @ _matrix(physx_joint.pose_in_parent)
            if physx_joint.type != "fixed":
                self.indices.append(int(joint.active_index[0]))
                fixed.append(np.eye(4))
            fixed[-1] = fixed[-1] @ np.linalg.inv(_matrix(physx_joint.pose_in_child))
        self._fixed = torch.tensor(np.array(fixed), device=device)  # [J + 1, 4, 4]

    def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pose and geometric Jacobian of the tool at joint angles q [R, J] (rad).

        Returns: position [R, 3], rotation matrix [R, 3, 3], Jacobian [R, 6, J] (m and rad per rad).
        """
        num_rows = len(q)
        rotation = self._fixed[0, :3, :3].expand(num_rows, 3, 3)
        position = self._fixed[0, :3, 3].expand(num_rows, 3)
        axes, origins = [], []  # of each joint, [R, 3]
        for j, (cosine, sine) in enumerate(zip(torch.cos(q).unbind(1), torch.sin(q).unbind(1))):
            x, y, z = rotation.unbind(-1)  # a joint turns about the x axis of its frame
            axes.append(x)
            origins.append(position)
            c, s = cosine[:, None], sine[:, None]
            turned = torch.stack([x, c * y + s * z, c * z - s * y], -1)  # [R, 3, 3]
            fixed_rotation, offset = self._fixed[j + 1, :3, :3], self._fixed[j + 1, :3, 3]
            position = position + turned @ offset
            rotation = turned @ fixed_rotation
        angular = torch.stack(axes, -1)  # [R, 3, J]
        lever = position[:, :, None] - torch.stack(origins, -1)  # [R, 3, J]
        linear = torch.linalg.cross(angular, lever, dim=1)
        return position, rotation, torch.cat([linear, angular], dim=1)

    def solve(self, pose: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint angles that bring the tool to `pose`, as pinocchio's solver on the CPU leaves them.

        That solver goes straight to the target. It stops as soon as the error is below 1e-4, which is when 0.9^k of
        the first error is left. So the place where it stops is known, and Newton's method gets there in a few steps.

        Args:
            pose: [R, 7], p and q (wxyz).
            q: [R, J], the angles to start from.

        Returns:
            angles float64 [R, J].
            solved bool [R]: False where the tool cannot get there.
        """
        q = q.double()
        goal_position, goal_rotation = pose[:, :3].double(), rotation_matrix(pose[:, 3:].double())
        position, rotation, jacobian = self.forward(q)
        first_error = _pose_error(goal_position, goal_rotation, position, rotation)  # [R, 6]

        # where pinocchio stops
        ratio = CLOSE_ENOUGH / _screw_norm(rotation, first_error).clamp(min=1e-30)
        iterations = torch.ceil(torch.log(ratio) / np.log(LEFT_PER_ITERATION)).clamp(min=0)  # [R]
        left = LEFT_PER_ITERATION ** iterations[:, None]  # share of the error that it leaves, [R, 1]
        goal_position = goal_position - left * first_error[:, :3]
        goal_rotation = turned_by(-left * first_error[:, 3:]) @ goal_rotation

        damping = DAMPING * torch.eye(6, dtype=q.dtype, device=q.device)
        for _ in range(NEWTON_STEPS):
            error = _pose_error(goal_position, goal_rotation, position, rotation)
            solution, _ = torch.linalg.solve_ex(jacobian @ jacobian.mT + damping, error[..., None])
            step = (jacobian.mT @ solution)[..., 0]  # [R, J]
            largest = step.abs().amax(1, keepdim=True)
            q = q + step * (MAX_TURN / largest.clamp(min=MAX_TURN))
            position, rotation, jacobian = self.forward(q)
        error = _pose_error(goal_position, goal_rotation, position, rotation)
        reached = torch.linalg.vector_norm(error, dim=-1) < SOLVED
        return q, reached & (iterations < MAX_ITERATIONS)


def _pose_error(
    goal_position: torch.Tensor, goal_rotation: torch.Tensor, position: torch.Tensor, rotation: torch.Tensor
) -> torch.Tensor:
    """Translation (m) and rotation vector (rad) from the present pose to the goal, [R, 6]."""
    return torch.cat([goal_position - position, rotation_vector(goal_rotation @ rotation.mT)], -1)


def _matrix(pose: sapien.Pose) -> np.ndarray:
    """The pose as a matrix, float64 [4, 4]. All of it is computed in float64, so that products of many stay rigid."""
    matrix = np.eye(4)
    q = torch.tensor(np.asarray(pose.q), dtype=torch.float64)
    matrix[:3, :3] = rotation_matrix(q / torch.linalg.vector_norm(q)).numpy()
    matrix[:3, 3] = pose.p
    return matrix


def _screw_norm(rotation: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Length [R] of the screw motion over `error` [R, 6], in the tool's frame. pinocchio compares it with 1e-4.

    Its linear part is V(w)^-1 p with V the left Jacobian of SO(3) (Barfoot 2017, State Estimation for Robotics, 7.1.3).
    """
    to_tool = rotation.mT
    p = (to_tool @ error[:, :3, None])[..., 0]  # [R, 3]
    w = (to_tool @ error[:, 3:, None])[..., 0]
    angle = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    safe = angle.clamp(min=1e-6)
    exact = 1 / safe**2 - (1 + torch.cos(safe)) / (2 * safe * torch.sin(safe))
    factor = torch.where(angle < 1e-3, 1 / 12, exact)
    cross = torch.linalg.cross(w, p, dim=-1)
    linear = p - cross / 2 + factor * torch.linalg.cross(w, cross, dim=-1)
    return torch.linalg.vector_norm(torch.cat([linear, w], -1), dim=-1)


class BatchedPoseController(PDEEPoseController):
    """ManiSkill's controller of the tool's pose, with one solver for every device and without a loop over envs."""

    def _initialize_joints(self) -> None:
        super()._initialize_joints()
        self._chain = ToolChain(self.articulation, self.config.ee_link, self.device)

    def set_action(self, action: torch.Tensor) -> None:
        """action float32 [N, 6]: metres and Euler angles (rad, XYZ), added to the pose commanded so far.

        Where the new pose is out of reach, the arm stays as it is.
        """
        self._target_pose = self.compute_target_pose(self._target_pose, action)
        start = self.articulation.get_qpos()[:, self._chain.indices]
        angles, solved = self._chain.solve(self._target_pose.raw_pose, start)
        self.set_drive_targets(torch.where(solved[:, None], angles.to(start.dtype), start))

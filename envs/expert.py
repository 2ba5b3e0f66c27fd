"""A scripted pick-and-place from state: for tests, for demonstrations, and to know that the task can be done.

    experts = [Expert() for _ in range(envs.num_envs)]
    actions = np.stack([expert(state) for expert, state in zip(experts, envs.describe())])[:, None]  # [N, 1, 7]

No planner: straight lines between a few poses, at most `max_translation` metres and `max_rotation` radians per step.
The controller adds deltas to the pose it was last commanded to, so the expert keeps that pose, not the measured one,
which lags behind by up to 3 cm. A picture shows the measured one: demonstrations for a policy that sees one frame are
made with measured=True.
"""

from __future__ import annotations

import numpy as np

TIP_BELOW_TOOL = 0.0154  # the fingers reach this far below ee_gripper_link (m)
BAR_ABOVE_TOOL = 0.0395  # the bar between the fingers is this far above it
GRIP_WIDTH = 0.051  # the widest thing that fits between open fingers
TABLE_HEIGHT = 0.8695
CLEARANCE = 0.004  # kept to table and bar
OPEN, CLOSE = 1.0, 0.0  # the env opens above 0.5
# measured=True: the share of what is missing that a step asks for, since the arm is still on its way to what was asked
# before (of 120 tries 0.5, 0.7 and 1 all succeed in 0.98, in 25, 21 and 21 steps; 1 swings over)
GAIN = 0.7


def rotation_matrix(q) -> np.ndarray:
    """[3, 3] of a unit quaternion wxyz."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


class Expert:
    """One per env; starts over by itself when `elapsed_steps` is 0."""

    def __init__(
        self,
        max_translation: float = 0.025,
        max_rotation: float = 0.2,
        close_steps: int = 2,
        patience: int = 6,
        slack: float = 0.0,
        measured: bool = False,
    ):
        """close_steps: how long the fingers close before they lift. patience: how many steps it waits at most for the
        arm, which lags behind. slack: metres by which a goal may be missed besides, where actions are noisy. measured:
        act on where the arm is, not on where it was sent."""
        self.max_translation, self.max_rotation = max_translation, max_rotation
        self.close_steps, self.patience, self.slack = close_steps, patience, slack
        self.measured, self.gain = measured, GAIN if measured else 1.0
        self.phase = None  # the method that knows what to do now

    def __call__(self, state: dict) -> np.ndarray:
        """state: one entry of `VectorEnv.describe()`. Returns an action, float32 [7], robot units."""
        begins = state["elapsed_steps"] == 0 or self.phase is None
        if begins or self.measured:
            self.commanded = np.asarray(state["tcp_pose"][:3])
            tool = rotation_matrix(state["tcp_pose"][3:])
            self.finger_angle = np.arctan2(tool[1, 1], tool[0, 1])
        if begins:
            self.seen_xy = np.asarray(state["object_pose"][:2])
            self.phase = self._hover
        goal, gripper = self.phase(state)
        self.seen_xy = np.asarray(state["object_pose"][:2])
        return self._toward(goal, gripper)

    def _look(self, state: dict) -> None:
        """Where to grasp, from where the object lies now; a rolling one is met where it will be a step later."""
        rotation, position = rotation_matrix(state["object_pose"][3:]), np.asarray(state["object_pose"][:3])
        lower, upper = np.asarray(state["object_bbox"])
        center = (lower + upper) / 2
        if state["object_grasp"] is not None:
            center[:2] = state["object_grasp"]
        rolled = position[:2] - self.seen_xy
        rolled = rolled if np.linalg.norm(rolled) < 0.03 else 0.0  # farther in one step: it was put there
        self.grasp_xy = (position + rotation @ center)[:2] + 1.5 * rolled
        half_height = np.abs(rotation[2]) @ (upper - lower) / 2
        top = (position + rotation @ ((lower + upper) / 2))[2] + half_height
        self.grasp_z = max(TABLE_HEIGHT + TIP_BELOW_TOOL + CLEARANCE, top - BAR_ABOVE_TOOL + CLEARANCE)
        self.hover_z = max(top + TIP_BELOW_TOOL + 0.02, self.grasp_z + 0.04)
        self.object_z = position[2]
        self.yaw_left = self._yaw_to(rotation, upper - lower)

    def _yaw_to(self, rotation: np.ndarray, size: np.ndarray) -> float:
        """How far to turn about the vertical so that the fingers close where the object's box is narrow."""
        choices = []
        for axis in range(3):
            direction = np.array([*rotation[:2, axis], 0.0])
            length = np.linalg.norm(direction)
            if length < 0.3:  # upright: no way to close along
                continue
            width = np.abs(direction / length @ rotation) @ size
            turn = np.arctan2(direction[1], direction[0]) - self.finger_angle
            turn = (turn + np.pi / 2) % np.pi - np.pi / 2  # the two fingers are alike
            # what fits; among that the narrower, unless much turning is saved
            choices.append((width > GRIP_WIDTH, width + 0.01 * abs(turn), turn))
        return min(choices)[2] if choices else 0.0

    def drift(self, offset: np.ndarray) -> None:
        """The arm was sent `offset` (m, root frame, [3]) beside the last action: noise that the next actions undo."""
        self.commanded = self.commanded + offset * (-1.0, -1.0, 1.0)

    # phases: each returns (goal position [3], gripper) and moves on when its goal is reached

    def _hover(self, state: dict):
        self._look(state)
        goal = np.array([*self.grasp_xy, self.hover_z])
        if self._reached(goal, 0.01) and abs(self.yaw_left) < 0.05:
            self.phase, self.ticks = self._descend, 0
            return self._descend(state)
        return goal, OPEN

    def _descend(self, state: dict):
        self._look(state)
        self.yaw_left = 0.0
        goal = np.array([*self.grasp_xy, self.grasp_z])
        if np.linalg.norm(goal[:2] - self.commanded[:2]) > 0.03:  # it is not there any more
            self.phase = self._hover
            return self._hover(state)
        self.ticks += 1
        arrived = abs(state["tcp_pose"][2] - self.grasp_z) < 0.003 or self.ticks > self.patience  # the arm lags behind
        if self._reached(goal, 0.003) and arrived:
            self.phase, self.ticks = self._close, 0
            return self._close(state)
        return goal, OPEN

    def _close(self, state: dict):
        self.ticks += 1
        if self.ticks > self.close_steps:
            self.phase = self._lift
            return self._lift(state)
        return self.commanded, CLOSE

    def _lift(self, state: dict):
        goal = np.array([*self.grasp_xy, self.grasp_z + 0.05])
        if not self._reached(goal):
            return goal, CLOSE
        if state["object_pose"][2] < self.object_z + 0.02:  # it slipped: try again
            self.phase = self._hover
            return self._hover(state)
        self.phase = self._carry
        return self._carry(state)

    def _carry(self, state: dict):
        held = np.asarray(state["object_pose"][:2]) - np.asarray(state["tcp_pose"][:2])
        goal = np.array([*(np.asarray(state["receptacle_pose"][:2]) - held), self.grasp_z + 0.05])
        self.ticks += 1
        if np.linalg.norm(goal[:2] - self.commanded[:2]) < 0.006 or self.ticks > 40:
            self.phase, self.ticks = self._lower, 0
            return self._lower(state)
        return goal, CLOSE

    def _lower(self, state: dict):
        """Down until it touches (the env ends the episode there); when that is overdue, let go and try again."""
        self.ticks += 1
        if self.ticks > 5:
            self.phase, self.ticks = self._release, 0
            return self._release(state)
        return np.array([*self.commanded[:2], max(self.commanded[2] - 0.015, self.grasp_z + 0.002)]), CLOSE

    def _release(self, state: dict):
        self.ticks += 1
        if self.ticks > 2:
            up = np.array([*self.commanded[:2], self.hover_z + 0.03])
            if not self._reached(up):
                return up, OPEN
            self.phase = self._hover
            return self._hover(state)
        return self.commanded, OPEN

    def _reached(self, goal: np.ndarray, tolerance: float = 1e-4) -> bool:
        return bool(np.linalg.norm(goal - self.commanded) < tolerance + self.slack)

    def _toward(self, goal: np.ndarray, gripper: float) -> np.ndarray:
        """One bounded step. The root frame is yawed by 180 degrees: root x, y = -(world x, y)."""
        delta = self.gain * (goal - self.commanded)
        delta *= min(1.0, self.max_translation / max(np.linalg.norm(delta), 1e-9))
        turn = 0.0
        if self.phase == self._hover:
            turn = float(np.clip(self.gain * self.yaw_left, -self.max_rotation, self.max_rotation))
        self.commanded = self.commanded + delta
        self.finger_angle += turn
        return np.array([-delta[0], -delta[1], delta[2], 0.0, 0.0, turn, gripper], np.float32)

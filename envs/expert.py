"""A scripted expert that picks and places from the simulator's state, for demonstrations, tests and evaluation.

    experts = [Expert() for _ in range(envs.num_envs)]
    actions = np.stack([expert(state) for expert, state in zip(experts, envs.describe())])[:, None]  # [N, 1, 7]

It does not plan. It moves in straight lines between a few poses, at most `max_translation` metres and `max_rotation`
radians per step. The controller adds actions to the pose that was commanded last. So the expert keeps that commanded
pose, and not the measured one, which lags behind by up to 3 cm. An image shows the measured pose: use measured=True to
record demonstrations for a policy that sees one frame.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.assets.catalog import TABLE_HEIGHT
from envs.rotations import rotation_matrix

TIP_BELOW_TOOL = 0.0154  # m that the fingers reach below ee_gripper_link
BAR_ABOVE_TOOL = 0.0395  # m from there up to the bar between the fingers
GRIP_WIDTH = 0.051  # m, the widest object that fits between open fingers
CLEARANCE = 0.004  # m between fingers and table, and between object and bar
OPEN, CLOSE = 1.0, 0.0  # the env opens above 0.5
# With measured=True a step asks for this share of the way to the goal, because the arm is still moving from the step
# before. Success was 0.98 of 120 tries with 0.5, 0.7 and 1, in 25, 21 and 21 steps. With 1 the arm overshoots.
GAIN = 0.7


class Expert:
    """The expert of one env. It starts over when `elapsed_steps` is 0.

    Each phase of the motion is a method, from `_hover` to `_release`.
    """

    def __init__(
        self,
        max_translation: float = 0.025,
        max_rotation: float = 0.2,
        close_steps: int = 2,
        patience: int = 6,
        slack: float = 0.0,
        measured: bool = False,
    ):
        """Set limits and waiting times.

        Args:
            max_translation: metres per step.
            max_rotation: radians per step.
            close_steps: steps in which the fingers close before they lift.
            patience: steps to wait at most for the arm, which lags behind.
            slack: metres added to the tolerance of every goal, for noisy actions.
            measured: act on the measured pose of the arm, not on the commanded one.
        """
        self.max_translation, self.max_rotation = max_translation, max_rotation
        self.close_steps, self.patience, self.slack = close_steps, patience, slack
        self.measured = measured
        self.gain = GAIN if measured else 1.0
        self.phase: Callable[[dict], tuple[np.ndarray, float]] | None = None  # the method of the present phase

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
        """Find the grasp for the object's present pose. A rolling object is met where it will be a step later."""
        rotation = rotation_matrix(state["object_pose"][3:])
        position = np.asarray(state["object_pose"][:3])
        lower, upper = np.asarray(state["object_bbox"])
        middle = (lower + upper) / 2
        grasp = middle.copy()  # in the object's frame
        if state["object_grasp"] is not None:
            grasp[:2] = state["object_grasp"]
        rolled = position[:2] - self.seen_xy
        if np.linalg.norm(rolled) >= 0.03:  # too far for one step: the env has moved the object
            rolled = np.zeros(2)
        self.grasp_xy = (position + rotation @ grasp)[:2] + 1.5 * rolled
        half_height = np.abs(rotation[2]) @ (upper - lower) / 2
        top = (position + rotation @ middle)[2] + half_height
        self.grasp_z = max(TABLE_HEIGHT + TIP_BELOW_TOOL + CLEARANCE, top - BAR_ABOVE_TOOL + CLEARANCE)
        self.hover_z = max(top + TIP_BELOW_TOOL + 0.02, self.grasp_z + 0.04)
        self.object_z = position[2]
        self.yaw_left = self._yaw_to(rotation, upper - lower)

    def _yaw_to(self, rotation: np.ndarray, size: np.ndarray) -> float:
        """Angle (rad) about the vertical after which the fingers close where the object's box is narrow."""
        choices = []  # (too wide, width with a penalty for turning, turn) of each axis of the box
        for axis in range(3):
            direction = np.array([*rotation[:2, axis], 0.0])
            length = np.linalg.norm(direction)
            if length < 0.3:  # this axis is nearly vertical: the fingers cannot close along it
                continue
            width = np.abs(direction / length @ rotation) @ size
            turn = np.arctan2(direction[1], direction[0]) - self.finger_angle
            turn = (turn + np.pi / 2) % np.pi - np.pi / 2  # the two fingers are interchangeable
            choices.append((width > GRIP_WIDTH, width + 0.01 * abs(turn), turn))
        if not choices:
            return 0.0
        _, _, best_turn = min(choices)
        return best_turn

    def drift(self, offset: np.ndarray) -> None:
        """Account for noise: the arm also moved by `offset` (m, root frame, [3]). The next actions undo that."""
        self.commanded = self.commanded + offset * (-1.0, -1.0, 1.0)

    @classmethod
    def grasp_of(cls, state: dict, finger_angle: float) -> tuple[np.ndarray, float]:
        """Where the tool grasps an object at rest: its place [3] (m, world frame), and the angle of its fingers (rad).

        The angle is the direction about the vertical in which they close, the nearest to `finger_angle` that fits.
        """
        expert = cls()
        expert.seen_xy, expert.finger_angle = np.asarray(state["object_pose"][:2]), finger_angle
        expert._look(state)
        return np.array([*expert.grasp_xy, expert.grasp_z]), finger_angle + expert.yaw_left

    # Each phase returns (goal position [3], gripper), and switches to the next phase when its goal is reached.

    def _switch(self, phase: Callable[[dict], tuple[np.ndarray, float]]) -> None:
        """Enter a phase that counts its steps."""
        self.phase = phase
        self.ticks = 0

    def _hover(self, state: dict) -> tuple[np.ndarray, float]:
        self._look(state)
        goal = np.array([*self.grasp_xy, self.hover_z])
        if self._reached(goal, 0.01) and abs(self.yaw_left) < 0.05:
            self._switch(self._descend)
            return self._descend(state)
        return goal, OPEN

    def _descend(self, state: dict) -> tuple[np.ndarray, float]:
        self._look(state)
        self.yaw_left = 0.0
        goal = np.array([*self.grasp_xy, self.grasp_z])
        if np.linalg.norm(goal[:2] - self.commanded[:2]) > 0.03:  # the object has moved away
            self.phase = self._hover
            return self._hover(state)
        self.ticks += 1
        arrived = abs(state["tcp_pose"][2] - self.grasp_z) < 0.003 or self.ticks > self.patience  # the arm lags behind
        if self._reached(goal, 0.003) and arrived:
            self._switch(self._close)
            return self._close(state)
        return goal, OPEN

    def _close(self, state: dict) -> tuple[np.ndarray, float]:
        self.ticks += 1
        if self.ticks > self.close_steps:
            self.phase = self._lift
            return self._lift(state)
        return self.commanded, CLOSE

    def _lift(self, state: dict) -> tuple[np.ndarray, float]:
        goal = np.array([*self.grasp_xy, self.grasp_z + 0.05])
        if not self._reached(goal):
            return goal, CLOSE
        if state["object_pose"][2] < self.object_z + 0.02:  # the object slipped: try again
            self.phase = self._hover
            return self._hover(state)
        self.phase = self._carry
        return self._carry(state)

    def _carry(self, state: dict) -> tuple[np.ndarray, float]:
        offset_in_hand = np.asarray(state["object_pose"][:2]) - np.asarray(state["tcp_pose"][:2])
        above_receptacle = np.asarray(state["receptacle_pose"][:2]) - offset_in_hand
        goal = np.array([*above_receptacle, self.grasp_z + 0.05])
        self.ticks += 1
        if np.linalg.norm(goal[:2] - self.commanded[:2]) < 0.006 or self.ticks > 40:
            self._switch(self._lower)
            return self._lower(state)
        return goal, CLOSE

    def _lower(self, state: dict) -> tuple[np.ndarray, float]:
        """Go down until the object touches the receptacle, where the env ends the episode.

        After too many steps let go and try again.
        """
        self.ticks += 1
        if self.ticks > 5:
            self._switch(self._release)
            return self._release(state)
        lower_z = max(self.commanded[2] - 0.015, self.grasp_z + 0.002)
        return np.array([*self.commanded[:2], lower_z]), CLOSE

    def _release(self, state: dict) -> tuple[np.ndarray, float]:
        self.ticks += 1
        if self.ticks > 2:
            up = np.array([*self.commanded[:2], self.hover_z + 0.03])
            if not self._reached(up):
                return up, OPEN
            self.phase = self._hover
            return self._hover(state)
        return self.commanded, OPEN

    def _reached(self, goal: np.ndarray, tolerance: float = 1e-4) -> bool:
        """Whether the commanded position is within `tolerance` (m) of the goal."""
        distance = np.linalg.norm(goal - self.commanded)
        return bool(distance < tolerance + self.slack)

    def _toward(self, goal: np.ndarray, gripper: float) -> np.ndarray:
        """One bounded step, float32 [7]. The root frame is yawed by 180 degrees: root x, y = -(world x, y)."""
        delta = self.gain * (goal - self.commanded)
        length = max(np.linalg.norm(delta), 1e-9)
        delta *= min(1.0, self.max_translation / length)
        turn = 0.0
        if self.phase == self._hover:
            turn = float(np.clip(self.gain * self.yaw_left, -self.max_rotation, self.max_rotation))
        self.commanded = self.commanded + delta
        self.finger_angle += turn
        return np.array([-delta[0], -delta[1], delta[2], 0.0, 0.0, turn, gripper], np.float32)

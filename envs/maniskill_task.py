"""Any ManiSkill env with the interface of the family: you give an id and a sentence that says what to do.

    make_envs("PickCube-v1", 8, instruction="pick up the cube", image_size=(224, 224), max_episode_steps=50)
    make_envs("my_tasks:MyTask-v1", 8, instruction="...")       # your own task: importing my_tasks registers it

The env needs a camera, a robot with the control mode `pd_ee_delta_pose` and seven action dimensions, and
`info["success"]`.

Start states: the episode id is the seed of ManiSkill's reset. The scene is built again for every episode (0.04 s for
    PushCube), because PhysX keeps caches. So an episode depends on (env id, episode id, actions) only, to the last bit.
Actions: metres, Euler angles (rad, XYZ) and gripper (> 0.5 opens), as in all envs here. ManiSkill wants them divided by
    the controller's bounds, and clips them there (Panda: 0.1 m per axis, 0.1 rad in all). Translation is along the axes
    of the robot's base, and rotation is about them.
Reward: the increase of success, so 1 when it is reached and -1 when it is lost again. `reward_mode` gives the env's own
    reward in its place: "sparse" pays success in every step, "dense" and "normalized_dense" are what the env computes.
    `info["fail"]` does not end an episode.
Camera: the env's first one, at image_size. The env keeps its own rates (mostly 20 Hz control) and assets.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
from collections.abc import Iterator
from typing import NoReturn

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers ManiSkill's own ids
import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import Camera, parse_camera_configs
from mani_skill.utils import download_asset
from mani_skill.utils.registration import REGISTERED_ENVS

from envs.assets import hulls

CONTROL_MODE = "pd_ee_delta_pose"


class ManiSkillTask:
    """One env of one scene, simulated on the CPU, one episode at a time."""

    def __init__(
        self,
        env_id: str,
        instruction: str,
        image_size: tuple[int, int],
        render_backend: str = "cpu",
        reward_mode: str | None = None,
    ):
        self.env_id, self.instruction, self.image_size, self.reward_mode = env_id, instruction, image_size, reward_mode
        hulls.choose("cpu")  # what these envs have in a process of their own
        # ManiSkill looks for garbage with every scene that it builds. This leaves out what the process holds by now,
        # all imported modules for example, and takes 0.2 s off the start of an episode.
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
        self.env = _make(env_id, image_size, render_backend, reward_mode)
        self.episode_id: int | None = None
        self.success = False
        self._check()
        if reward_mode is not None:
            self._check_reward()

    def _check_reward(self) -> None:
        """Raise ValueError where the env does not compute the reward that it lists."""
        try:
            self.env.get_reward(obs={}, action=torch.zeros(1, 7), info=self.env.get_info())
        except NotImplementedError as error:
            raise ValueError(
                f"{self.env_id} does not compute a reward for reward_mode {self.reward_mode!r}: use another one, or "
                "leave it out."
            ) from error

    def _check(self) -> None:
        """Raise ValueError for an env whose actions, images or rewards do not fit."""
        shape = self.env.single_action_space.shape
        if shape != (7,):
            raise ValueError(
                f"{self.env_id} takes actions of shape {shape} in {CONTROL_MODE}: choose a robot with six action "
                "dimensions for the arm and one for the gripper."
            )
        if not isinstance(next(iter(self.env.scene.sensors.values()), None), Camera):
            raise ValueError(f"{self.env_id} has no camera: give it one in _default_sensor_configs.")
        if "success" not in self.env.get_info():
            raise ValueError(f"{self.env_id} reports no success: its evaluate() has to return a 'success' flag.")
        name, camera = next(iter(self.env.scene.sensors.items()))
        configs = parse_camera_configs(self.env._default_sensor_configs)
        if name in configs and camera.config.intrinsic is not None:
            own = (configs[name].width, configs[name].height)
            if own != tuple(self.image_size):
                raise ValueError(
                    f"the camera of {self.env_id} has an intrinsic matrix for {own[0]}x{own[1]}: use image_size={own}."
                )

    def start_episode(self, episode_id: int) -> None:
        """Begin the episode that ManiSkill makes of this seed, in a newly built scene."""
        with _no_prompt(self.env_id):
            self.env.reset(seed=episode_id, options={"reconfigure": True})
        self.episode_id, self.success = episode_id, False

    def advance(self, action: torch.Tensor) -> tuple[float, bool]:
        """One control step with action float32 [1, 7] (m, rad, gripper 1 or -1). Returns reward and success."""
        _, reward, _, _, info = self.env.step(self._command(action))
        success_before = self.success
        self.success = bool(info["success"][0])
        if self.reward_mode is None:
            return float(self.success) - float(success_before), self.success
        return float(reward[0]), self.success

    def _command(self, action: torch.Tensor) -> torch.Tensor:
        """The same motion in the controller's units, float32 [1, 7].

        mani_skill 3.0.1 maps a normalised translation onto [pos_lower, pos_upper], but multiplies a normalised rotation
        by rot_lower (`PDEEPoseController._clip_and_scale_action`). That is negative for the Panda (-0.1), so a +1 turns
        by -0.1 rad. Dividing by rot_lower makes the arm turn the right way.
        """
        command = action.clone()
        config = self._arm.config
        if config.normalize_action:
            lower = torch.as_tensor(config.pos_lower, dtype=torch.float32)
            upper = torch.as_tensor(config.pos_upper, dtype=torch.float32)
            command[:, :3] = 2 * (action[:, :3] - lower) / (upper - lower) - 1
            command[:, 3:6] = action[:, 3:6] / torch.as_tensor(config.rot_lower, dtype=torch.float32)
        space = self.env.single_action_space
        command[:, 6] = float(space.high[6]) if action[0, 6] > 0 else float(space.low[6])
        return command

    def robot_units(self, commands: np.ndarray) -> np.ndarray:
        """The actions whose command is this: the inverse of `_command`, for recorded commands float32 [T, 7].

        Returns float32 [T, 7]: m, rad, gripper 1 (opens) or 0. What the controller would clip is clipped.
        """
        actions = commands.copy()
        config, space = self._arm.config, self.env.single_action_space
        if config.normalize_action:
            lower, upper = np.float32(config.pos_lower), np.float32(config.pos_upper)
            actions[:, :3] = lower + (np.clip(commands[:, :3], -1, 1) + 1) / 2 * (upper - lower)
            length = np.linalg.norm(commands[:, 3:6], axis=1, keepdims=True)
            actions[:, 3:6] = commands[:, 3:6] / np.maximum(length, 1) * np.float32(config.rot_lower)
        actions[:, 6] = commands[:, 6] > (space.low[6] + space.high[6]) / 2
        return actions

    @property
    def camera_name(self) -> str:
        """The camera whose images the policy sees."""
        return next(iter(self.env.scene.sensors))

    @property
    def _arm(self) -> PDEEPoseController:
        """The controller of the arm."""
        controllers = self.env.agent.controller.controllers.values()
        return next(controller for controller in controllers if isinstance(controller, PDEEPoseController))

    def render_image(self) -> np.ndarray:
        """The first camera's image, without the markers that the task hides from policies: uint8 [H, W, 3]."""
        for marker in self.env._hidden_objects:
            marker.hide_visual()
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = next(iter(self.env.scene.sensors.values()))
        camera.capture()
        return camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"][0].numpy()

    def privileged_state(self) -> np.ndarray:
        """ManiSkill's own state, joint positions, tool pose in the base frame and success: float32 [S - 1]."""
        state = self.env.get_state()[0].numpy()
        qpos = self.env.agent.robot.get_qpos()[0].numpy()
        tool_pose = self._arm.ee_pose_at_base.raw_pose[0].numpy()
        return np.concatenate([state, qpos, tool_pose, [self.success]]).astype(np.float32)

    def get_state_dict(self) -> dict:
        """ManiSkill's own state, float32 [1, n] each."""
        return self.env.get_state_dict()

    def describe(self) -> dict:
        """The present state as plain data. tcp_pose is p, q (wxyz) in the base frame, `state` ManiSkill's own."""
        return {
            "episode_id": self.episode_id,
            "instruction": self.instruction,
            "success": self.success,
            "qpos": self.env.agent.robot.get_qpos()[0].tolist(),
            "tcp_pose": self._arm.ee_pose_at_base.raw_pose[0].tolist(),
            "state": self.env.get_state()[0].tolist(),
        }

    def close(self) -> None:
        self.env.close()


def _make(env_id: str, image_size: tuple[int, int], render_backend: str, reward_mode: str | None) -> BaseEnv:
    """Make the env without wrappers. Raises ValueError or RuntimeError that name what is missing."""
    module, _, name = env_id.rpartition(":")
    if module:
        _import(env_id, module)
    if name not in REGISTERED_ENVS:
        near = difflib.get_close_matches(name, REGISTERED_ENVS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown env_id {env_id!r}: did you mean {near!r}? Your own task is 'module:{name}', where importing "
            "module registers it."
        )
    known = REGISTERED_ENVS[name].cls.SUPPORTED_REWARD_MODES
    if reward_mode is not None and reward_mode not in known:
        raise ValueError(f"{env_id} has no reward_mode {reward_mode!r}, only {', '.join(known)}: leave it out.")
    width, height = image_size
    try:
        with _no_prompt(name):
            env = gym.make(
                name,
                obs_mode="none",  # render_image takes one image per chunk
                reward_mode=reward_mode or "none",
                control_mode=CONTROL_MODE,
                sensor_configs={"width": width, "height": height},
                sim_backend="physx_cpu",
                render_backend=render_backend,
            )
    # ManiSkill raises one of these for a mode that the env does not have
    except (AssertionError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{env_id} cannot run here ({type(error).__name__}: {error}): it must allow obs_mode and reward_mode "
            f"'none' and control_mode {CONTROL_MODE!r}."
        ) from error
    return env.unwrapped


def _import(env_id: str, module: str) -> None:
    """Import the module that registers a task. Raises ValueError, whatever that module's code does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"env_id {env_id!r}: {error}, so add its folder to PYTHONPATH.") from error
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"env_id {env_id!r}: importing {module} ended in {type(error).__name__} ({message}): "
            f"`python -c 'import {module}'` shows where."
        ) from error


@contextlib.contextmanager
def _no_prompt(env_id: str) -> Iterator[None]:
    """Raise RuntimeError for missing assets. ManiSkill itself would ask on standard input, or exit."""

    def refuse(message: str) -> NoReturn:
        problem = message.split(". ")[0].strip()  # "Environment X requires asset(s) ycb which could not be found"
        raise RuntimeError(f"{problem}: run `python -m mani_skill.utils.download_asset {problem.split()[1]}`.")

    original_prompt = download_asset.prompt_yes_no
    download_asset.prompt_yes_no = refuse
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(
            f"assets of {env_id} are missing, and ManiSkill does not know where to find them."
        ) from error
    finally:
        download_asset.prompt_yes_no = original_prompt

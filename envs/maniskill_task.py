"""Any ManiSkill env behind the contract of `envs/vector.py`: an id, and a sentence that says what to do.

    make_envs("PickCube-v1", 8, instruction="pick up the cube", image_size=(224, 224), max_episode_steps=50)
    make_envs("my_tasks:MyTask-v1", 8, instruction="...")       # a task of yours: importing my_tasks registers it

It needs a camera, a robot with the control mode `pd_ee_delta_pose` and seven action dimensions, and `info["success"]`.

Start states: episode id = seed of ManiSkill's reset. The scene is built anew for every episode (0.2 s for PickCube),
    because PhysX keeps caches, so an episode is a function of (env id, episode id, actions), bit for bit.
Actions: metres, Euler angles (rad, XYZ), gripper (> 0.5 opens), as everywhere here. ManiSkill wants them divided by the
    controller's bounds; beyond these it clips (Panda: 0.1 m per axis, 0.1 rad in all). Translation is along the axes of
    the robot's base, rotation about them.
Reward: the increase of success, 1 when it is reached and -1 when it is lost again; the env's dense reward is not used,
    and `info["fail"]` does not end an episode.
Camera: the env's first one, at image_size. Rates (20 Hz control in most) and assets are the env's own.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers ManiSkill's own ids
import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import Camera, parse_camera_configs
from mani_skill.utils import download_asset
from mani_skill.utils.registration import REGISTERED_ENVS

CONTROL_MODE = "pd_ee_delta_pose"


class ManiSkillTask:
    """One env of one scene, simulated on the CPU, one episode at a time."""

    def __init__(self, env_id: str, instruction: str, image_size: tuple[int, int], render_backend: str = "cpu"):
        self.env_id, self.instruction, self.image_size = env_id, instruction, image_size
        self.env = _make(env_id, image_size, render_backend)
        self.episode_id: int | None = None
        self.success = False
        self._check()

    def _check(self) -> None:
        """One sentence for an env that these actions, pictures or rewards do not fit."""
        shape = self.env.single_action_space.shape
        if shape != (7,):
            raise ValueError(
                f"{self.env_id} takes actions of shape {shape} in {CONTROL_MODE}: only robots with six for the arm and "
                "one for the gripper fit here."
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
        """The start state that ManiSkill makes of this seed, in a scene without a past."""
        with _no_prompt(self.env_id):
            self.env.reset(seed=episode_id, options={"reconfigure": True})
        self.episode_id, self.success = episode_id, False

    def advance(self, action: torch.Tensor) -> tuple[float, bool]:
        """One control step; action float32 [1, 7] in m and rad, gripper 1 or -1. Returns reward and success."""
        _, _, _, _, info = self.env.step(self._command(action))
        before, self.success = self.success, bool(info["success"][0])
        return float(self.success) - float(before), self.success

    def _command(self, action: torch.Tensor) -> torch.Tensor:
        """The same motion in the controller's units, float32 [1, 7].

        mani_skill 3.0.1 maps a normalised translation onto [pos_lower, pos_upper], but multiplies a normalised rotation
        by rot_lower (`PDEEPoseController._clip_and_scale_action`): where that is negative, as the Panda's -0.1, a +1
        turns by -0.1 rad. Dividing by rot_lower makes the arm turn the way it was asked to.
        """
        command = action.clone()
        config = self._arm.config
        if config.normalize_action:
            lower, upper = (torch.as_tensor(x, dtype=torch.float32) for x in (config.pos_lower, config.pos_upper))
            command[:, :3] = 2 * (action[:, :3] - lower) / (upper - lower) - 1
            command[:, 3:6] = action[:, 3:6] / torch.as_tensor(config.rot_lower, dtype=torch.float32)
        space = self.env.single_action_space
        command[:, 6] = float(space.high[6]) if action[0, 6] > 0 else float(space.low[6])
        return command

    @property
    def _arm(self) -> PDEEPoseController:
        parts = self.env.agent.controller.controllers.values()
        return next(part for part in parts if isinstance(part, PDEEPoseController))

    def render_image(self) -> np.ndarray:
        """What the first camera sees now, without the markers that the task hides from policies; uint8 [H, W, 3]."""
        for marker in self.env._hidden_objects:
            marker.hide_visual()
        self.env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = next(iter(self.env.scene.sensors.values()))
        camera.capture()
        return camera.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"][0].numpy()

    def privileged_state(self) -> np.ndarray:
        """ManiSkill's own state of everything, joints, tool pose in the base frame and success, float32 [S - 1]."""
        parts = (self.env.get_state(), self.env.agent.robot.get_qpos(), self._arm.ee_pose_at_base.raw_pose)
        return np.concatenate([*(part[0].numpy() for part in parts), [self.success]]).astype(np.float32)

    def describe(self) -> dict:
        """The live state, plain data; tcp_pose is p, q (wxyz) in the base frame, `state` is ManiSkill's get_state()."""
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


def _make(env_id: str, image_size: tuple[int, int], render_backend: str) -> BaseEnv:
    """The env without wrappers, or one sentence that names what is missing."""
    module, _, name = env_id.rpartition(":")
    if module:
        _import(env_id, module)
    if name not in REGISTERED_ENVS:
        near = difflib.get_close_matches(name, REGISTERED_ENVS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown env_id {env_id!r}: did you mean {near!r}? A task of your own is 'module:{name}', where importing "
            "module registers it."
        )
    width, height = image_size
    try:
        with _no_prompt(name):
            env = gym.make(
                name,
                obs_mode="none",  # pictures are taken once per chunk, by render_image
                reward_mode="none",
                control_mode=CONTROL_MODE,
                sensor_configs={"width": width, "height": height},
                sim_backend="physx_cpu",
                render_backend=render_backend,
            )
    except (
        AssertionError,
        KeyError,
        NotImplementedError,
    ) as error:  # what ManiSkill raises for modes that do not exist
        raise ValueError(
            f"{env_id} can not run here ({type(error).__name__}: {error}): it has to allow obs_mode and reward_mode "
            f"'none' and control_mode {CONTROL_MODE!r}."
        ) from error
    return env.unwrapped


def _import(env_id: str, module: str) -> None:
    """Run the code of the module that registers a task. Raises ValueError, one sentence, whatever that code does."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"env_id {env_id!r}: {error}; put the folder that has it on PYTHONPATH.") from error
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"env_id {env_id!r}: importing {module} ended in {type(error).__name__} ({said}): "
            f"`python -c 'import {module}'` shows where."
        ) from error


@contextlib.contextmanager
def _no_prompt(env_id: str) -> Iterator[None]:
    """Where ManiSkill lacks assets it asks on standard input, or exits; here that is one sentence."""

    def refuse(message: str):
        needs = message.split(". ")[0].strip()  # "Environment X requires asset(s) ycb which could not be found"
        raise RuntimeError(f"{needs}: run `python -m mani_skill.utils.download_asset {needs.split()[1]}`.")

    asked, download_asset.prompt_yes_no = download_asset.prompt_yes_no, refuse
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(
            f"assets of {env_id} are missing, and ManiSkill does not know where to find them."
        ) from error
    finally:
        download_asset.prompt_yes_no = asked

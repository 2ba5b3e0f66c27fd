"""Registers every env id of `envs.variants` with gymnasium. The simulator is only imported when an env is made.

import gymnasium, envs
env = gymnasium.make("PutOnPlateInScene25Carrot-v1", obs_mode="rgb", obj_set="test")

`gymnasium.make("envs:PutOnPlateInScene25Carrot-v1")` imports this package by itself. Recordings have ids of this form.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from envs.variants import VARIANTS

if TYPE_CHECKING:
    from envs.gym_env import PutOnPlateEnv

MODULE = "envs"  # importing it registers the ids
CONTROL_FREQ = 5  # Hz
MAX_EPISODE_STEPS = 80  # 16 s
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
CAMERA = "3rd_view_camera"


def make_registered(env_id: str, **kwargs) -> PutOnPlateEnv:
    """Import the simulator, and make an env with it. gymnasium calls this for an id of this package."""
    from envs import gym_env

    return gym_env.make_registered(env_id, **kwargs)


def register() -> None:
    """Register all ids like ManiSkill's `register_env`, which replaces them once `envs.gym_env` is imported."""
    limit = dict(max_episode_steps=MAX_EPISODE_STEPS)
    wrapper = WrapperSpec("MSTimeLimit", "mani_skill.utils.registration:TimeLimitWrapper", limit)
    for env_id in VARIANTS:
        gymnasium.register(
            env_id,
            entry_point=partial(make_registered, env_id),
            max_episode_steps=MAX_EPISODE_STEPS,
            disable_env_checker=True,  # observations are torch tensors with a batch dimension
            additional_wrappers=(wrapper,),
        )


register()

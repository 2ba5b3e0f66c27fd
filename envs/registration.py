"""Registers every env id of `envs.variants` with gymnasium. The simulator is only imported when an env is made.

import gymnasium, envs
env = gymnasium.make("PutOnPlateInScene25Carrot-v1", obs_mode="rgb", obj_set="test")

`gymnasium.make("envs:PutOnPlateInScene25Carrot-v1")` imports this package by itself. Recordings have ids of this form.
"""

from __future__ import annotations

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from envs.variants import VARIANTS

MODULE = "envs"  # importing it registers the ids
CONTROL_FREQ = 5  # Hz
MAX_EPISODE_STEPS = 80  # 16 s
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
CAMERA = "3rd_view_camera"


def class_name(env_id: str) -> str:
    """The name of an id's class in `envs.gym_env`."""
    return env_id.replace("-", "_")


def register() -> None:
    """Register all ids like ManiSkill's `register_env`, which replaces them once `envs.gym_env` is imported."""
    limit = dict(max_episode_steps=MAX_EPISODE_STEPS)
    wrapper = WrapperSpec("MSTimeLimit", "mani_skill.utils.registration:TimeLimitWrapper", limit)
    for env_id in VARIANTS:
        gymnasium.register(
            env_id,
            entry_point=f"envs.gym_env:{class_name(env_id)}",
            max_episode_steps=MAX_EPISODE_STEPS,
            disable_env_checker=True,  # observations are torch tensors with a batch dimension
            additional_wrappers=(wrapper,),
        )


register()

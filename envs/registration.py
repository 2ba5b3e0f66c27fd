"""Registers every env id of `envs.variants` with gymnasium. The simulator is only imported when an env is made.

import gymnasium, envs
env = gymnasium.make("PutOnPlateInScene25Carrot-v1", obs_mode="rgb+segmentation", obj_set="test",
                     sim_backend="physx_cpu", render_backend="cpu")
"""

from __future__ import annotations

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from envs.variants import VARIANTS

CONTROL_FREQ = 5  # Hz
MAX_EPISODE_STEPS = 80  # 16 s
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
CAMERA = "3rd_view_camera"


def register() -> None:
    """Register all ids like ManiSkill's `register_env`, which replaces them once `envs.put_on_plate` is imported."""
    limit = dict(max_episode_steps=MAX_EPISODE_STEPS)
    wrapper = WrapperSpec("MSTimeLimit", "mani_skill.utils.registration:TimeLimitWrapper", limit)
    for env_id in VARIANTS:
        gymnasium.register(
            env_id,
            entry_point="envs.put_on_plate:make_registered",
            kwargs={"env_id": env_id},
            max_episode_steps=MAX_EPISODE_STEPS,
            disable_env_checker=True,  # observations are torch tensors with a batch dimension
            additional_wrappers=(wrapper,),
        )


register()

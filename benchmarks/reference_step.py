"""A step done the way RL4VLA's env does it, for benchmarks/env_speed.py to compare with.

It stands for what the published env (arXiv 2505.19789) computes per step, not for its lines, which are not ours to
carry. The same are:

- Every object of the set is in the scene (25 and one receptacle in Main-v3). Those not chosen are parked without
  support.
- ManiSkill's stock controllers, its Python loop over substeps, and `get_obs()` with colour and segmentation at
  640 x 480 in the default shader.
- `evaluate()` asks ManiSkill for every object whether each finger grasps it, and for the receptacle's contact.
- The table's photograph is laid over the image by torch operations on the whole image.

Bodies are placed where our env settled them, and the task's further bookkeeping is left out. So it is rather faster
than the original. Its parts on one torch thread took 7 (control, physics), 14 (evaluate), 89 (render) and 15 ms
(overlay).
"""

from __future__ import annotations

import torch
from mani_skill.utils import common

from envs.gpu.simulation import BatchedPutOnPlate
from envs.registration import CAMERA
from envs.rules import GRASP_MIN_FORCE, ON_MIN_FORCE
from envs.scene import WidowX250S


class ReferenceStyle(BatchedPutOnPlate):
    """One row of all bodies, driven through `BaseEnv.step`."""

    SUPPORTED_OBS_MODES = ("rgb+segmentation",)
    ROBOT = WidowX250S

    def __init__(self, env_id: str, **kwargs):
        backends = dict(sim_backend="physx_cpu", render_backend="cpu", sensor_configs=dict(shader_pack="default"))
        super().__init__(env_id, 1, obs_mode="rgb+segmentation", **backends, **kwargs)

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        self._parked[:, 0] = 1.0
        self._parked[:, 1] = 0.3 * torch.arange(len(self._parked))
        self._parked[:, 2] = 1.0

    def _after_reconfigure(self, options: dict):
        super()._after_reconfigure(options)
        shown = [link._objs[0].entity for link in self.agent.robot.links] + [a._objs[0] for a in self._bodies.actors]
        self._foreground = torch.tensor([entity.per_scene_id for entity in shown], dtype=torch.int16)

    def _is_grasping(self, actor) -> torch.Tensor:
        """bool [1]: both fingers are pushed open by this object."""
        grasped = torch.ones(1, dtype=torch.bool)
        for finger, sign in zip(self._fingers, (1, -1)):
            force = self.scene.get_pairwise_contact_forces(finger, actor)
            opening = sign * finger.pose.to_transformation_matrix()[..., :3, 1]
            angle = torch.rad2deg(common.compute_angle_between(opening, force))
            grasped = grasped & (torch.linalg.norm(force, dim=1) >= GRASP_MIN_FORCE) & (angle <= 85)
        return grasped

    def evaluate(self) -> dict:
        actors = self._bodies.actors
        if self.starts[0] is None:
            return {}
        grasped = torch.stack([self._is_grasping(actor) for actor in actors[: self._num_objects]])
        poses = torch.stack([actor.pose.raw_pose for actor in actors])
        obj, receptacle = self._chosen[0].tolist()
        offset = poses[obj, :, :3] - poses[receptacle, :, :3]
        near = torch.linalg.norm(offset[:, :2], dim=1) <= self._half_sizes[:, 1].amax(1)
        force = self.scene.get_pairwise_contact_forces(actors[obj], actors[receptacle])
        on = near & (offset[:, 2] > 0) & (torch.linalg.norm(force, dim=1) > ON_MIN_FORCE)
        return dict(success=on, is_grasped=grasped[obj])

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict:
        obs = super()._get_obs_sensor_data(apply_texture_transforms)
        color, segmentation = obs[CAMERA]["rgb"].float(), obs[CAMERA]["segmentation"]
        mask = torch.isin(segmentation, self._foreground).float().expand_as(color)
        picture = color * mask + self._overlays[self._table].float() * (1 - mask)
        obs[CAMERA]["rgb"] = picture.to(torch.uint8)
        return obs

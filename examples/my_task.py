"""A task of your own: push the red cube onto the green square. Copy this file and change what you like.

    python train_ppo.py --config yaml/quickstart_ppo_openvla.yaml --env_id examples.my_task:PushToSquare-v1 \
        --instruction "push the red cube onto the green square" --reward_mode normalized_dense \
        --num_envs 4 --num_eval_envs 2 --num_eval_episodes 2 --num_iterations 2 --run_dir runs/my_task
    python evaluate.py --checkpoint runs/my_task --settings examples.my_task:PushToSquare-v1 --num_episodes 2

Training needs a camera, a robot with the control mode pd_ee_delta_pose, and `success`. The rest makes the task. The
Panda arm of ManiSkill has the control mode. docs/environments.md says more.
"""

import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.building import actors
from mani_skill.utils.registration import register_env
from mani_skill.utils.scene_builder.table import TableSceneBuilder
from mani_skill.utils.structs.pose import Pose


@register_env("PushToSquare-v1", max_episode_steps=50)
class PushToSquare(BaseEnv):
    SUPPORTED_ROBOTS = ("panda",)

    def __init__(self, *args, robot_uids="panda", **kwargs):
        super().__init__(*args, robot_uids=robot_uids, **kwargs)

    def get_language_instruction(self, **kwargs):
        return ["push the red cube onto the green square"] * self.num_envs

    @property
    def _default_sensor_configs(self):  # what the policy sees
        pose = sapien_utils.look_at([0.3, 0, 0.6], [-0.1, 0, 0.1])
        return CameraConfig("base_camera", pose, width=128, height=128, fov=1.57)

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose([-0.615, 0, 0]))

    def _load_scene(self, options):  # the bodies, once per scene
        self.table = TableSceneBuilder(self)
        self.table.build()
        start = sapien.Pose([0, 0, 0.02])
        self.cube = actors.build_cube(self.scene, 0.02, [1, 0, 0, 1], "cube", initial_pose=start)
        self.square = actors.build_box(
            self.scene, [0.05, 0.05, 1e-3], [0, 1, 0, 1], "square", body_type="kinematic", add_collision=False
        )

    def _initialize_episode(self, env_idx, options):  # where they are when an episode begins
        self.table.initialize(env_idx)
        xy = torch.rand(len(env_idx), 2) * 0.1 - 0.05  # m, [N, 2]
        height = torch.zeros(len(env_idx), 1)
        self.cube.set_pose(Pose.create_from_pq(torch.cat([xy, height + 0.02], dim=1)))
        self.square.set_pose(Pose.create_from_pq(torch.cat([xy + torch.tensor([0.12, 0.0]), height], dim=1)))

    def evaluate(self):
        offset = self.square.pose.p - self.cube.pose.p  # m, [N, 3]
        return {"success": torch.linalg.norm(offset[:, :2], dim=1) < 0.04}

    def compute_dense_reward(self, obs, action, info):  # the arm at the cube, the cube at the square, 0 to 3
        reach = torch.linalg.norm(self.cube.pose.p - self.agent.tcp.pose.p, dim=1)
        push = torch.linalg.norm(self.square.pose.p - self.cube.pose.p, dim=1)
        return 2 - torch.tanh(5 * reach) - torch.tanh(5 * push) + info["success"]

    def compute_normalized_dense_reward(self, obs, action, info):
        return self.compute_dense_reward(obs, action, info) / 3

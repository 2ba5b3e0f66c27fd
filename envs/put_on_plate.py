"""The ManiSkill task: a WidowX-250s puts one object on one receptacle. RL4VLA's PutOnPlateInScene25, written anew.

An ordinary ManiSkill env (`gym.make("PutOnPlateInScene25Main-v3", sim_backend="physx_cpu", render_backend="cpu")`), one
scene per env. What differs from RL4VLA's (arXiv 2505.19789), and why:
- Only the selected object and receptacle are in the scene, not all 42 parked beside it: faster, and one contact query.
- Every reset moves all bodies into a new PhysX scene. PhysX keeps contact caches and an order of insertion; with them
  an episode would depend on what was simulated before. So an episode is a function of
  (env_id, obj_set, episode_id, actions, sim_freq, image_size), bit for bit.
- The reward is part of the task, and resolution and sim_freq are parameters (control stays 5 Hz).

`advance()` and `render_image()` are what `BaseEnv.step` does here, without its per-substep Python and its observation
dictionaries; a test holds both paths to equal bits.
"""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import sapien
import torch
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseControllerConfig
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicControllerConfig
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.types import SceneConfig, SimConfig

from envs import assets, variants

CONTROL_FREQ = 5  # Hz
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
CAMERA = "3rd_view_camera"
START_QPOS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)
BASE_POSE = sapien.Pose(list(assets.ROBOT_BASE_POSITION), [0, 0, 0, 1])  # yaw of 180 degrees
PARKED_POSE = sapien.Pose([0.147, 0.028, 1.870], [0, 0, 0, 1])  # out of the way while objects settle
SETTLE_SECONDS, SETTLE_MORE_SECONDS = 0.1, 1.2  # 50 and 600 substeps at 500 Hz
STILL_LINEAR, STILL_ANGULAR = 1e-3, 1e-2  # m/s, rad/s summed over bodies: below both, the first settling is enough

GRASP_MIN_FORCE = 0.5  # N per finger
GRASP_MIN_COSINE = math.cos(math.radians(85))  # between the force on a finger and its opening direction
GRASP_STREAK = 5  # control steps in a row
ON_MIN_FORCE = 0.03  # N between object and receptacle
ON_XY_SLACK, ON_Z_SLACK = 0.01, 0.05  # m
REWARD_GRASP, REWARD_STREAK, REWARD_SUCCESS = 0.1, 0.1, 1.0


class WidowX250S(BaseAgent):
    """WidowX-250s with the published gains and controllers; the env adds `urdf_path`, which its asset pack knows."""

    uid = "solovla_widowx250s"
    arm_joints = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
    finger_joints = ("left_finger", "right_finger")

    @property
    def _controller_configs(self) -> dict:
        arm = PDEEPoseControllerConfig(
            joint_names=list(self.arm_joints),
            pos_lower=-1.0,
            pos_upper=1.0,
            rot_lower=-np.pi / 2,
            rot_upper=np.pi / 2,  # nominal: nothing is normalised
            stiffness=[
                1169.7891719504198,
                730.0,
                808.4601346394447,
                1229.1299089624076,
                1272.2760456418862,
                1056.3326605132252,
            ],
            damping=[330.0, 180.0, 152.12036565582588, 309.6215302722146, 201.04998711007383, 269.51458932695414],
            force_limit=[200, 200, 100, 100, 100, 100],
            friction=0.0,
            ee_link="ee_gripper_link",
            urdf_path=self.urdf_path,
            normalize_action=False,
            use_target=True,  # deltas add up on the commanded pose, not on the measured one
        )
        gripper = PDJointPosMimicControllerConfig(
            joint_names=list(self.finger_joints),
            lower=0.014,
            upper=0.038,  # 1 mm beyond the joint limits, so that a closed grip keeps pressing
            stiffness=1000,
            damping=200,
            force_limit=60,
            normalize_action=True,
            drive_mode="force",
            mimic={"left_finger": {"joint": "right_finger"}},
        )
        return {CONTROL_MODE: dict(arm=arm, gripper=gripper)}


class PutOnPlateInScene(BaseEnv):
    """One scene, one episode at a time. `options={"episode_id": int, "obj_set": str}` at reset."""

    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")
    SUPPORTED_REWARD_MODES = ("dense", "none")
    SUPPORTED_ROBOTS = None
    env_id: str  # set by the registered subclasses

    def __init__(
        self,
        *args,
        obj_set="train",
        asset_pack="builtin",
        asset_dir=None,
        image_size=(640, 480),
        sim_freq=500,
        obs_mode="none",
        **kwargs,
    ):
        self.obj_set = obj_set
        self.pack = assets.asset_pack(asset_pack, asset_dir)
        self.image_size = tuple(image_size)
        self._requested_sim_freq = sim_freq
        self._entities: dict[tuple[str, int], sapien.Entity] = {}  # built on first use, kept for later episodes
        self._pair: list[sapien.Entity] = []  # object and receptacle of this episode
        self._lasting: list[sapien.Entity] | None = None  # all other entities, in the order they were made
        robot = type("WidowX250SOfPack", (WidowX250S,), {"urdf_path": self.pack.robot_urdf})
        super().__init__(*args, obs_mode=obs_mode, robot_uids=robot, **kwargs)

    @property
    def _default_sim_config(self):
        scene = SceneConfig(enable_enhanced_determinism=True)
        return SimConfig(sim_freq=self._requested_sim_freq, control_freq=CONTROL_FREQ, spacing=20, scene_config=scene)

    @property
    def _default_sensor_configs(self):
        width, height = self.image_size
        fx, fy, cx, cy = assets.CAMERA_INTRINSICS
        sx, sy = width / assets.CAMERA_SIZE[0], height / assets.CAMERA_SIZE[1]
        return CameraConfig(
            uid=CAMERA,
            pose=sapien.Pose(list(assets.CAMERA_POSITION), list(assets.CAMERA_QUATERNION)),
            width=width,
            height=height,
            intrinsic=np.array([[fx * sx, 0, cx * sx], [0, fy * sy, cy * sy], [0, 0, 1]]),
            mount=self.agent.robot.links_map["base_link"],
            shader_pack="minimal",
        )

    # -----------------------------------------------------------------------------------------------------------------
    # scene
    # -----------------------------------------------------------------------------------------------------------------

    def _load_agent(self, options: dict):
        super()._load_agent(options, sapien.Pose([0.127, 0.060, 0.85], [0, 0, 0, 1]))

    def _load_lighting(self, options: dict):
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        self.scene.add_directional_light([0, 0, -1], [2.2, 2.2, 2.2], shadow=False)
        self.scene.add_directional_light([-1, -0.5, -1], [0.7, 0.7, 0.7])
        self.scene.add_directional_light([1, 1, -1], [0.7, 0.7, 0.7])

    def _load_scene(self, options: dict):
        builder = self.scene.create_actor_builder()
        self.pack.add_stage(builder)
        builder.initial_pose = sapien.Pose()
        builder.build_static(name="arena")
        self._entities, self._pair, self._lasting = {}, [], None
        robot = self.agent.robot._objs[0]
        self._robot = robot
        by_name = {name: link._objs[0] for name, link in self.agent.robot.links_map.items()}
        self._fingers = by_name["left_finger_link"], by_name["right_finger_link"]
        self._tool, self._base = by_name["ee_gripper_link"], by_name["base_link"]

    def _setup_sensors(self, options: dict):
        super()._setup_sensors(options)
        self._camera = self._sensors[CAMERA].camera._render_cameras[0]

    def _entity(self, kind: str, index: int) -> sapien.Entity:
        """Object or receptacle `index`, not in any scene unless selected."""
        if (kind, index) not in self._entities:
            model = (self.pack.objects if kind == "object" else self.pack.receptacles)[index]
            builder = self.scene.create_actor_builder()
            self.pack.add_model(builder, model)
            builder.set_physx_body_type("dynamic")
            builder.set_name(model.name)
            self._entities[kind, index] = builder.build_entity()
        return self._entities[kind, index]

    def _fresh_physics(self, pair: list[sapien.Entity]) -> None:
        """Move everything into a new PhysX scene, in one fixed order; `pair` is this episode's object and receptacle.

        PhysX keeps contact caches, free lists and an order of insertion, and neither removing and adding all bodies nor
        enhanced determinism undoes that (measured: 1 to 4 of 12 episodes repeat). A new scene does: 12 of 12, 0.5 ms.
        """
        old = self.scene.sub_scenes[0]
        if self._lasting is None:
            self._lasting = list(old.entities)  # stage, robot, lights, camera
        for entity in reversed(self._lasting + self._pair):
            old.remove_entity(entity)
        px = sapien.physx.PhysxCpuSystem()
        px.timestep = self.scene.px.timestep
        new = sapien.Scene([px, old.render_system])
        self._pair = pair
        for entity in self._lasting + pair:
            new.add_entity(entity)
        self.scene.sub_scenes[0], self.scene.px = new, px

    # -----------------------------------------------------------------------------------------------------------------
    # episode
    # -----------------------------------------------------------------------------------------------------------------

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        obj_set = options.get("obj_set", self.obj_set)
        total = variants.num_start_states(self.env_id, obj_set)
        episode_id = int(options["episode_id"]) if "episode_id" in options else int(torch.randint(total, (1,)))
        self.start_episode(variants.decode(self.env_id, obj_set, episode_id))

    def start_episode(self, start: variants.StartState) -> None:
        """Place, settle with the robot out of the way, bring the robot to its start pose."""
        self.start = start
        self.object_model = self.pack.objects[start.object_index]
        self.receptacle_model = self.pack.receptacles[start.receptacle_index]
        self.instruction = variants.VARIANTS[self.env_id].template.format(
            object=self.object_model.name, receptacle=self.receptacle_model.name
        )
        self.table = self.pack.tables[start.table_index]
        self._overlay = self.pack.picture(start.table_index, *self.image_size)
        self._fresh_physics(
            [self._entity("object", start.object_index), self._entity("receptacle", start.receptacle_index)]
        )
        half_yaw = start.object_yaw / 2
        self._place(self._pair[0], start.object_position, [math.cos(half_yaw), 0, 0, math.sin(half_yaw)])
        self._place(self._pair[1], start.receptacle_position, [1, 0, 0, 0])
        self._still_robot(PARKED_POSE)
        self._settle()
        self._still_robot(BASE_POSE)
        self._object_half = self._world_half_size(self._pair[0], self.object_model)
        self._receptacle_half = self._world_half_size(self._pair[1], self.receptacle_model)
        self.grasped_once, self.streak, self.streak_once, self.potential = False, 0, False, 0.0
        self.grasped, self.success, self.last_reward = False, False, 0.0
        self._elapsed_steps[:] = self._judged_step = 0
        self.agent.controller.reset()  # the commanded pose is where the tool is

    def _place(self, entity: sapien.Entity, position, quaternion) -> None:
        body = entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
        entity.pose = sapien.Pose(list(position), quaternion)
        body.linear_velocity = body.angular_velocity = [0, 0, 0]
        body.wake_up()

    def _still_robot(self, base: sapien.Pose) -> None:
        """The whole articulation at its start configuration, unmoving, driven to where it is."""
        qpos = np.asarray(START_QPOS, dtype=np.float32)
        self._robot.root_pose = base
        self._robot.root_linear_velocity = self._robot.root_angular_velocity = [0, 0, 0]
        self._robot.qpos = qpos
        self._robot.qvel = self._robot.qf = np.zeros_like(qpos)
        for joint, target in zip(self._robot.active_joints, qpos):
            joint.drive_target = [[target]]

    def _settle(self) -> None:
        self._substeps(round(SETTLE_SECONDS * self.sim_freq))
        bodies = [entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent) for entity in self._pair]
        linear = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
        angular = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
        if linear > STILL_LINEAR or angular > STILL_ANGULAR:
            self._substeps(round(SETTLE_MORE_SECONDS * self.sim_freq))

    def _substeps(self, count: int) -> None:
        step = self.scene.px.step
        for _ in range(count):
            step()

    @staticmethod
    def _world_half_size(entity: sapien.Entity, model: assets.Model) -> np.ndarray:
        """Half edges of the world-aligned box around the model's rotated bounding box, float64 [3]."""
        rotation = entity.pose.to_transformation_matrix()[:3, :3].astype(np.float64)
        return np.abs(rotation) @ model.size / 2

    # -----------------------------------------------------------------------------------------------------------------
    # step
    # -----------------------------------------------------------------------------------------------------------------

    def advance(self, action: torch.Tensor) -> tuple[float, bool]:
        """One control step without an observation; action float32 [1, 7]. Returns reward and success."""
        self._command(action)
        self._substeps(self._sim_steps_per_control)
        return self._judge()

    def _command(self, action: torch.Tensor) -> None:
        """What the two controllers' `set_action` does, without the tool pose that it computes and a CPU does not use.

        That pose is two thirds of the stock call's 1.2 ms (mani_skill 3.0.1).
        """
        arm, gripper = self.agent.controller.controllers["arm"], self.agent.controller.controllers["gripper"]
        arm._target_pose = arm.compute_target_pose(arm._target_pose, action[:, :6])
        target_qpos = arm.kinematics.compute_ik(arm._target_pose, q0=arm.articulation.get_qpos())
        arm.set_drive_targets(arm.qpos if target_qpos is None else target_qpos)  # None: out of reach, stay
        gripper.set_action(action[:, 6:])

    def _judge(self) -> tuple[float, bool]:
        """Look at the contacts once; update the latches; reward is the increase of the potential (RL4VLA 1.5)."""
        grasped, success = self._grasped_and_on()
        self.streak = self.streak + 1 if grasped else 0
        self.grasped_once |= grasped
        self.streak_once |= self.streak >= GRASP_STREAK
        self.grasped, self.success = grasped, success
        potential = REWARD_GRASP * self.grasped_once + REWARD_STREAK * self.streak_once
        potential += REWARD_SUCCESS * (success and self.grasped_once)
        reward, self.potential = potential - self.potential, potential
        return reward, success

    def _grasped_and_on(self) -> tuple[bool, bool]:
        obj, receptacle = self._pair
        left, right = self._fingers
        impulses = {left.entity: np.zeros(3), right.entity: np.zeros(3), receptacle: np.zeros(3)}
        for contact in self.scene.px.get_contacts():
            first, second = contact.bodies[0].entity, contact.bodies[1].entity
            if second == obj and first in impulses:
                impulses[first] += sum(point.impulse for point in contact.points)
            elif first == obj and second in impulses:
                impulses[second] -= sum(point.impulse for point in contact.points)
        forces = {entity: impulse * self.sim_freq for entity, impulse in impulses.items()}
        grasped = self._pressed_open(left, forces[left.entity], 1) and self._pressed_open(
            right, forces[right.entity], -1
        )
        return grasped, self._over_receptacle() and bool(np.linalg.norm(forces[receptacle]) > ON_MIN_FORCE)

    @staticmethod
    def _pressed_open(finger, force: np.ndarray, sign: int) -> bool:
        """Whether the object pushes this finger outwards hard enough; the left finger opens along its +y."""
        size = np.linalg.norm(force)
        if size < GRASP_MIN_FORCE:
            return False
        opening = sign * finger.entity_pose.to_transformation_matrix()[:3, 1]
        return bool(opening @ force >= GRASP_MIN_COSINE * size)

    def _over_receptacle(self) -> bool:
        obj, receptacle = self._pair
        offset = obj.pose.p - receptacle.pose.p
        near = np.linalg.norm(offset[:2]) <= self._receptacle_half.max() + ON_XY_SLACK
        low = offset[2] - self._receptacle_half[2] - self._object_half[2] <= ON_Z_SLACK
        return bool(near and offset[2] > 0 and low)

    # BaseEnv's own path, for `gym.make` users and for the test that compares the two paths

    def evaluate(self) -> dict:
        if int(self._elapsed_steps[0]) != self._judged_step:  # once per step, however often somebody asks
            self._judged_step = int(self._elapsed_steps[0])
            self.last_reward, _ = self._judge()
        flags = dict(
            success=self.success,
            is_grasped=self.grasped,
            grasped_once=self.grasped_once,
            consecutive_grasp=self.streak_once,
        )
        return {name: torch.tensor([flag]) for name, flag in flags.items()}

    def compute_dense_reward(self, obs, action, info):
        return torch.tensor([self.last_reward], dtype=torch.float32)

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict:
        obs = super()._get_obs_sensor_data(apply_texture_transforms)
        seen = obs[CAMERA]["segmentation"] != 0
        obs[CAMERA]["rgb"] = torch.where(seen, obs[CAMERA]["rgb"], torch.from_numpy(self._overlay.copy()))
        return obs

    def render_image(self) -> np.ndarray:
        """What the camera sees now, the table picture wherever no robot and no object is; uint8 [H, W, 3]."""
        self.scene.sub_scenes[0].update_render()
        self._camera.take_picture()
        color = self._camera.get_picture("Color")
        background = self._camera.get_picture("PositionSegmentation")[..., 3:] == 0
        return np.where(background, self._overlay, color[..., :3])

    # -----------------------------------------------------------------------------------------------------------------
    # what is going on
    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> dict:
        """The live state, plain data; poses are p, q (wxyz) in the world frame."""

        def pose(entity_pose: sapien.Pose) -> list[float]:
            return [*map(float, entity_pose.p), *map(float, entity_pose.q)]

        obj, receptacle = self._pair
        return {
            "episode_id": self.start.episode_id,
            "object": self.object_model.name,
            "receptacle": self.receptacle_model.name,
            "extra": None,
            "table": self.table.name,
            "texture": None,
            "instruction": self.instruction,
            "object_pose": pose(obj.pose),
            "receptacle_pose": pose(receptacle.pose),
            "robot_pose": pose(self._base.entity_pose),
            "tcp_pose": pose(self._tool.entity_pose),
            "qpos": [float(q) for q in self._robot.qpos],
            "object_bbox": [list(self.object_model.lower), list(self.object_model.upper)],
            "object_grasp": None if self.object_model.grasp is None else list(self.object_model.grasp),
            "grasped": self.grasped,
            "success": self.success,
        }


def _register(variant: variants.Variant) -> None:
    env_class = type(
        variant.env_id.replace("-", "_"), (PutOnPlateInScene,), {"env_id": variant.env_id, "__module__": __name__}
    )
    register_env(variant.env_id, max_episode_steps=80)(env_class)


for _variant in variants.VARIANTS.values():
    _register(_variant)


def build(env_id: str, **kwargs) -> PutOnPlateInScene:
    """One env without wrappers, simulated and rendered on the CPU (GPU rendering: pass another render_backend)."""
    return gym.make(env_id, sim_backend="physx_cpu", **({"render_backend": "cpu"} | kwargs)).unwrapped

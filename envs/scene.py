"""Robot, camera, lights and table of the PutOnPlateInScene25 family. `envs/put_on_plate.py` adds the episodes."""

from __future__ import annotations

import numpy as np
import sapien
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseControllerConfig
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicControllerConfig
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs.types import SceneConfig, SimConfig

from envs import assets, variants
from envs.assets import catalog, hulls, shaders
from envs.registration import CAMERA, CONTROL_FREQ, CONTROL_MODE

# The builtin pack at 100 Hz is a physical system of its own, with a solver of its own. With the published settings a
# substep takes twice as long. Here contacts are sought within 5 mm, not 20, and the solver iterates 8 times, not 15.
# Fewer iterations let fingers sink deeper into what they hold: 0.45 mm at 15, 0.8 mm at 8, 1.5 mm at 4.
FAST_SOLVER = dict(contact_offset=0.005, solver_position_iterations=8)
FAST_FREQ = 100  # Hz


class WidowX250S(BaseAgent):
    """WidowX-250s with the published gains and controllers. The env adds `urdf_path` from its asset pack."""

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
            rot_upper=np.pi / 2,  # only nominal, because nothing is normalised
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


class PutOnPlateScene(BaseEnv):
    """Base of the family's envs: robot, camera, lights and table. The subclasses add episodes."""

    SUPPORTED_ROBOTS = None
    ROBOT = WidowX250S
    LOAD_POSE = sapien.Pose([0.127, 0.060, 0.85], [0, 0, 0, 1])
    env_id: str  # set by the registered subclasses

    def __init__(
        self,
        *,
        obj_set: str = "train",
        asset_pack: str = "builtin",
        asset_dir: str | None = None,
        image_size: tuple[int, int] = (640, 480),
        sim_freq: int = 500,
        protocol: str = "rl4vla",
        hulls: str | None = None,
        obs_mode: str = "none",
        **kwargs,
    ):
        """kwargs: BaseEnv's own. The others are those of `envs.make_envs`.

        hulls: "gpu" or "cpu". None is "gpu" for the published meshes, and "cpu" for bodies made by code.

        Raises:
            ValueError: this process has computed other hulls.
        """
        self.obj_set = obj_set
        self.pack = assets.asset_pack(asset_pack, asset_dir)
        self.protocol = variants.check_protocol(protocol)
        self.variant = variants.VARIANTS[self.env_id]
        self.image_size = tuple(image_size)
        self._requested_sim_freq = sim_freq
        self._hulls = hulls or ("gpu" if self.pack.name == "bridge" else "cpu")
        robot = type("WidowX250SOfPack", (self.ROBOT,), {"urdf_path": self.pack.robot_urdf})
        super().__init__(obs_mode=obs_mode, robot_uids=robot, **kwargs)

    def _setup_scene(self) -> None:
        if not self._sim_device.is_cuda():  # else ManiSkill has set the switch
            hulls.choose(self._hulls)
        with hulls.without_warning():
            super()._setup_scene()

    @property
    def _default_sim_config(self) -> SimConfig:
        is_fast = self.pack.name == "builtin" and self._requested_sim_freq == FAST_FREQ
        scene = SceneConfig(enable_enhanced_determinism=True, **(FAST_SOLVER if is_fast else {}))
        return SimConfig(sim_freq=self._requested_sim_freq, control_freq=CONTROL_FREQ, spacing=20, scene_config=scene)

    @property
    def _default_sensor_configs(self) -> CameraConfig:
        width, height = self.image_size
        fx, fy, cx, cy = catalog.CAMERA_INTRINSICS
        sx, sy = width / catalog.CAMERA_SIZE[0], height / catalog.CAMERA_SIZE[1]
        return CameraConfig(
            uid=CAMERA,
            pose=sapien.Pose(list(catalog.CAMERA_POSITION), list(catalog.CAMERA_QUATERNION)),
            width=width,
            height=height,
            intrinsic=np.array([[fx * sx, 0, cx * sx], [0, fy * sy, cy * sy], [0, 0, 1]]),
            mount=self.agent.robot.links_map["base_link"],
            shader_config=shaders.minimal_shader_config(),
        )

    def _load_agent(self, options: dict) -> None:
        super()._load_agent(options, self.LOAD_POSE)

    def _load_lighting(self, options: dict) -> None:
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        self.scene.add_directional_light([0, 0, -1], [2.2, 2.2, 2.2], shadow=False)
        self.scene.add_directional_light([-1, -0.5, -1], [0.7, 0.7, 0.7])
        self.scene.add_directional_light([1, 1, -1], [0.7, 0.7, 0.7])

    def _load_scene(self, options: dict) -> None:
        """Add arm and table. Subclasses add the rest."""
        if self.pack.arm_shine is not None:
            for robot in self.agent.robot._objs:
                sapien_utils.set_articulation_render_material(robot, **self.pack.arm_shine)
        builder = self.scene.create_actor_builder()
        builder.initial_pose = sapien.Pose()
        self.pack.add_stage(builder)
        self._arena = builder.build_static(name="arena")

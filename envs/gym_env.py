"""The family's envs as ManiSkill's own tools and gymnasium use them: arguments, observations, states, rendering.

    env = gymnasium.make("PutOnPlateInScene25Main-v3", obs_mode="rgb", render_mode="rgb_array")
    obs, info = env.reset(seed=0)                              # or options={"episode_id": 7, "obj_set": "test"}
    env.unwrapped.get_language_instruction()                   # ["put carrot on plate"]
    state = env.unwrapped.get_state_dict()                     # env.unwrapped.set_state_dict(state) comes back to it

`envs/put_on_plate.py` simulates. Training calls its `start_episode`, `advance` and `render_image` and nothing of this
file, which adds no time to them.

A state holds poses and velocities of all bodies, the arm, the commanded pose and what the task remembers: episode,
flags, counters, the boxes at rest and which bodies sleep. Setting it gives the same observation to the last bit, also
in another env of the same id. What follows is a function of state and actions. The first state of an episode gives that
episode to the last bit. Later states lack PhysX's contact caches, so what follows differs slightly from the original.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import gymnasium as gym
import numpy as np
import sapien
import torch
from gymnasium.envs.registration import EnvSpec
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.registration import register_env

from envs import rules, state_dicts, variants
from envs.assets import catalog, shaders
from envs.put_on_plate import MOVE_STEP, PutOnPlateInScene, chosen_bodies, instruction_of
from envs.registration import CAMERA, MAX_EPISODE_STEPS, MODULE, class_name
from envs.rotations import yaw_quaternion

TEXTURES = ("rgb", "depth", "segmentation", "position", "state", "state_dict")
OTHER_MODES = ("none", "rgbd", "pointcloud", "sensor_data")
PEOPLES_CAMERA = ([-0.7, -0.45, 1.45], [-0.1, 0.0, 0.9])  # m, from where to where people look


class PutOnPlateEnv(PutOnPlateInScene):
    """One env of the family. `reset(seed)` chooses the episode, or `options={"episode_id": int, "obj_set": str}`."""

    SUPPORTED_OBS_MODES = ("rgb+segmentation", "rgb", "state", "state_dict", *OTHER_MODES, "any_textures")
    SUPPORTED_REWARD_MODES = ("dense", "normalized_dense", "sparse", "none")
    _spec: EnvSpec | None = None

    def __init__(
        self,
        *,
        num_envs: int = 1,
        obs_mode: str | None = None,
        image_size: tuple[int, int] | None = None,
        sensor_configs: dict | None = None,
        human_render_camera_configs: dict | None = None,
        shader_dir: str | None = None,
        sim_backend: str = "auto",
        render_backend: str | None = None,
        **kwargs,
    ):
        """kwargs: those of `PutOnPlateScene` and BaseEnv.

        Args:
            obs_mode: "rgb+segmentation" if it is None. Textures are joined with +, such as "rgb+depth".
            image_size: (width, height) of the camera's image, 640 x 480 if it is None.
            sensor_configs: {"width": int, "height": int}, ManiSkill's way to give the image size.
            shader_dir: the shader of the cameras for people. The policy's camera keeps its own.
            render_backend: what renders. None is the GPU where there is a CUDA device, and the CPU elsewhere.

        Raises:
            ValueError: an argument that this env cannot have.
        """
        if num_envs != 1:
            raise ValueError(
                f"gymnasium.make({self.env_id!r}) makes one env, not num_envs={num_envs}: put several into gymnasium's "
                "SyncVectorEnv or AsyncVectorEnv, or call envs.make_envs."
            )
        if sim_backend not in ("auto", "cpu", "physx_cpu"):
            raise ValueError(
                f"gymnasium.make({self.env_id!r}) simulates on the CPU, not on {sim_backend!r}: leave sim_backend out, "
                "or call envs.make_envs(sim_backend='physx_cuda') for a batch on the GPU."
            )
        check_obs_mode(obs_mode)
        people = dict(human_render_camera_configs or {})
        if shader_dir is not None:
            people.setdefault("shader_pack", shader_dir)
        if render_backend is None:
            render_backend = "gpu" if torch.cuda.is_available() else "cpu"
        super().__init__(
            obs_mode=self.SUPPORTED_OBS_MODES[0] if obs_mode is None else obs_mode,
            image_size=chosen_size(image_size, sensor_configs),
            sensor_configs={},
            human_render_camera_configs=people,
            sim_backend="physx_cpu",
            render_backend=render_backend,
            **kwargs,
        )
        self._np_random = None  # resets without a seed differ from one env to the next, until one has a seed

    @property
    def spec(self) -> EnvSpec | None:
        """gymnasium's description of this env. Its id names this package, so that recordings of it can be replayed."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None and ":" not in spec.id:
            spec = dataclasses.replace(spec, id=f"{MODULE}:{spec.id}")
        self._spec = spec

    def get_language_instruction(self, **kwargs) -> list[str]:
        """The instruction of the present episode, in a list of one. kwargs are ignored, as ManiSkill's envs do."""
        return [self.instruction]

    # -----------------------------------------------------------------------------------------------------------------
    # reset and step
    # -----------------------------------------------------------------------------------------------------------------

    def reset(self, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin an episode: that of the options, or one that the seed chooses. Without a seed, np_random draws one.

        Args:
            options: "episode_id" and "obj_set", and those of BaseEnv. With "reset_to_env_states" the commanded pose is
                that of the state, where BaseEnv takes the tool's own pose.

        Raises:
            ValueError: there is no such episode, or the state is of another env.
        """
        if seed is None:
            seed = int(self.np_random.integers(2**31 - 1))
        else:
            gym.Env.reset(self, seed=int(np.ravel(seed)[0]))
        obs, info = super().reset(seed, options)
        given = (options or {}).get("reset_to_env_states")
        if given is not None:
            self._set_any_state(given["env_states"])
            info.update(self.get_info())
            obs = self._last_obs = given.get("obs") or self.get_obs(info)
        return obs, info

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        obj_set = options.get("obj_set", self.obj_set)
        total = variants.num_start_states(self.env_id, obj_set)
        episode_id = int(options["episode_id"]) if "episode_id" in options else int(torch.randint(total, (1,)))
        self.start_episode(variants.decode(self.env_id, obj_set, episode_id, self.protocol))

    def get_info(self) -> dict:
        """BaseEnv's, with a counter that later steps do not change."""
        info = super().get_info()
        return info | {"elapsed_steps": info["elapsed_steps"].clone()}

    def evaluate(self) -> dict:
        if int(self._elapsed_steps[0]) != self._judged_step:  # once per step, however often it is called
            self._judged_step = int(self._elapsed_steps[0])
            self.last_reward, _ = self._judge()
        flags = dict(
            success=self.success,
            is_grasped=self.grasped,
            grasped_once=self.grasped_once,
            consecutive_grasp=self.streak_once,
        )
        return {name: torch.tensor([flag]) for name, flag in flags.items()}

    def compute_dense_reward(self, obs: dict, action: torch.Tensor, info: dict) -> torch.Tensor:
        return torch.tensor([self.last_reward], dtype=torch.float32)

    def compute_normalized_dense_reward(self, obs: dict, action: torch.Tensor, info: dict) -> torch.Tensor:
        """The dense reward over the largest return of an episode, so that returns are at most 1."""
        return self.compute_dense_reward(obs, action, info) / (
            rules.REWARD_GRASP + rules.REWARD_STREAK + rules.REWARD_SUCCESS
        )

    # -----------------------------------------------------------------------------------------------------------------
    # observations
    # -----------------------------------------------------------------------------------------------------------------

    def _get_obs_agent(self) -> dict:
        """BaseEnv's, with a commanded pose that a later reset does not change."""
        return super()._get_obs_agent() | {"controller": self._controller_state()}

    def _controller_state(self) -> dict:
        arm = self.agent.controller.controllers["arm"]
        return {"arm": {"target_pose": arm._target_pose.raw_pose.clone()}}

    def get_sensor_params(self) -> dict:
        """BaseEnv's, in new tensors. It gives the same ones again in every step."""
        return {
            camera: {name: entry.clone() for name, entry in params.items()}
            for camera, params in super().get_sensor_params().items()
        }

    def _get_obs_extra(self, info: dict) -> dict:
        """The tool's pose and, in the state modes, those of the bodies: p, q (wxyz) in the world frame."""
        tool = self._tool.entity_pose
        tcp_pose = state_dicts.row([*tool.p, *tool.q])
        if not self.obs_mode_struct.use_state:
            return {"tcp_pose": tcp_pose}
        bodies = self.body_states()[:, :7]
        poses = {f"{name}_pose": state_dicts.row(pose) for name, pose in zip(state_dicts.BODIES, bodies)}
        if self._can_have_distractor and len(bodies) < 3:
            poses["distractor_pose"] = torch.zeros(1, 7)
        return dict(
            tcp_pose=tcp_pose,
            **poses,
            tcp_to_object=state_dicts.row(bodies[0, :3] - tool.p),
            object_to_receptacle=state_dicts.row(bodies[1, :3] - bodies[0, :3]),
            half_sizes=state_dicts.row([*self._object_half, *self._receptacle_half]),
            **{name: info[name] for name in ("is_grasped", "grasped_once", "consecutive_grasp")},
        )

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict:
        """BaseEnv's, with the table's image behind robot and objects. With depth, the table itself is rendered too."""
        visual = self.obs_mode_struct.visual
        if visual.depth or visual.position:
            self._show_table()
        else:
            self._show_stage()
        obs = super()._get_obs_sensor_data(apply_texture_transforms)
        for name, images in obs.items():
            # in mode "none" there are no images, and render() asks for one
            if name == CAMERA and apply_texture_transforms and ("rgb" in images or not images):
                images["rgb"] = torch.from_numpy(self._composed_picture())[None]
        return obs

    def _compose(self, color: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
        if self._backdrop is not None:
            segmentation = np.where(segmentation == self._backdrop.entity.per_scene_id, 0, segmentation)
        return super()._compose(color, segmentation)

    # -----------------------------------------------------------------------------------------------------------------
    # rendering for people
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _default_human_render_camera_configs(self) -> CameraConfig | list:
        """The camera for people. Training asks for no observation and no render, so it has none."""
        if self.obs_mode == "none" and self.render_mode is None:
            return []
        return CameraConfig(
            uid="render_camera",
            pose=sapien_utils.look_at(*PEOPLES_CAMERA),
            width=512,
            height=512,
            fov=1.0,
            shader_config=shaders.minimal_shader_config(),
        )

    def render_rgb_array(self, camera_name: str | None = None) -> torch.Tensor:
        self._show_table()
        return super().render_rgb_array(camera_name)

    def render_all(self) -> torch.Tensor:
        self._show_table()
        return super().render_all()

    def render_human(self) -> sapien.utils.Viewer:
        self._show_table()
        return super().render_human()

    def _show_table(self) -> None:
        """Render the table itself until the policy's camera takes its next image."""
        if self._stage_visual is None and self._backdrop is None:
            self._add_backdrop()
        (self._stage_visual or self._backdrop).visibility = 1.0

    def _add_backdrop(self) -> None:
        """Add a visual of the table where the asset pack has none. It is no body, so physics does not change."""
        material = sapien.render.RenderMaterial(base_color=[0.55, 0.45, 0.36, 1.0])
        material.roughness, material.specular = 0.9, 0.1
        table = sapien.render.RenderShapeBox([1.5, 1.5, 0.05], material)
        table.local_pose = sapien.Pose([0, 0, catalog.TABLE_HEIGHT - 0.05])
        self._backdrop = sapien.render.RenderBodyComponent()
        self._backdrop.attach(table)
        entity = sapien.Entity()
        entity.name = "table_for_people"
        entity.add_component(self._backdrop)
        self.scene.sub_scenes[0].add_entity(entity)
        self._permanent.append(entity)

    # -----------------------------------------------------------------------------------------------------------------
    # states
    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _can_have_distractor(self) -> bool:
        return state_dicts.has_distractor(self.env_id)

    def get_state_dict(self) -> dict:
        """The state in ManiSkill's form, float32 [1, n] each. Every state of one id has the same entries.

        actors          object, receptacle and, where an episode can have one, distractor: p, q, velocities [1, 13]
        articulations   the arm: pose and velocities of its root, joint positions and velocities [1, 29]
        controller      arm/target_pose: the commanded pose in the base frame [1, 7]
        task            episode, steps, flags, boxes at rest, joint targets, bodies that sleep
        """
        bodies = self.body_states()
        if self._shown_elsewhere is not None:  # protocol "rlinf": physics knows the other place
            bodies[0, :7] = [*self._shown_elsewhere.p, *self._shown_elsewhere.q]
        if self._can_have_distractor and len(bodies) < 3:
            bodies = np.concatenate([bodies, np.zeros((1, state_dicts.BODY_DIM), np.float32)])
        asleep = [self._dynamics(entity).is_sleeping for entity in self._bodies]
        targets = [joint.drive_target.item() for joint in self._robot.active_joints]
        return {
            "actors": {name: state_dicts.row(body) for name, body in zip(state_dicts.BODIES, bodies)},
            "articulations": {self.agent.robot.name: self.agent.robot.get_state().clone()},
            "controller": self._controller_state(),
            "task": {
                "episode": state_dicts.episode_numbers(self.start),
                "steps": state_dicts.row([self._step_count]),
                "streak": state_dicts.row([self.streak]),
                "flags": state_dicts.row([self.grasped, self.grasped_once, self.streak_once, self.success]),
                "rest_rotations": state_dicts.row(self._rest_rotations),
                "joint_targets": state_dicts.row(targets),
                "asleep": state_dicts.row([*asleep, *[False] * (len(state_dicts.BODIES) - len(asleep))]),
            },
        }

    def set_state_dict(self, state: dict, env_idx: torch.Tensor | None = None) -> None:
        """Come back to a state of `get_state_dict`, of this env or of another one of the same id.

        Args:
            state: entries that it lacks stay as they are. Arrays may lack the batch dimension.
            env_idx: ignored, because there is one env.

        Raises:
            ValueError: the state is of another env, or its numbers are not finite.
        """
        state = state_dicts.merged(self.get_state_dict(), state)
        start = state_dicts.episode_of(self.env_id, self.protocol, state["task"]["episode"])
        if not state["task"]["steps"].item():
            self.start_episode(start)
            if state_dicts.equal(self.get_state_dict(), state):
                return
        self._restore(start, state)

    def set_state(self, state: np.ndarray | torch.Tensor, env_idx: torch.Tensor | None = None) -> None:
        """Come back to a flat state of `get_state`. BaseEnv's own drops the commanded pose and the task."""
        self.set_state_dict(state_dicts.unflattened(self.get_state_dict(), state), env_idx)

    def _set_any_state(self, state: dict | np.ndarray | torch.Tensor) -> None:
        (self.set_state_dict if isinstance(state, dict) else self.set_state)(state)

    def _restore(self, start: variants.StartState, state: dict) -> None:
        """Put everything that a checked state names into a new PhysX scene."""
        self.start = start
        self.instruction = instruction_of(self.pack, start)
        if self.scene.can_render():
            self._load_images()
        self._fresh_physics([self._entity(*body) for body in chosen_bodies(start)])
        self._restore_bodies(state)
        self._restore_arm(state)
        task = {name: entry[0].tolist() for name, entry in state["task"].items()}
        self._measure_boxes(*(sapien.Pose(q=task["rest_rotations"][k : k + 4]) for k in (0, 4)))
        self.grasped, self.grasped_once, self.streak_once, self.success = (flag > 0.5 for flag in task["flags"])
        self.streak = round(task["streak"][0])
        self.potential = rules.potential_of(self.grasped_once, self.streak_once, self.success)
        self._step_count = self._judged_step = round(task["steps"][0])
        self._elapsed_steps[:] = self._step_count
        self._shown_elsewhere = None
        if self.protocol == "rlinf" and start.moves_to is not None and self._step_count == MOVE_STEP:
            self._shown_elsewhere = self._bodies[0].pose
            self._bodies[0].pose = sapien.Pose(list(start.moves_to), yaw_quaternion(start.object_yaw))

    def _restore_bodies(self, state: dict) -> None:
        asleep = state["task"]["asleep"][0].tolist()
        for entity, name, sleeps in zip(self._bodies, state_dicts.BODIES, asleep):
            numbers = state["actors"][name][0].numpy()
            self._place(entity, numbers[:3], numbers[3:7])
            body = self._dynamics(entity)
            body.linear_velocity, body.angular_velocity = numbers[7:10], numbers[10:13]
            if sleeps > 0.5:
                body.put_to_sleep()

    def _restore_arm(self, state: dict) -> None:
        self.agent.robot.set_state(state["articulations"][self.agent.robot.name])
        self._robot.qf = np.zeros_like(self._robot.qpos)
        for joint, target in zip(self._robot.active_joints, state["task"]["joint_targets"][0].tolist()):
            joint.drive_target = [[target]]
        self.agent.controller.reset()
        self.agent.set_controller_state(state["controller"])

    @staticmethod
    def _dynamics(entity: sapien.Entity) -> sapien.physx.PhysxRigidDynamicComponent:
        return entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)


def check_obs_mode(obs_mode: str | None) -> None:
    """Raise ValueError for a mode that the camera cannot give. ManiSkill would leave such a texture out."""
    if obs_mode is None or obs_mode in OTHER_MODES or set(obs_mode.split("+")) <= set(TEXTURES):
        return
    raise ValueError(
        f"obs_mode {obs_mode!r} is not one of this env: use {', '.join(OTHER_MODES)}, or one or more of "
        f"{', '.join(TEXTURES)}, joined with +."
    )


def chosen_size(image_size: tuple[int, int] | None, sensor_configs: dict | None) -> tuple[int, int]:
    """(width, height) of the camera's image from the two ways to say it.

    Raises:
        ValueError: the two differ, a size is no positive int, or sensor_configs holds anything else.
    """
    configs = dict(sensor_configs or {})
    configs |= configs.pop(CAMERA, {})
    for name in configs.keys() - {"width", "height"}:
        raise ValueError(
            f"sensor_configs has {name!r}, and this camera's lens and pose belong to the table's image: give width and "
            "height alone."
        )
    width, height = image_size or catalog.CAMERA_SIZE
    size = configs.get("width", width), configs.get("height", height)
    if image_size is not None and size != tuple(image_size):
        raise ValueError(
            f"image_size={tuple(image_size)} and sensor_configs={sensor_configs} differ: give one of them."
        )
    if not all(isinstance(each, int) and each > 0 for each in size):
        raise ValueError(f"the camera's image cannot have a size of {size}: give positive numbers of pixels.")
    return size


# ---------------------------------------------------------------------------------------------------------------------
# registration
# ---------------------------------------------------------------------------------------------------------------------


def _register(variant: variants.Variant) -> None:
    """Make the env class of one id, and register it with ManiSkill."""
    name = class_name(variant.env_id)
    env_class = type(name, (PutOnPlateEnv,), {"env_id": variant.env_id, "__module__": __name__})
    globals()[name] = env_class
    gym.registry.pop(variant.env_id, None)  # the lazy entry, which ManiSkill's own replaces
    register_env(variant.env_id, max_episode_steps=MAX_EPISODE_STEPS)(env_class)


for _variant in variants.VARIANTS.values():
    _register(_variant)


def build(env_id: str, **kwargs) -> PutOnPlateEnv:
    """Make one env without wrappers and, unless `obs_mode` says otherwise, without observations. The CPU renders."""
    settings = {"render_backend": "cpu", "obs_mode": "none"} | kwargs
    return gym.make(env_id, sim_backend="physx_cpu", **settings).unwrapped

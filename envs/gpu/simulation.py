"""The task in ManiSkill's batched GPU simulation: many envs, one PhysX scene, every operation on rows of tensors.

`envs/put_on_plate.py` is one scene per env; its constants, scene and rules are used here (`envs/gpu/rules.py` has the
rules as tensors). The batch runs on CUDA; with one row it runs on the CPU too, which is how tests compare the two.

What is different, and why:
- Every body that some episode of the object set has stands in every row, since a GPU scene can not change: those that
  an episode does not have lie parked behind the camera, on a shelf. Which ones an episode has is an index per row.
- An episode begins from a state that the ordinary env settled in a scene of its own (`envs/gpu/start_states.py`). So a
  reset of any rows costs no simulated time, and disturbs the others only as ManiSkill's own partial resets do: all
  states are written back to PhysX as they were read, and what PhysX remembers of contacts may be renewed.
- Where one row must be simulated and others must not (the object is moved in mid-episode, and falls), the others are
  put back to where they were. ManiSkill resets the commanded tool pose of all rows with any of them; here it does not.
- Inverse kinematics give what the CPU's solver gives (`envs/kinematics.py`).
- One process can hold PhysX's GPU simulation or its CPU simulation, not both: evaluate with the same sim_backend, or
  on the CPU with worker processes.

What is promised: the start state of an episode id, to the bit, on every device and for every number of rows. What is
not: PhysX on a GPU adds contact forces in no fixed order, so the same actions lead to slightly different states from
run to run, and after a contact to different ones. Nor is a row's course independent of the other rows to the bit.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.types import GPUMemoryConfig, SimConfig

from envs import variants
from envs.gpu import rules as rules
from envs.gpu.start_states import Settled
from envs.kinematics import BatchedPoseController, rotation_matrix
from envs.put_on_plate import (
    BASE_POSE,
    CAMERA,
    CONTROL_MODE,
    MOVE_STEP,
    SETTLE_SECONDS,
    PutOnPlateScene,
    WidowX250S,
    chosen_bodies,
    describe_episode,
    impulses_from,
    instruction_of,
    model_of,
    texture_scale,
    texture_weight_of,
    yaw_quaternion,
)

SHELF_TOP = 0.5  # m; parked bodies stand on it, behind the camera and beyond the table, 0.3 m apart
SHELF_CORNER, SHELF_PITCH, SHELF_ROW = (2.0, -1.5), 0.3, 10
CONTACTS_PER_ROW = 1024  # of PhysX's buffers; a row with all bodies at rest has about 250


class BatchedWidowX250S(WidowX250S):
    @property
    def _controller_configs(self) -> dict:
        configs = super()._controller_configs
        configs[CONTROL_MODE]["arm"].controller_cls = BatchedPoseController
        return configs


class BatchedPutOnPlate(PutOnPlateScene):
    """N rows of one env id and object set. Episodes begin by `start_episodes`, actions are given to `advance`."""

    SUPPORTED_OBS_MODES = ("none",)
    SUPPORTED_REWARD_MODES = ("none",)
    ROBOT = BatchedWidowX250S
    LOAD_POSE = BASE_POSE  # where the arm stays: nothing falls while it is in the way

    def __init__(self, env_id: str, num_envs: int, **kwargs):
        """kwargs: obj_set, asset_pack, asset_dir, image_size, sim_freq, protocol, sim_backend, render_backend."""
        self.env_id = env_id
        super().__init__(num_envs=num_envs, **kwargs)

    @property
    def _default_sim_config(self) -> SimConfig:
        config = super()._default_sim_config
        contacts = max(GPUMemoryConfig.max_rigid_contact_count, _power_of_two(CONTACTS_PER_ROW * self.num_envs))
        config.gpu_memory_config.max_rigid_contact_count = contacts
        config.gpu_memory_config.max_rigid_patch_count = contacts // 2
        config.scene_config.enable_enhanced_determinism = not self._sim_device.is_cuda()  # PhysX has it for CPUs
        return config

    # -----------------------------------------------------------------------------------------------------------------
    # scene
    # -----------------------------------------------------------------------------------------------------------------

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        needed = variants.bodies_needed(self.env_id, self.obj_set)
        self._place_of = {body: k for k, body in enumerate(needed)}  # column of each body in [N, K, 13]
        self._parked = torch.tensor([_parking_place(k) for k in range(len(needed))], device=self.device)  # [K, 13]
        shelf = self.scene.create_actor_builder()
        half = [SHELF_PITCH * SHELF_ROW / 2, SHELF_PITCH * SHELF_ROW / 2, 0.05]
        middle = [corner + side - SHELF_PITCH / 2 for corner, side in zip(SHELF_CORNER, half)]
        shelf.add_box_collision(half_size=half)
        shelf.initial_pose = sapien.Pose([*middle, SHELF_TOP - half[2]])
        shelf.build_static(name="shelf")
        actors = []
        for k, (kind, index) in enumerate(needed):
            builder = self.scene.create_actor_builder()
            self.pack.add_model(builder, model_of(self.pack, kind, index))
            builder.initial_pose = sapien.Pose(_parking_place(k)[:3])
            actors.append(builder.build_dynamic(name=f"{kind}_{index}"))
        self._objects = sum(kind == "object" for kind, _ in needed)  # the first so many of the K bodies
        self._bodies = (GpuBodies if self._sim_device.is_cuda() else CpuBodies)(self.scene, actors)
        self._begin_without_episodes(len(needed))

    def _begin_without_episodes(self, count: int) -> None:
        """Everything that is kept per row."""
        n, device = self.num_envs, self.device
        self._row = torch.arange(n, device=device)
        self.starts: list[variants.StartState | None] = [None] * n
        self._chosen = torch.zeros(n, 2, dtype=torch.int64, device=device)  # columns of object and receptacle
        self._half_sizes = torch.zeros(n, 2, 3, device=device)
        self._table = torch.zeros(n, dtype=torch.int64, device=device)
        self._texture = torch.zeros(n, dtype=torch.int64, device=device)
        self._texture_weight = torch.zeros(n, device=device)
        self._moves_to = torch.full((n, 7), torch.nan, device=device)  # p, q; not a number where it stays
        self._step_count = torch.zeros(n, dtype=torch.int64, device=device)
        self._shown_elsewhere: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, poses [R, 7]
        self.latches = rules.Latches.zeros(n, device)
        self.rewards = torch.zeros(n, dtype=torch.float64, device=device)
        self.success, self.grasped = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))
        self._advanced = self._judged = 0  # control steps of the whole batch

    def _after_reconfigure(self, options: dict):
        """The GPU simulation has begun: bodies have their places in its buffers."""
        links = self.agent.robot.links_map
        self._fingers = links["left_finger_link"], links["right_finger_link"]
        self._forces = (GpuForces if self.gpu_sim_enabled else CpuForces)(
            self.scene, self._fingers, self._bodies.actors, self._objects
        )
        self._load_pictures()

    def _load_pictures(self) -> None:
        """All table pictures and, where the variant has them, textures, on the device: uint8 [21, H, W, 3]."""

        def bank(picture_of, scale: int) -> torch.Tensor:
            width, height = (scale * size for size in self.image_size)
            pictures = [picture_of(index, width, height) for index in range(len(self.pack.tables))]
            return torch.from_numpy(np.stack(pictures)).to(self.device)

        self._overlays = bank(self.pack.picture, 1)
        self._textures = bank(self.pack.texture, texture_scale(self.variant)) if self.variant.texture_on else None

    # -----------------------------------------------------------------------------------------------------------------
    # episode
    # -----------------------------------------------------------------------------------------------------------------

    def start_episodes(self, chosen: list[int], starts: list[variants.StartState], settled: list[Settled]) -> None:
        """Begin these episodes in rows `chosen`; the other rows go on with theirs."""
        order = np.argsort(chosen)  # ManiSkill's masks want rows in order
        chosen, starts, settled = ([values[i] for i in order] for values in (chosen, starts, settled))
        where = torch.tensor(chosen, device=self.device)
        states = self._parked.repeat(len(chosen), 1, 1)
        for i, (start, state) in enumerate(zip(starts, settled)):
            columns = [self._place_of[body] for body in chosen_bodies(start)]
            states[i, columns] = torch.from_numpy(state.bodies).to(self.device)
            self.starts[chosen[i]] = start
            self._chosen[chosen[i]] = torch.tensor(columns[:2], device=self.device)
        self._bodies.write(where, states)
        self._put_robot(where, torch.from_numpy(np.stack([state.qpos for state in settled])))
        self._half_sizes[where] = self._tensor([state.half_sizes for state in settled])
        self._table[where] = self._tensor([start.table_index for start in starts], torch.int64)
        self._texture[where] = self._tensor([start.texture_index or 0 for start in starts], torch.int64)
        weights = [texture_weight_of(self.pack, self.variant, start) for start in starts]
        self._texture_weight[where] = self._tensor(weights)
        self._moves_to[where] = self._tensor([_moves_to(start) for start in starts])
        self._step_count[where] = 0
        self.latches.clear(where)
        self.rewards[where] = 0
        self.success[where] = self.grasped[where] = False

    def _tensor(self, values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype, device=self.device)

    def _put_robot(self, where: torch.Tensor, qpos: torch.Tensor) -> None:
        """Arms of some rows at `qpos` [R, 8], unmoving, driven to where they are; the commanded tool pose is theirs."""
        robot, everyone = self.agent.robot, self.scene._reset_mask
        qpos = qpos.to(self.device)
        self.scene._reset_mask = torch.zeros_like(everyone)
        self.scene._reset_mask[where] = True
        robot.set_qpos(qpos)
        robot.set_qvel(torch.zeros_like(qpos))
        robot.set_qf(torch.zeros_like(qpos))
        robot.set_joint_drive_targets(qpos, robot.active_joints)
        self._apply()
        self.agent.controller.reset()
        self.scene._reset_mask = everyone

    def _apply(self) -> None:
        """What was written into the GPU's buffers becomes the state, and links follow joints."""
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
            self.scene.px.gpu_update_articulation_kinematics()
            self.scene._gpu_fetch_all()

    @property
    def instructions(self) -> list[str]:
        return [instruction_of(self.pack, start) for start in self.starts]

    # -----------------------------------------------------------------------------------------------------------------
    # step
    # -----------------------------------------------------------------------------------------------------------------

    def advance(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One control step of all rows; actions float32 [N, 7], gripper 1 or -1.

        Returns: rewards float64 [N], success bool [N].
        """
        self._step_action(actions.to(self.device))
        self.evaluate()
        return self.rewards, self.success

    def _before_control_step(self):
        if self._shown_elsewhere is not None:
            where, poses = self._shown_elsewhere
            self._set_object_poses(where, poses)
            self._shown_elsewhere = None

    def _after_control_step(self):
        self._advanced += 1
        self._step_count += 1
        if not variants.lookup(self.env_id, self.obj_set).moves:
            return
        moving = (self._step_count == MOVE_STEP) & ~self._moves_to[:, 0].isnan()
        where = torch.nonzero(moving)[:, 0]
        if not len(where):
            return
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        if self.protocol == "rlinf":
            self._shown_elsewhere = where, self._bodies.read()[where, self._chosen[where, 0], :7].clone()
        self._set_object_poses(where, self._moves_to[where])
        if self.protocol == "rl4vla":
            self._substeps_of(moving, round(SETTLE_SECONDS * self.sim_freq))

    def _set_object_poses(self, where: torch.Tensor, poses: torch.Tensor) -> None:
        """Put the objects of some rows elsewhere, [R, 7]; velocities stay."""
        states = self._bodies.read()[where]
        states[torch.arange(len(where), device=self.device), self._chosen[where, 0], :7] = poses
        self._bodies.write(where, states)
        self._apply()

    def _substeps_of(self, moving: torch.Tensor, count: int) -> None:
        """Simulate `count` substeps for the rows of a mask; the others are put back to where they were."""
        resting = torch.nonzero(~moving)[:, 0]
        robot = self.agent.robot
        before = [x[resting].clone() for x in (self._bodies.read(), robot.get_qpos(), robot.get_qvel())]
        for _ in range(count):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        if not len(resting):
            return
        self._bodies.write(resting, before[0])
        everyone, self.scene._reset_mask = self.scene._reset_mask, ~moving
        robot.set_qpos(before[1])
        robot.set_qvel(before[2])
        self.scene._reset_mask = everyone
        self._apply()

    def evaluate(self) -> dict:
        """Look at contacts and poses once per control step, however often somebody asks: bool [N] each."""
        if self._judged != self._advanced:
            self._judged = self._advanced
            self._judge()
        return dict(
            success=self.success,
            is_grasped=self.grasped,
            grasped_once=self.latches.grasped_once,
            consecutive_grasp=self.latches.streak_once,
        )

    def _judge(self) -> None:
        left, right, on = self._forces.read(self._row, self._chosen[:, 0], self._chosen[:, 1])
        # the left finger opens along its +y, the right one along its -y
        openings = [rotation_matrix(finger.pose.q)[..., 1] for finger in self._fingers]
        self.grasped = rules.pressed_open(openings[0], left) & rules.pressed_open(-openings[1], right)
        positions = self._bodies.read()[self._row[:, None], self._chosen, :3]  # [N, 2, 3]
        halves = self._half_sizes
        above = rules.over_receptacle(positions[:, 0], positions[:, 1], halves[:, 0], halves[:, 1])
        self.success = above & rules.touches(on)
        self.rewards = self.latches.update(self.grasped, self.success)

    def finite(self) -> torch.Tensor:
        """Whether everything that moves in a row still has numbers for a state: bool [N]."""
        states = self._bodies.read()[self._row[:, None], self._chosen]
        return states.isfinite().all(-1).all(-1) & self.agent.robot.get_qpos().isfinite().all(-1)

    # -----------------------------------------------------------------------------------------------------------------
    # picture, description
    # -----------------------------------------------------------------------------------------------------------------

    def render_images(self) -> torch.Tensor:
        """What the cameras see, table pictures wherever no robot and no object is: uint8 [N, H, W, 3]."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self._sensors[CAMERA].capture()
        obs = self._sensors[CAMERA].get_obs(rgb=True, depth=False, position=False, segmentation=True)
        segmentation = obs["segmentation"][..., 0].to(self.device)
        stage = self._arena.per_scene_id[:, None, None]
        seen = (segmentation != 0) & (segmentation != stage)
        picture = rules.compose(obs["rgb"].to(self.device), seen, self._overlays[self._table])
        if self._textures is None:
            return picture
        return rules.textured(
            picture, seen, self._textures, self._texture, self._texture_weight, self.variant.texture_on
        )

    def privileged_states(self) -> torch.Tensor:
        """Of every row what `PutOnPlateInScene.privileged_state` gives: float32 [N, 45]."""
        bodies = self._bodies.read()[self._row[:, None], self._chosen, :7]  # [N, 2, 7]
        latches = self.latches
        flags = (self.grasped, latches.grasped_once, latches.streak_once, latches.streak.clamp(max=rules.GRASP_STREAK))
        return rules.privileged_state(
            self.agent.robot.links_map["ee_gripper_link"].pose.raw_pose,
            self.agent.robot.get_qpos(),
            bodies[:, 0],
            bodies[:, 1],
            self._half_sizes,
            torch.stack([flag.float() for flag in flags], dim=1),
        )

    def describe(self) -> list[dict]:
        """The live state of every row, plain data as `PutOnPlateInScene.describe` gives it."""
        links, states = self.agent.robot.links_map, self._bodies.read()[..., :7].tolist()
        columns = [[self._place_of[body] for body in chosen_bodies(start)] for start in self.starts]
        robot, tool = (links[name].pose.raw_pose.tolist() for name in ("base_link", "ee_gripper_link"))
        qpos, grasped, success = self.agent.robot.get_qpos().tolist(), self.grasped.tolist(), self.success.tolist()
        return [
            describe_episode(
                self.pack,
                self.variant,
                start,
                [states[i][column] for column in columns[i]],
                robot_pose=robot[i],
                tcp_pose=tool[i],
                qpos=qpos[i],
                grasped=grasped[i],
                success=success[i],
            )
            for i, start in enumerate(self.starts)
        ]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _parking_place(k: int) -> list[float]:
    """State [13] of body k a little above the shelf; frames' origins are up to 6 cm above undersides."""
    x, y = SHELF_CORNER[0] + SHELF_PITCH * (k % SHELF_ROW), SHELF_CORNER[1] + SHELF_PITCH * (k // SHELF_ROW)
    return [x, y, SHELF_TOP + 0.06, 1.0, *[0.0] * 9]


def _moves_to(start: variants.StartState) -> list[float]:
    """Pose [7] of the object after the move in mid-episode; not a number where there is none."""
    return [np.nan] * 7 if start.moves_to is None else [*start.moves_to, *yaw_quaternion(start.object_yaw)]


# ---------------------------------------------------------------------------------------------------------------------
# states and contact forces, where the simulation keeps them
# ---------------------------------------------------------------------------------------------------------------------


class GpuBodies:
    """States of all bodies in PhysX's own buffer on the GPU."""

    def __init__(self, scene, actors: list[Actor]):
        self.scene, self.actors = scene, actors
        self._index: torch.Tensor | None = None  # known once the GPU simulation has begun

    def _rows(self) -> torch.Tensor:
        if self._index is None:
            self._index = torch.stack([actor._body_data_index for actor in self.actors], dim=1).long()  # [N, K]
        return self._index

    def read(self) -> torch.Tensor:
        """float32 [N, K, 13] as of the last fetch: p, q (wxyz), linear and angular velocity."""
        return self.scene.px.cuda_rigid_body_data.torch()[self._rows()]

    def write(self, where: torch.Tensor, states: torch.Tensor) -> None:
        """States [R, K, 13] into rows `where`; they count once they are applied."""
        self.scene.px.cuda_rigid_body_data.torch()[self._rows()[where]] = states


class CpuBodies:
    """The same of one row on the CPU, where every body is an object of its own."""

    def __init__(self, scene, actors: list[Actor]):
        self.actors = actors
        self._entities = [actor._objs[0] for actor in actors]
        self._bodies = [
            entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent) for entity in self._entities
        ]

    def read(self) -> torch.Tensor:
        rows = [
            [*entity.pose.p, *entity.pose.q, *body.linear_velocity, *body.angular_velocity]
            for entity, body in zip(self._entities, self._bodies)
        ]
        return torch.tensor(np.array(rows, np.float32))[None]

    def write(self, where: torch.Tensor, states: torch.Tensor) -> None:
        if not len(where):
            return
        for entity, body, state in zip(self._entities, self._bodies, states[0].numpy()):
            entity.pose = sapien.Pose(state[:3], state[3:7])
            body.linear_velocity, body.angular_velocity = state[7:10], state[10:]
            body.wake_up()


class GpuForces:
    """Contact forces between pairs of bodies; PhysX sums them on the GPU for all pairs that an episode may ask for."""

    def __init__(self, scene, fingers, actors: list[Actor], num_objects: int):
        self._px, self._num_envs = scene.px, scene.num_envs
        objects, self._first_receptacle = actors[:num_objects], num_objects
        self._on_fingers = self._query(fingers, objects)
        self._on_receptacles = self._query(actors[num_objects:], objects)

    def _query(self, touched: list, objects: list[Actor]) -> tuple:
        """The query and its shape [touched, objects, N]."""
        pairs = [pair for one in touched for obj in objects for pair in zip(one._bodies, obj._bodies)]
        return self._px.gpu_create_contact_pair_impulse_query(pairs), (len(touched), len(objects), self._num_envs, 3)

    def _forces(self, query: tuple) -> torch.Tensor:
        self._px.gpu_query_contact_pair_impulses(query[0])
        return query[0].cuda_impulses.torch().reshape(query[1]) / self._px.timestep

    def read(self, row: torch.Tensor, obj: torch.Tensor, receptacle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Forces [N, 3] (N) of the last substep: object on left finger, on right finger, on receptacle."""
        left, right = self._forces(self._on_fingers)[:, obj, row]
        return left, right, self._forces(self._on_receptacles)[receptacle - self._first_receptacle, obj, row]


class CpuForces:
    """The same of one row on the CPU, from the list of all contacts."""

    def __init__(self, scene, fingers, actors: list[Actor], num_objects: int):
        self._px = scene.px
        self._fingers = [finger._objs[0].entity for finger in fingers]
        self._entities = [actor._objs[0] for actor in actors]

    def read(self, row: torch.Tensor, obj: torch.Tensor, receptacle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        touched = (*self._fingers, self._entities[int(receptacle[0])])
        impulses = impulses_from(self._entities[int(obj[0])], touched, self._px.get_contacts())
        return tuple(torch.from_numpy(impulses[body] / self._px.timestep)[None].float() for body in touched)

"""The task in ManiSkill's batched GPU simulation: many envs in one PhysX scene, every operation on rows of tensors.

`envs/put_on_plate.py` has one scene per env. This file has the same scene, and the same rules and images in their forms
for many rows (`envs/rules.py`, `envs/images.py`). The batch runs on CUDA. A batch of one row runs on the CPU too, which
is how tests compare the two.

Differences from one scene per env, with their reasons:
- A GPU scene cannot change, so every row holds every body of any episode of the object set. Bodies that an episode does
  not use are parked on a shelf behind the camera. An index per row says which bodies an episode uses.
- An episode begins from a state that the ordinary env settled in its own scene (`envs/gpu/start_states.py`). So
  resetting some rows takes no simulated time. It disturbs the other rows only as ManiSkill's own partial resets do:
  all states are written back to PhysX as they were read, and PhysX may forget what it remembers of contacts.
- An object that is moved during the episode falls, which is simulated for its row only. The other rows are put back to
  where they were.
- ManiSkill resets the commanded tool pose of all rows with any of them. Here it resets those rows only.
- Inverse kinematics give the results of the CPU's solver (`envs/kinematics.py`).
- PhysX's GPU simulation must be the first one of its process. Evaluate with the same sim_backend, or on the CPU with
  worker processes.

**Experimental: nothing of this was run on a GPU yet.** `benchmarks/gpu_check.py --only world` is what to run first.

The start state of an episode id is the same in every row to 4 um (with up to 128 rows). On a GPU all rows share one
coordinate system, 20 m apart, and a float32 that is 120 m from the origin has steps of 7.6 um. The course of an episode
is not exact: PhysX on a GPU adds contact forces in no fixed order. So the same actions lead to slightly different
states from run to run, and to clearly different ones after a contact. Other rows may also change a row's last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import sapien
import torch
from mani_skill.utils.structs.types import GPUMemoryConfig, SimConfig

from envs import images, rules, shadows, variants
from envs.gpu.bodies import CpuBodies, CpuForces, GpuBodies, GpuForces
from envs.gpu.start_states import Settled
from envs.kinematics import BatchedPoseController, rotation_matrix
from envs.put_on_plate import (
    BASE_POSE,
    MOVE_STEP,
    SETTLE_SECONDS,
    chosen_bodies,
    describe_episode,
    instruction_of,
    model_of,
    texture_scale,
    texture_weight_of,
)
from envs.registration import CAMERA, CONTROL_MODE
from envs.rotations import yaw_quaternion
from envs.scene import PutOnPlateScene, WidowX250S

# the shelf for parked bodies, behind the camera and beyond the table
SHELF_TOP = 0.5  # m
SHELF_CORNER = (2.0, -1.5)  # m, world x, y of the first body
SHELF_PITCH = 0.3  # m between bodies
SHELF_ROW = 10  # bodies per row
CONTACTS_PER_ROW = 1024  # in PhysX's buffers. A row with all bodies at rest has about 250


class BatchedWidowX250S(WidowX250S):
    """The arm with the batched controller of its tool's pose."""

    @property
    def _controller_configs(self) -> dict:
        configs = super()._controller_configs
        configs[CONTROL_MODE]["arm"].controller_cls = BatchedPoseController
        return configs


class BatchedPutOnPlate(PutOnPlateScene):
    """N rows of one env id and object set. `start_episodes` begins episodes, and `advance` executes actions."""

    SUPPORTED_OBS_MODES = ("none",)
    SUPPORTED_REWARD_MODES = ("none",)
    ROBOT = BatchedWidowX250S
    LOAD_POSE = BASE_POSE  # the arm can stay here, because nothing settles in this scene

    def __init__(self, env_id: str, num_envs: int, **kwargs):
        """kwargs: obj_set, asset_pack, asset_dir, image_size, sim_freq, protocol, hulls and the two backends."""
        self.env_id = env_id
        super().__init__(num_envs=num_envs, **kwargs)

    @property
    def _default_sim_config(self) -> SimConfig:
        config = super()._default_sim_config
        contacts = max(GPUMemoryConfig.max_rigid_contact_count, _power_of_two(CONTACTS_PER_ROW * self.num_envs))
        config.gpu_memory_config.max_rigid_contact_count = contacts
        config.gpu_memory_config.max_rigid_patch_count = contacts // 2
        config.scene_config.enable_enhanced_determinism = not self._sim_device.is_cuda()  # on CPUs only
        return config

    # -----------------------------------------------------------------------------------------------------------------
    # scene
    # -----------------------------------------------------------------------------------------------------------------

    def _load_scene(self, options: dict) -> None:
        """Add the shelf and every body of any episode, parked."""
        super()._load_scene(options)
        needed = variants.bodies_needed(self.env_id, self.obj_set)
        self._place_of = {body: k for k, body in enumerate(needed)}  # index of each body in [N, K, 13]
        self._parked = torch.tensor([_parking_place(k) for k in range(len(needed))], device=self.device)  # [K, 13]
        self._add_shelf()
        actors = []
        for k, (kind, index) in enumerate(needed):
            builder = self.scene.create_actor_builder()
            self.pack.add_model(builder, model_of(self.pack, kind, index))
            builder.initial_pose = sapien.Pose(_parking_place(k)[:3])
            actors.append(builder.build_dynamic(name=f"{kind}_{index}"))
        self._num_objects = [kind for kind, _ in needed].count("object")  # these come first among the K bodies
        bodies_class = GpuBodies if self._sim_device.is_cuda() else CpuBodies
        self._bodies = bodies_class(self.scene, actors)
        self._begin_without_episodes()

    def _add_shelf(self) -> None:
        half_side = SHELF_PITCH * SHELF_ROW / 2
        half_height = 0.05
        middle = [corner + half_side - SHELF_PITCH / 2 for corner in SHELF_CORNER]
        shelf = self.scene.create_actor_builder()
        shelf.add_box_collision(half_size=[half_side, half_side, half_height])
        shelf.initial_pose = sapien.Pose([*middle, SHELF_TOP - half_height])
        shelf.build_static(name="shelf")

    def _begin_without_episodes(self) -> None:
        """Create everything that is kept per row."""
        n, device = self.num_envs, self.device
        self._row = torch.arange(n, device=device)
        self.starts: list[variants.StartState | None] = [None] * n
        self._chosen = torch.zeros(n, 2, dtype=torch.int64, device=device)  # indices of object and receptacle
        self._half_sizes = torch.zeros(n, 2, 3, device=device)
        self._casters = torch.zeros(n, 2, dtype=torch.int64, device=device)  # indices of objects, -1 for none
        self._flat = torch.zeros(n, 2, dtype=torch.int64, device=device)  # indices of receptacles
        self._table = torch.zeros(n, dtype=torch.int64, device=device)
        self._texture = torch.zeros(n, dtype=torch.int64, device=device)
        self._texture_weight = torch.zeros(n, device=device)
        self._moves_to = torch.full((n, 7), torch.nan, device=device)  # p, q. NaN where the object is not moved
        self._step_count = torch.zeros(n, dtype=torch.int64, device=device)
        self._shown_elsewhere: tuple[torch.Tensor, torch.Tensor] | None = None  # rows, poses [R, 7]
        self.latches = rules.Latches.zeros(n, device)
        self.rewards = torch.zeros(n, dtype=torch.float64, device=device)
        self.success = torch.zeros(n, dtype=torch.bool, device=device)
        self.grasped = torch.zeros(n, dtype=torch.bool, device=device)
        # rows whose contact forces are those of an earlier substep, bool [N], and these forces, 3 x [N, 3]
        self._earlier_forces: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._num_steps = 0  # control steps of the whole batch
        self._judged_step = 0  # the step that success and rewards belong to

    def _after_reconfigure(self, options: dict) -> None:
        """Called once the GPU simulation has begun, so that bodies have their places in its buffers."""
        links = self.agent.robot.links_map
        self._fingers = links["left_finger_link"], links["right_finger_link"]
        forces_class = GpuForces if self.gpu_sim_enabled else CpuForces
        self._forces = forces_class(self.scene, self._fingers, self._bodies.actors, self._num_objects)
        self._load_images()

    def _load_images(self) -> None:
        """Load all table images and, if the variant has them, textures onto the device."""
        self._overlays = self._stack_of_tables(self.pack.table_image, 1)  # uint8 [21, H, W, 3]
        self._textures = None
        if self.variant.texture_on:
            self._textures = self._stack_of_tables(self.pack.texture, texture_scale(self.variant))

        if self.pack.casts_shadows:
            boxes = [shadows.box_of(model_of(self.pack, *body)) for body in self._place_of]
            boxes = [[*middle, *half] for middle, half in [*boxes, *shadows.TIPS]]
            self._shadow_boxes = torch.tensor(boxes, dtype=torch.float64, device=self.device)  # [K + 2, 6]
            ids = [actor.per_scene_id for actor in self._bodies.actors]
            self._scene_ids = torch.stack(ids, dim=1).to(self.device)  # [N, K]

    def _stack_of_tables(self, image_of: Callable[[int, int, int], np.ndarray], scale: int) -> torch.Tensor:
        """The image of every table at `scale` times the image size, uint8 [21, h, w, 3]."""
        width, height = (scale * size for size in self.image_size)
        images = [image_of(index, width, height) for index in range(len(self.pack.tables))]
        return torch.from_numpy(np.stack(images)).to(self.device)

    # -----------------------------------------------------------------------------------------------------------------
    # episode
    # -----------------------------------------------------------------------------------------------------------------

    def start_episodes(self, chosen: list[int], starts: list[variants.StartState], settled: list[Settled]) -> None:
        """Begin these episodes in rows `chosen`. The episodes of the other rows continue."""
        order = np.argsort(chosen)  # ManiSkill's masks need rows in order
        chosen = [chosen[i] for i in order]
        starts = [starts[i] for i in order]
        settled = [settled[i] for i in order]
        where = torch.tensor(chosen, device=self.device)
        states = self._parked.repeat(len(chosen), 1, 1)  # [R, K, 13]
        for i, (row, start, state) in enumerate(zip(chosen, starts, settled)):
            places = [self._place_of[body] for body in chosen_bodies(start)]
            states[i, places] = torch.from_numpy(state.bodies).to(self.device)
            self.starts[row] = start
            self._chosen[row] = torch.tensor(places[:2], device=self.device)
            objects = [place for place in places if place < self._num_objects]
            flat = [place for place in places if place >= self._num_objects]
            self._casters[row] = torch.tensor((*objects, -1)[:2], device=self.device)
            self._flat[row] = torch.tensor((*flat, flat[0])[:2], device=self.device)
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
        self.success[where] = False
        self.grasped[where] = False

    def _tensor(self, values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype, device=self.device)

    def _put_robot(self, where: torch.Tensor, qpos: torch.Tensor) -> None:
        """Put the arms of some rows at `qpos` [R, 8], at rest, with drives and commanded tool poses that hold them."""
        robot = self.agent.robot
        qpos = qpos.to(self.device)
        all_rows = self.scene._reset_mask
        self.scene._reset_mask = torch.zeros_like(all_rows)
        self.scene._reset_mask[where] = True
        robot.set_qpos(qpos)
        robot.set_qvel(torch.zeros_like(qpos))
        robot.set_qf(torch.zeros_like(qpos))
        robot.set_joint_drive_targets(qpos, robot.active_joints)
        self._apply()
        self.agent.controller.reset()
        self.scene._reset_mask = all_rows

    def _apply(self) -> None:
        """Make the values in the GPU's buffers the state of the simulation, and move links with their joints."""
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
        """Simulate one control step of all rows with actions float32 [N, 7], gripper 1 or -1.

        Returns: rewards float64 [N], success bool [N].
        """
        self._step_action(actions.to(self.device))
        self.evaluate()
        return self.rewards, self.success

    def _before_control_step(self) -> None:
        if self._shown_elsewhere is not None:
            where, poses = self._shown_elsewhere
            self._set_object_poses(where, poses)
            self._shown_elsewhere = None

    def _after_control_step(self) -> None:
        self._num_steps += 1
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
            self._earlier_forces = ~moving, self._read_forces()
            self._substeps_of(moving, round(SETTLE_SECONDS * self.sim_freq))

    def _set_object_poses(self, where: torch.Tensor, poses: torch.Tensor) -> None:
        """Put the objects of some rows at `poses` [R, 7]. Their velocities stay."""
        states = self._bodies.read()[where]
        states[torch.arange(len(where), device=self.device), self._chosen[where, 0], :7] = poses
        self._bodies.write(where, states)
        self._apply()

    def _substeps_of(self, moving: torch.Tensor, count: int) -> None:
        """Simulate `count` substeps for the rows of a mask bool [N]. The others are put back to where they were."""
        resting = torch.nonzero(~moving)[:, 0]
        robot = self.agent.robot
        states = self._bodies.read()[resting].clone()
        qpos = robot.get_qpos()[resting].clone()
        qvel = robot.get_qvel()[resting].clone()
        for _ in range(count):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        if not len(resting):
            return
        self._bodies.write(resting, states)
        all_rows = self.scene._reset_mask
        self.scene._reset_mask = ~moving
        robot.set_qpos(qpos)
        robot.set_qvel(qvel)
        self.scene._reset_mask = all_rows
        self._apply()

    def _read_forces(self) -> tuple[torch.Tensor, ...]:
        """Forces (N) of the last substep, [N, 3] each: of the object on left finger, right finger and receptacle."""
        obj, receptacle = self._chosen.unbind(1)  # [N] each
        return tuple(self._forces.read(self._row, obj, receptacle))

    def evaluate(self) -> dict:
        """All flags, bool [N] each. Contacts and poses are read once per control step, however often it is called."""
        if self._judged_step != self._num_steps:
            self._judged_step = self._num_steps
            self._judge()
        return dict(
            success=self.success,
            is_grasped=self.grasped,
            grasped_once=self.latches.grasped_once,
            consecutive_grasp=self.latches.streak_once,
        )

    def _judge(self) -> None:
        """Update flags and rewards from contacts and poses."""
        forces = self._read_forces()
        if self._earlier_forces is not None:  # of rows that were put back after the substeps of others
            rows, earlier = self._earlier_forces
            forces = [torch.where(rows[:, None], before, now) for before, now in zip(earlier, forces)]
            self._earlier_forces = None
        on_left, on_right, on_receptacle = forces
        left_finger, right_finger = self._fingers
        left_opening = rotation_matrix(left_finger.pose.q)[..., 1]  # along its +y
        right_opening = -rotation_matrix(right_finger.pose.q)[..., 1]  # along its -y
        left_holds = rules.pressed_open_rows(left_opening, on_left)
        right_holds = rules.pressed_open_rows(right_opening, on_right)
        self.grasped = left_holds & right_holds
        object_position, receptacle_position = self._chosen_states()[..., :3].unbind(1)
        object_half, receptacle_half = self._half_sizes.unbind(1)
        above = rules.over_receptacle_rows(object_position, receptacle_position, object_half, receptacle_half)
        self.success = above & rules.touches_rows(on_receptacle)
        self.rewards = self.latches.update(self.grasped, self.success)

    def _chosen_states(self) -> torch.Tensor:
        """States of each row's object and receptacle, float32 [N, 2, 13]."""
        return self._bodies.read()[self._row[:, None], self._chosen]

    def finite(self) -> torch.Tensor:
        """Whether the states of object, receptacle and arm are finite: bool [N]."""
        finite_bodies = self._chosen_states().isfinite().all(-1).all(-1)
        finite_arm = self.agent.robot.get_qpos().isfinite().all(-1)
        return finite_bodies & finite_arm

    # -----------------------------------------------------------------------------------------------------------------
    # image, description
    # -----------------------------------------------------------------------------------------------------------------

    def render_images(self, rows: torch.Tensor) -> torch.Tensor:
        """The cameras' images of rows [R], uint8 [R, H, W, 3]. Table images are wherever no robot and no object is."""
        rows = rows.to(self.device)
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        self._sensors[CAMERA].capture()
        obs = self._sensors[CAMERA].get_obs(rgb=True, depth=False, position=False, segmentation=True)
        segmentation = obs["segmentation"][..., 0].to(self.device)[rows]
        stage = self._arena.per_scene_id[rows, None, None]
        foreground = (segmentation != 0) & (segmentation != stage)  # robot and objects
        image = images.compose_rows(obs["rgb"].to(self.device)[rows], foreground, self._overlays[self._table[rows]])
        if self.pack.casts_shadows:
            image = self._with_shadows(image, segmentation, foreground, rows)
        if self._textures is None:
            return image
        which, weight = self._texture[rows], self._texture_weight[rows]
        return images.textured_rows(image, foreground, self._textures, which, weight, self.variant.texture_on)

    def _with_shadows(
        self, image: torch.Tensor, ids: torch.Tensor, foreground: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Draw the shadows of objects and finger tips onto the tables and onto receptacles.

        Args:
            image: uint8 [K, H, W, 3], of the K rows `rows`.
            ids: integers [K, H, W], what each pixel shows.
            foreground: bool [K, H, W], robot and objects.
            rows: int64 [K] or bool [N].
        """
        numbers, chosen = self._row[rows], self._casters[rows]
        flat = self._scene_ids[numbers[:, None], self._flat[rows]]  # [K, 2]
        upright = foreground & (ids != flat[:, :1, None]) & (ids != flat[:, 1:, None])
        eye = shadows.eye_of(*self.image_size)
        boxes = self._shadow_boxes[chosen]  # [K, 2, 6]
        states = self._bodies.read()[numbers[:, None], chosen]
        casters = [(states[:, k, :7], boxes[:, k], chosen[:, k] >= 0) for k in range(2)]
        for finger, box in zip(self._fingers, self._shadow_boxes[-2:]):
            casters.append((finger.pose.raw_pose[rows], box.expand(len(numbers), 6), numbers >= 0))
        for pose, box, present in casters:
            middle, half = box.unbind(1)[:3], box.unbind(1)[3:]
            spot = shadows.spot_of(pose.double().unbind(1), middle, half, eye)
            image = images.shaded_rows(image, upright, spot._replace(darkness=spot.darkness * present))
        return image

    def privileged_states(self) -> torch.Tensor:
        """`PutOnPlateInScene.privileged_state` of every row: float32 [N, 45]."""
        obj, receptacle = self._chosen_states()[..., :7].unbind(1)
        latches = self.latches
        flags = (self.grasped, latches.grasped_once, latches.streak_once, latches.streak.clamp(max=rules.GRASP_STREAK))
        return rules.privileged_state_rows(
            self.agent.robot.links_map["ee_gripper_link"].pose.raw_pose,
            self.agent.robot.get_qpos(),
            obj,
            receptacle,
            self._half_sizes,
            torch.stack([flag.float() for flag in flags], dim=1),
        )

    def describe(self) -> list[dict]:
        """`PutOnPlateInScene.describe` of every row, as plain data."""
        links = self.agent.robot.links_map
        poses = self._bodies.read()[..., :7].tolist()
        robot = links["base_link"].pose.raw_pose.tolist()
        tool = links["ee_gripper_link"].pose.raw_pose.tolist()
        qpos = self.agent.robot.get_qpos().tolist()
        grasped, success = self.grasped.tolist(), self.success.tolist()
        return [
            describe_episode(
                self.pack,
                self.variant,
                start,
                [poses[i][self._place_of[body]] for body in chosen_bodies(start)],
                robot_pose=robot[i],
                tcp_pose=tool[i],
                qpos=qpos[i],
                grasped=grasped[i],
                success=success[i],
            )
            for i, start in enumerate(self.starts)
        ]


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()


def _parking_place(k: int) -> list[float]:
    """State [13] of body k a little above the shelf. The origins of bodies are up to 6 cm above their undersides."""
    row, column = divmod(k, SHELF_ROW)
    x = SHELF_CORNER[0] + SHELF_PITCH * column
    y = SHELF_CORNER[1] + SHELF_PITCH * row
    position, rotation, velocities = [x, y, SHELF_TOP + 0.06], [1.0, 0.0, 0.0, 0.0], [0.0] * 6
    return position + rotation + velocities


def _moves_to(start: variants.StartState) -> list[float]:
    """Pose [7] that the object is moved to during the episode, NaN if it is not moved."""
    if start.moves_to is None:
        return [np.nan] * 7
    return [*start.moves_to, *yaw_quaternion(start.object_yaw)]

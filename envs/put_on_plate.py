"""The ManiSkill task PutOnPlateInScene25: a WidowX-250s puts one object on one receptacle. Rewritten after RL4VLA.

This file has the physics, the rules and the image of one scene. `envs/gym_env.py` makes an ordinary ManiSkill env of
it, with observations, states and cameras for people.

Differences from RL4VLA's env (arXiv 2505.19789), with their reasons:
- The scene only holds this episode's bodies. RL4VLA parks all 42 next to it. Fewer bodies are faster and need one
  contact query.
- Every reset moves all bodies into a new PhysX scene. PhysX keeps contact caches and an order of insertion, which would
  make an episode depend on earlier ones. So here an episode is a function of
  (env_id, obj_set, episode_id, actions, protocol, sim_freq, image_size), to the last bit.
- The object is moved during the episode by each env's own step count.
- In MultiCarrot test, one distractor in eight was the object itself. Here it is another body (see `variants.decode`).
- The reward is part of the task. Resolution and sim_freq are parameters, and control stays at 5 Hz.
- `hulls="gpu"`, the default, has the published convex hulls of meshes on a CPU, too (`envs/assets/hulls.py`). The
  solver still is PhysX's CPU solver, where the published results come from its GPU solver.
- Where a commanded pose is out of reach, the arm stays as it is. RL4VLA's solver on a GPU takes its last iterate, so
  there the arm goes part of the way. This matters for policies that wander: with uniformly random actions it happened
  in half of the steps, and in none of 1,920 commands of a policy after its warm-up.
- A texture is stretched over the box around the robot and objects of its own image. RL4VLA stretches it over the
  largest box of all envs that run together, and cuts it to each one's own. So its textures are coarser, and depend on
  the other envs. With one env both are the same.
- An episode id beyond the last start state is an error. RL4VLA takes it modulo their number.

`protocol="rlinf"` follows RLinf (arXiv 2510.06710) where it differs from RL4VLA, for comparison with its table:
- Nothing settles. The first image shows bodies in the air, at 0.90 m in the ids that spawn like Main-v3.
- Texture and Whole ids choose texture and weight by the table's index. Table 0 has weight 0, so 1 in 16 is unperturbed.
- An object that is moved during the episode is only shown elsewhere, for one step and in that step's flags. The physics
  does not move it.
- A distractor may be the object itself.
RLinf's box sizes after partial resets (those of other envs) and its counting of env 0's steps are not reproduced.

`advance()` and `render_image()` do the work of `BaseEnv.step` without its Python code per substep and its observation
dictionaries. A test shows that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sapien
import torch
from mani_skill.render.shaders import ShaderConfig
from mani_skill.utils.structs.pose import Pose

from envs import assets, images, rules, shadows, variants
from envs.assets import catalog, hulls, shaders
from envs.kinematics import added_pose
from envs.registration import CAMERA
from envs.rotations import yaw_quaternion
from envs.scene import PutOnPlateScene

START_QPOS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)
BASE_POSE = sapien.Pose(list(catalog.ROBOT_BASE_POSITION), [0, 0, 0, 1])  # a yaw of 180 degrees
PARKED_POSE = sapien.Pose([0.147, 0.028, 1.870], [0, 0, 0, 1])  # out of the way while objects settle
SETTLE_SECONDS, SETTLE_MORE_SECONDS = 0.1, 1.2  # 50 and 600 substeps at 500 Hz
STILL_LINEAR, STILL_ANGULAR = 1e-3, 1e-2  # m/s, rad/s, summed over bodies: below both the first settling is enough
MOVE_STEP = 5  # the object is moved after this control step, if the variant moves it


class PutOnPlateInScene(PutOnPlateScene):
    """One scene, one episode at a time."""

    # -----------------------------------------------------------------------------------------------------------------
    # scene
    # -----------------------------------------------------------------------------------------------------------------

    def _load_scene(self, options: dict) -> None:
        super()._load_scene(options)
        self._stage = self._arena._objs[0]
        self._backdrop: sapien.render.RenderBodyComponent | None = None  # a table for people, see `envs/gym_env.py`
        self._stage_visual = self._stage.find_component_by_type(sapien.render.RenderBodyComponent)
        self._shaders: dict[sapien.Entity, ShaderConfig] = {}  # of each camera
        self._entities: dict[tuple[str, int], sapien.Entity] = {}  # built on first use, kept for later episodes
        self._bodies: list[sapien.Entity] = []  # this episode's object, receptacle and perhaps a distractor
        self._permanent: list[sapien.Entity] | None = None  # all other entities, in the order in which they were made
        self._robot = self.agent.robot._objs[0]
        by_name = {name: link._objs[0] for name, link in self.agent.robot.links_map.items()}
        self._fingers = by_name["left_finger_link"], by_name["right_finger_link"]
        self._tool, self._base = by_name["ee_gripper_link"], by_name["base_link"]

        arm = self.agent.controller.controllers["arm"]
        self._arm = arm.active_joint_indices.numpy()
        self._solver_order = arm.kinematics.pmodel_active_joint_indices.numpy()
        self._solver_arm = arm.kinematics.pmodel_controlled_joint_indices.numpy()
        gripper = self.agent.controller.controllers["gripper"]
        low = gripper.action_space_low.numpy()[0]
        high = gripper.action_space_high.numpy()[0]
        self._grip_middle = (high + low) * np.float32(0.5)
        self._grip_reach = (high - low) * np.float32(0.5)

    def _setup_sensors(self, options: dict) -> None:
        super()._setup_sensors(options)
        self._camera = self._sensors[CAMERA].camera._render_cameras[0]
        cameras = [*self._sensors.values(), *self._human_render_cameras.values()]
        self._shaders = {each.camera._render_cameras[0].entity: each.config.shader_config for each in cameras}

    def _entity(self, kind: str, index: int) -> sapien.Entity:
        """Object or receptacle `index`, built on its first use. It is in no scene yet."""
        if (kind, index) not in self._entities:
            model = model_of(self.pack, kind, index)
            self._set_scene_config()
            builder = self.scene.create_actor_builder()
            self.pack.add_model(builder, model)
            builder.set_physx_body_type("dynamic")
            builder.set_name(model.name)
            self._entities[kind, index] = builder.build_entity()
        return self._entities[kind, index]

    def _fresh_physics(self, bodies: list[sapien.Entity]) -> None:
        """Move everything into a new PhysX scene, in one fixed order. `bodies` are this episode's.

        PhysX keeps contact caches, free lists and an order of insertion. Neither removing and adding all bodies nor
        enhanced determinism undoes that: 1 to 4 of 12 episodes repeated exactly. With a new scene 12 of 12 do, for
        0.5 ms.
        """
        old = self.scene.sub_scenes[0]
        if self._permanent is None:
            self._permanent = list(old.entities)  # stage, robot, lights, camera
        for entity in reversed(self._permanent + self._bodies):
            old.remove_entity(entity)
        self._set_scene_config()  # PhysX has one for the process, and another env may have set its own
        with hulls.without_warning():
            px = sapien.physx.PhysxCpuSystem()
        px.timestep = self.scene.px.timestep
        new = sapien.Scene([px, old.render_system] if self.scene.can_render() else [px])
        self._bodies = bodies
        for entity in self._permanent + bodies:
            if entity in self._shaders:  # an added camera uses the shader that is selected now
                shaders.select(self._shaders[entity])
            new.add_entity(entity)
        self.scene.sub_scenes[0] = new
        self.scene.px = px
        self._choose_casters(chosen_bodies(self.start))
        if self._viewer is not None:
            self._setup_viewer()  # the window shows one scene, and this is another one

    def _choose_casters(self, chosen: list[tuple[str, int]]) -> None:
        """Keep what casts a shadow (entity, and middle and half edges of a box in its frame), and on what it falls.

        chosen: (kind, index) of each body of the episode.
        """
        models = [(body, kind, model_of(self.pack, kind, index)) for body, (kind, index) in zip(self._bodies, chosen)]
        self._flat = [body for body, kind, _ in models if kind == "receptacle"]
        self._casters = []
        if self.pack.casts_shadows:
            self._casters += [(body, *shadows.box_of(model)) for body, kind, model in models if kind == "object"]
            self._casters += [(finger.entity, *box) for finger, box in zip(self._fingers, shadows.TIPS)]

    # -----------------------------------------------------------------------------------------------------------------
    # episode
    # -----------------------------------------------------------------------------------------------------------------

    def start_episode(self, start: variants.StartState) -> None:
        """Place the bodies, let them settle with the robot out of the way, and put the robot into its start pose."""
        self.start = start
        self.instruction = instruction_of(self.pack, start)
        if self.scene.can_render():
            self._load_images()
        self._place_bodies()
        self._still_robot(PARKED_POSE, np.zeros(6))
        if self.protocol == "rl4vla":
            self._settle()
        self._still_robot(BASE_POSE, start.arm_offset)
        self._measure_boxes(*(body.pose for body in self._bodies[:2]))
        self.grasped = False
        self.grasped_once = False
        self.streak = 0  # control steps in a row with the object grasped
        self.streak_once = False
        self.success = False
        self.potential = 0.0
        self.last_reward = 0.0
        self._step_count = 0
        self._judged_step = 0
        self._elapsed_steps[:] = 0
        self._shown_elsewhere = None
        self.agent.controller.reset()  # the commanded pose is where the tool is

    def _place_bodies(self) -> None:
        """Put this episode's bodies into a fresh scene, at rest above the table."""
        start = self.start
        chosen = chosen_bodies(start)
        positions = start.object_position, start.receptacle_position, start.distractor_position
        self._fresh_physics([self._entity(*body) for body in chosen])
        for entity, (kind, _), position in zip(self._bodies, chosen, positions):
            self._place(entity, position, yaw_quaternion(start.object_yaw if kind == "object" else 0.0))

    def _place(self, entity: sapien.Entity, position: Sequence[float], quaternion: list[float]) -> None:
        body = entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
        entity.pose = sapien.Pose(list(position), quaternion)
        body.linear_velocity = body.angular_velocity = [0, 0, 0]
        body.wake_up()

    def _still_robot(self, base: sapien.Pose, arm_offset: Sequence[float] | np.ndarray) -> None:
        """Put the whole articulation at rest in its start configuration, with drives that hold it there."""
        qpos = np.asarray(START_QPOS)
        qpos[:6] += arm_offset
        qpos = qpos.astype(np.float32)
        self._robot.root_pose = base
        self._robot.root_linear_velocity = self._robot.root_angular_velocity = [0, 0, 0]
        self._robot.qpos = qpos
        self._robot.qvel = self._robot.qf = np.zeros_like(qpos)
        for joint, target in zip(self._robot.active_joints, qpos):
            joint.drive_target = [[target]]

    def _settle(self) -> None:
        """Let the bodies fall, and wait longer for those that still move."""
        self._substeps(round(SETTLE_SECONDS * self.sim_freq))
        bodies = [entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent) for entity in self._bodies]
        linear = sum(np.linalg.norm(body.linear_velocity) for body in bodies)
        angular = sum(np.linalg.norm(body.angular_velocity) for body in bodies)
        if linear > STILL_LINEAR or angular > STILL_ANGULAR:
            self._substeps(round(SETTLE_MORE_SECONDS * self.sim_freq))

    def _substeps(self, count: int) -> None:
        """Simulate `count` physics steps."""
        step = self.scene.px.step
        for _ in range(count):
            step()

    def _measure_boxes(self, object_at_rest: sapien.Pose, receptacle_at_rest: sapien.Pose) -> None:
        """Measure the world-aligned boxes around object and receptacle as they lie when the episode begins."""
        self._rest_rotations = [*object_at_rest.q, *receptacle_at_rest.q]
        self._object_half = world_half_size(object_at_rest, self.pack.objects[self.start.object_index])
        receptacle = self.pack.receptacles[self.start.receptacle_index]
        self._receptacle_half = world_half_size(receptacle_at_rest, receptacle)

    def body_states(self) -> np.ndarray:
        """States of object, receptacle and perhaps a distractor, float32 [2 or 3, 13].

        Each is p, q (wxyz), linear and angular velocity.
        """
        rows = []
        for entity in self._bodies:
            body = entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
            rows.append([*entity.pose.p, *entity.pose.q, *body.linear_velocity, *body.angular_velocity])
        return np.array(rows, np.float32)

    # -----------------------------------------------------------------------------------------------------------------
    # step
    # -----------------------------------------------------------------------------------------------------------------

    def advance(self, action: torch.Tensor) -> tuple[float, bool]:
        """Simulate one control step with action float32 [1, 7] and no observation. Returns reward and success."""
        self._before_control_step()
        self._command(action)
        self._substeps(self._sim_steps_per_control)
        self._after_control_step()
        return self._judge()

    def _before_control_step(self) -> None:
        if self._shown_elsewhere is not None:
            self._bodies[0].pose = self._shown_elsewhere
            self._shown_elsewhere = None

    def _after_control_step(self) -> None:
        self._step_count += 1
        if self.start.moves_to is None or self._step_count != MOVE_STEP:
            return
        obj = self._bodies[0]
        if self.protocol == "rlinf":
            self._shown_elsewhere = obj.pose
        obj.pose = sapien.Pose(list(self.start.moves_to), yaw_quaternion(self.start.object_yaw))
        if self.protocol == "rl4vla":
            self._substeps(round(SETTLE_SECONDS * self.sim_freq))

    def _command(self, action: torch.Tensor) -> None:
        """Set the joints' targets, like the two controllers' `set_action`, without its unused results.

        The stock call takes 1.2 ms (mani_skill 3.0.1), mostly for the present tool pose and for torch on a few numbers.
        """
        arm = self.agent.controller.controllers["arm"]
        gripper = self.agent.controller.controllers["gripper"]
        arm._target_pose = Pose.create(added_pose(arm._target_pose.raw_pose, action))
        qpos = self._robot.qpos
        targets = self._angles_for(arm._target_pose.sp, qpos)
        if targets is None:  # out of reach: the arm stays as it is
            targets = qpos[self._arm]
        for joint, target in zip(arm.joints, targets):
            joint._objs[0].drive_target = [[target]]
        opening = min(max(float(action[0, 6]), -1.0), 1.0)
        width = self._grip_middle + self._grip_reach * np.float32(opening)
        for joint in gripper.joints:
            joint._objs[0].drive_target = [[width]]

    def _angles_for(self, pose: sapien.Pose, qpos: np.ndarray) -> np.ndarray | None:
        """The arm's joint angles (rad, float32 [6]) that bring the tool to `pose`, or None if it is out of reach.

        Args:
            pose: in the frame of the robot's root.
            qpos: [8], all joints where the search begins.
        """
        solver = self.agent.controller.controllers["arm"].kinematics
        angles, solved, _ = solver.pmodel.compute_inverse_kinematics(
            solver.end_link_idx,
            pose,
            initial_qpos=qpos[self._solver_order],
            active_qmask=solver.qmask,
            max_iterations=100,
        )
        return angles[self._solver_arm].astype(np.float32) if solved else None

    def _judge(self) -> tuple[float, bool]:
        """Read the contacts and update all flags. The reward is the increase of the potential (RL4VLA 1.5).

        Returns reward and success.
        """
        grasped, success = self._grasped_and_on()
        self.streak = self.streak + 1 if grasped else 0
        self.grasped_once |= grasped
        self.streak_once |= self.streak >= rules.GRASP_STREAK
        self.grasped, self.success = grasped, success
        potential = rules.potential_of(self.grasped_once, self.streak_once, success)
        reward = potential - self.potential
        self.potential = potential
        return reward, success

    def _grasped_and_on(self) -> tuple[bool, bool]:
        """Whether the object is grasped, and whether it is on the receptacle."""
        obj, receptacle = self._bodies[:2]
        left, right = self._fingers
        impulses = impulses_from(obj, (left.entity, right.entity, receptacle), self.scene.px.get_contacts())
        forces = {entity: impulse * self.sim_freq for entity, impulse in impulses.items()}
        left_holds = self._holds(left, forces[left.entity], 1)
        right_holds = self._holds(right, forces[right.entity], -1)
        places = obj.pose.p, receptacle.pose.p
        above = rules.over_receptacle(*places, self._object_half, self._receptacle_half)
        return left_holds and right_holds, above and rules.touches(forces[receptacle])

    @staticmethod
    def _holds(finger: sapien.physx.PhysxArticulationLinkComponent, force: np.ndarray, sign: int) -> bool:
        """Whether the object pushes this finger outwards hard enough.

        sign: 1 for the left finger, which opens along its +y axis, and -1 for the right one.
        """
        if not force.any():
            return False
        return rules.pressed_open(sign * finger.entity_pose.to_transformation_matrix()[:3, 1], force)

    # -----------------------------------------------------------------------------------------------------------------
    # image
    # -----------------------------------------------------------------------------------------------------------------

    def render_image(self) -> np.ndarray:
        """The camera's image, uint8 [H, W, 3]. The table image is wherever no robot and no object is."""
        self._show_stage()
        self.scene.sub_scenes[0].update_render()
        self._camera.take_picture()
        return self._composed_picture()

    def _composed_picture(self) -> np.ndarray:
        """The observation made of what the camera took last, uint8 [H, W, 3]."""
        segmentation = self._camera.get_picture("PositionSegmentation")[..., 3:]
        return self._compose(self._camera.get_picture("Color")[..., :3], segmentation)

    def _show_stage(self) -> None:
        """Render the table only if something has fallen off it, which saves up to 10 ms.

        The table itself is never in the image, but it hides what is below it.
        """
        if self._stage_visual is not None:
            below = any(entity.pose.p[2] < catalog.TABLE_HEIGHT - 0.01 for entity in self._bodies)
            self._stage_visual.visibility = float(below)
        if self._backdrop is not None:
            self._backdrop.visibility = 0.0

    def _load_images(self) -> None:
        """Load this episode's table image and, if the variant has one, its texture."""
        width, height = self.image_size
        self._overlay = self.pack.table_image(self.start.table_index, width, height)
        self._texture_weight = texture_weight_of(self.pack, self.variant, self.start)
        if self._texture_weight:
            scale = texture_scale(self.variant)
            texture = self.pack.texture(self.start.texture_index, scale * width, scale * height)
            self._texture = texture.astype(np.float32)

    def _compose(self, color: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
        """The observation, uint8 [H, W, 3], of color uint8 [H, W, 3] and segmentation int16 [H, W, 1] (RL4VLA 1.4)."""
        ids = segmentation[..., 0]
        foreground = (ids != 0) & (ids != self._stage.per_scene_id)  # robot and objects
        image = images.compose(color, foreground, self._overlay)
        if self._casters:
            self._add_shadows(image, ids, foreground)
        if not self._texture_weight:
            return image
        blend = images.blend_whole if self.variant.texture_on == "whole" else images.blend_foreground
        return blend(image, foreground, self._texture, self._texture_weight)

    def _add_shadows(self, image: np.ndarray, ids: np.ndarray, foreground: np.ndarray) -> None:
        """Draw the casters' shadows onto the table and onto what lies flat on it.

        Args:
            image: uint8 [H, W, 3], which is changed.
            ids: int16 [H, W], what each pixel shows.
            foreground: bool [H, W], robot and objects.
        """
        eye = shadows.eye_of(image.shape[1], image.shape[0])
        flat = [entity.per_scene_id for entity in self._flat]
        for entity, middle, half in self._casters:
            pose = entity.pose
            spot = shadows.spot_of((*pose.p.tolist(), *pose.q.tolist()), middle, half, eye)
            shadows.darken(image, ids, foreground, flat, spot)

    # -----------------------------------------------------------------------------------------------------------------
    # state
    # -----------------------------------------------------------------------------------------------------------------

    def privileged_state(self) -> np.ndarray:
        """The state for a critic, which a policy does not see: float32 [45], see `rules.privileged_state`."""
        poses = (self._tool.entity_pose, self._bodies[0].pose, self._bodies[1].pose)
        tool, obj, receptacle = (np.concatenate([pose.p, pose.q]) for pose in poses)
        half_sizes = np.stack([self._object_half, self._receptacle_half])
        flags = (self.grasped, self.grasped_once, self.streak_once, min(self.streak, rules.GRASP_STREAK))
        return rules.privileged_state(tool, self._robot.qpos, obj, receptacle, half_sizes, flags)

    def describe(self) -> dict:
        """The present state as plain data. Poses are p, q (wxyz) in the world frame."""

        def pose(entity_pose: sapien.Pose) -> list[float]:
            return [*map(float, entity_pose.p), *map(float, entity_pose.q)]

        return describe_episode(
            self.pack,
            self.variant,
            self.start,
            [pose(body.pose) for body in self._bodies],
            robot_pose=pose(self._base.entity_pose),
            tcp_pose=pose(self._tool.entity_pose),
            qpos=[float(q) for q in self._robot.qpos],
            grasped=self.grasped,
            success=self.success,
        )


# ---------------------------------------------------------------------------------------------------------------------
# start states and asset packs
# ---------------------------------------------------------------------------------------------------------------------


def world_half_size(pose: sapien.Pose, model: catalog.Model) -> np.ndarray:
    """Half edges of the world-aligned box around the model's rotated bounding box, float64 [3]."""
    rotation = pose.to_transformation_matrix()[:3, :3].astype(np.float64)
    return np.abs(rotation) @ model.size / 2


def model_of(pack: assets.AssetPack, kind: str, index: int) -> catalog.Model:
    """The pack's object or receptacle `index`. kind: object | receptacle."""
    return (pack.objects if kind == "object" else pack.receptacles)[index]


def chosen_bodies(start: variants.StartState) -> list[tuple[str, int]]:
    """(kind, index) of an episode's object, receptacle and perhaps a distractor."""
    pair = [("object", start.object_index), ("receptacle", start.receptacle_index)]
    return pair if start.distractor is None else [*pair, start.distractor]


def instruction_of(pack: assets.AssetPack, start: variants.StartState) -> str:
    return variants.WORDINGS[start.wording_index].format(
        object=pack.objects[start.object_index].name, receptacle=pack.receptacles[start.receptacle_index].name
    )


def texture_weight_of(pack: assets.AssetPack, variant: variants.Variant, start: variants.StartState) -> float:
    """The weight of the texture in the mix, 0 to 1."""
    if start.texture_index is None:
        return 0.0
    return variant.texture_mix * pack.tables[start.texture_index].mix


def texture_scale(variant: variants.Variant) -> int:
    """The size of the texture in multiples of the image's. A texture on the whole image is a piece of a larger one."""
    return 2 if variant.texture_on == "whole" else 1


def impulses_from(
    obj: sapien.Entity, bodies: tuple[sapien.Entity, ...], contacts: list
) -> dict[sapien.Entity, np.ndarray]:
    """Impulses (N s) that `obj` gave to each of `bodies` in the last substep: float64 [3] in the world frame."""
    impulses = {body: np.zeros(3) for body in bodies}
    for contact in contacts:
        first, second = contact.bodies[0].entity, contact.bodies[1].entity
        if second == obj and first in impulses:
            impulses[first] += sum(point.impulse for point in contact.points)
        elif first == obj and second in impulses:
            impulses[second] -= sum(point.impulse for point in contact.points)
    return impulses


def describe_episode(
    pack: assets.AssetPack,
    variant: variants.Variant,
    start: variants.StartState,
    poses: list[list[float]],
    *,
    robot_pose: list[float],
    tcp_pose: list[float],
    qpos: list[float],
    grasped: bool,
    success: bool,
) -> dict:
    """`describe()` of one env. All poses are p, q (wxyz) in the world frame.

    poses: of object, receptacle and perhaps a distractor.
    """
    models = [model_of(pack, *body) for body in chosen_bodies(start)]
    obj, receptacle = models[:2]
    distractor = models[2] if len(models) > 2 else None
    table = pack.tables[start.table_index]
    texture = None if start.texture_index is None else pack.tables[start.texture_index].texture
    return {
        "episode_id": start.episode_id,
        "object": obj.name,
        "object_key": obj.key,
        "receptacle": receptacle.name,
        "receptacle_key": receptacle.key,
        "extra": None if distractor is None else distractor.name,
        "extra_key": None if distractor is None else distractor.key,
        "table": table.name,
        "table_key": table.key,
        "texture": texture,
        "texture_weight": texture_weight_of(pack, variant, start),
        "instruction": instruction_of(pack, start),
        "object_pose": poses[0],
        "receptacle_pose": poses[1],
        "extra_pose": None if distractor is None else poses[2],
        "robot_pose": robot_pose,
        "tcp_pose": tcp_pose,
        "qpos": qpos,
        "object_bbox": [list(obj.lower), list(obj.upper)],
        "object_grasp": None if obj.grasp is None else list(obj.grasp),
        "grasped": grasped,
        "success": success,
    }

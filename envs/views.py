"""Images of random scenes, and what the simulator knows of them. No physics runs between two images: 1.2 ms each.

    P patches of an image, row by row   T = 3 things   F = 13 facts

A scene has one object and one receptacle of an env id, as they lie at rest. For each view they get another place and
the object another yaw, on one of the id's tables. The tool is somewhere above the table, at the object, or holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import sapien

from envs import gym_env, variants
from envs.assets.catalog import TABLE_HEIGHT
from envs.expert import Expert
from envs.put_on_plate import BASE_POSE, START_QPOS
from envs.rotations import rotation_matrix, yaw_quaternion

THINGS = ("object", "receptacle", "tool")
# what a view says of its things. An angle is that in which fingers close, or would close around the object
FACTS = (
    *(("object", fact) for fact in ("x", "y", "z", "cos", "sin")),
    *(("receptacle", fact) for fact in ("x", "y")),
    *(("tool", fact) for fact in ("x", "y", "z", "cos", "sin", "opening")),
)
UNIT = 0.05  # m, of x, y and z, which are measured from MIDDLE
MIDDLE = np.array([-0.16, 0.0, TABLE_HEIGHT + 0.05])  # m
VIEWS_PER_SCENE = 32

PLACES = ((-0.26, -0.06), (-0.10, 0.10))  # m, x and y of bodies: where training episodes start, and 2.5 cm more
REACH = 0.03  # m, how much farther the tool goes
HIGHEST = 0.15  # m that tool and object are lifted
NEAR = 0.025  # m, standard deviation of the tool's place near a grasp
ASKEW = 0.3  # rad, standard deviation of its angle there
SHUT, HOLDING, OPEN = 0.015, 0.030, 0.037  # m, joints of the fingers: empty and shut, around an object at most, open
TOOL_LINKS = ("gripper_link", "left_finger_link", "right_finger_link")


class View(NamedTuple):
    image: np.ndarray  # uint8 [H, W, 3]
    shares: np.ndarray  # float32 [P, T], the share of a patch's pixels that shows a thing
    facts: np.ndarray  # float32 [F], see FACTS


class Scenes:
    """Scenes of an env id by number. Each is a function of the arguments and its number.

    Args:
        env_id, obj_set: objects, receptacles and tables are those of its episodes, and none of an episode held out.
        image_size: width and height, which `side` divides.
        side: P = side * side.
    """

    def __init__(self, env_id: str, obj_set: str, image_size: tuple[int, int], side: int, seed: int):
        self.env = gym_env.build(env_id, obj_set=obj_set, image_size=image_size, sim_freq=100)
        self.tables = variants.lookup(env_id, obj_set).tables
        self.total = variants.num_start_states(env_id, obj_set)
        self.side, self.seed = side, seed
        links = self.env.agent.robot.links_map
        self.tool_ids = [links[name]._objs[0].entity.per_scene_id for name in TOOL_LINKS]

    def views(self, number: int) -> Iterator[View]:
        """The VIEWS_PER_SCENE views of a scene."""
        self.random = np.random.RandomState([self.seed, number])
        episode_id = variants.train_episode_id(self.total, self.seed, 0, number)
        self.env.start_episode(variants.decode(self.env.env_id, self.env.obj_set, episode_id))
        self.at_rest = [body.pose for body in self.env._bodies]
        self.tool_down = self.env._tool.entity_pose.q
        for _ in range(VIEWS_PER_SCENE):
            while not self._rearrange():
                pass
            yield View(self.env.render_image(), self._shares(), self._facts())

    def close(self) -> None:
        self.env.close()

    # -----------------------------------------------------------------------------------------------------------------
    # one view
    # -----------------------------------------------------------------------------------------------------------------

    def _rearrange(self) -> bool:
        """Put table, bodies and arm elsewhere. False if the arm cannot reach its place."""
        env, random = self.env, self.random
        env._overlay = env.pack.table_image(self.tables[random.randint(len(self.tables))], *env.image_size)
        obj, receptacle = env._bodies[:2]
        at, goal = self._place(), self._place()
        turned = sapien.Pose(q=yaw_quaternion(random.uniform(-np.pi, np.pi))) * sapien.Pose(q=self.at_rest[0].q)
        obj.pose = sapien.Pose([*at, self.at_rest[0].p[2]], turned.q)
        receptacle.pose = sapien.Pose([*goal, self.at_rest[1].p[2]], self.at_rest[1].q)
        finger_angle = random.uniform(-np.pi / 2, np.pi / 2)
        place, self.object_angle = Expert.grasp_of(env.describe(), finger_angle)
        lift = np.array([0, 0, random.uniform(0, HIGHEST)])
        doing = random.choice(["roam", "approach", "hold"])
        if doing == "hold":
            if random.rand() < 0.3:  # near the receptacle
                lift[:2] = goal - at + random.normal(0, NEAR, 2)
            obj.pose = sapien.Pose(obj.pose.p + lift, obj.pose.q)
            return self._reach(place + lift, self.object_angle, random.uniform(SHUT, HOLDING))
        opening = OPEN if random.rand() < 0.7 else random.uniform(SHUT, OPEN)
        if doing == "roam":
            spot = [*(self._place() + random.uniform(-REACH, REACH, 2)), place[2]]
            return self._reach(spot + lift, finger_angle, opening)
        place = place + [*random.normal(0, NEAR, 2), lift[2] * random.rand()]
        askew = random.normal(0, ASKEW) if random.rand() < 0.5 else 0.0
        return self._reach(place, self.object_angle + askew, opening)

    def _place(self) -> np.ndarray:
        """A random place of a body: x and y."""
        return np.array([self.random.uniform(*span) for span in PLACES])

    def _reach(self, place: np.ndarray, angle: float, opening: float) -> bool:
        """Bring the tool to a place (m, world frame), its fingers to an angle (rad) and their joints to an opening (m).

        False if the arm cannot reach it.
        """
        env, qpos = self.env, np.asarray(START_QPOS, np.float32)
        turn = sapien.Pose(q=yaw_quaternion(angle - finger_angle_of(self.tool_down)))
        goal = sapien.Pose(place, (turn * sapien.Pose(q=self.tool_down)).q)
        angles = env._angles_for(BASE_POSE.inv() * goal, qpos)
        if angles is None:
            return False
        qpos[env._arm], qpos[6:] = angles, opening
        env._robot.qpos = qpos
        self.opening = opening
        return True

    def _shares(self) -> np.ndarray:
        """See View.shares."""
        ids = self.env._camera.get_picture("PositionSegmentation")[..., 3]
        height, width = ids.shape
        of_bodies = [ids == body.per_scene_id for body in self.env._bodies[:2]]
        masks = np.stack([*of_bodies, np.isin(ids, self.tool_ids)], -1)
        patches = masks.reshape(self.side, height // self.side, self.side, width // self.side, len(THINGS))
        return patches.mean((1, 3), dtype=np.float32).reshape(-1, len(THINGS))

    def _facts(self) -> np.ndarray:
        """See FACTS."""
        env = self.env
        (obj, receptacle), tool = env._bodies[:2], env._tool.entity_pose
        model = env.pack.objects[env.start.object_index]
        middle = obj.pose.p + rotation_matrix(obj.pose.q) @ (np.asarray(model.lower) + np.asarray(model.upper)) / 2
        facts = [
            *((middle - MIDDLE) / UNIT),
            *direction_of(self.object_angle),
            *((receptacle.pose.p - MIDDLE) / UNIT)[:2],
            *((tool.p - MIDDLE) / UNIT),
            *direction_of(finger_angle_of(tool.q)),
            (self.opening - SHUT) / (OPEN - SHUT),
        ]
        return np.array(facts, np.float32)


def finger_angle_of(tool: np.ndarray) -> float:
    """The angle (rad) about the vertical in which the fingers of a tool with this rotation (wxyz) close."""
    across = rotation_matrix(tool)[:, 1]
    return float(np.arctan2(across[1], across[0]))


def direction_of(angle: float) -> tuple[float, float]:
    """Cosine and sine of twice an angle (rad), since the two fingers are interchangeable."""
    return np.cos(2 * angle), np.sin(2 * angle)

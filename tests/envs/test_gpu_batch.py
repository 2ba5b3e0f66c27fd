"""The batch of envs for the GPU: its rules against the scalar ones, its one-row form against the ordinary env, its
index arithmetic on buffers that stand in for the GPU's. `test_batch_on_a_gpu.py` has the contract on a GPU, and
`test_group.py` the bookkeeping.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import envs as world
from envs import spec, variants
from envs.expert import Expert

NAME = "PutOnPlateInScene25"
MAIN = NAME + "Main-v3"


def numbers(low: float, high: float):
    return st.floats(low, high, allow_subnormal=False)  # the simulator makes the CPU flush these to 0


# ---------------------------------------------------------------------------------------------------------------------
# rules: rows of tensors against one env in plain numbers
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.tuples(
                *[st.lists(st.booleans(), min_size=n, max_size=n) for _ in range(2)],
                st.lists(st.integers(0, 9), min_size=n, max_size=n),
            ),
            min_size=1,
            max_size=25,
        )
    )
)
def test_rewards_and_latches_equal_the_scalar_ones(steps):
    """Any course of grasps and successes; a row begins anew where its third number is 0."""
    from envs.put_on_plate import PutOnPlateInScene
    from envs.rules import Latches

    count = len(steps[0][0])
    fresh = dict(grasped_once=False, streak=0, streak_once=False, potential=0.0)
    scalar, latches = [SimpleNamespace(**fresh) for _ in range(count)], Latches.zeros(count, "cpu")
    for grasped, success, anew in steps:
        again = torch.tensor(anew) == 0
        latches.clear(again)
        for i in np.flatnonzero(again):
            scalar[i] = SimpleNamespace(**fresh)
        rewards = latches.update(torch.tensor(grasped), torch.tensor(success))
        for i, one in enumerate(scalar):
            one._grasped_and_on = lambda i=i: (grasped[i], success[i])  # noqa: B023  called at once
            reward, _ = PutOnPlateInScene._judge(one)
            assert reward == pytest.approx(rewards[i].item(), abs=1e-12)
            assert (one.grasped_once, one.streak, one.streak_once) == (
                latches.grasped_once[i],
                latches.streak[i],
                latches.streak_once[i],
            )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[numbers(-2, 2)] * 3, *[numbers(-1, 1)] * 4), min_size=1, max_size=6))
def test_pressed_fingers_equal_the_scalar_ones(rows):
    import sapien

    from envs.kinematics import rotation_matrix
    from envs.put_on_plate import PutOnPlateInScene
    from envs.rules import GRASP_MIN_COSINE, GRASP_MIN_FORCE, pressed_open_rows

    forces, q = torch.tensor([row[:3] for row in rows]), torch.tensor([row[3:] for row in rows])
    assume((q.norm(dim=1) > 0.1).all())
    q = q / q.norm(dim=1, keepdim=True)
    opening = rotation_matrix(q)[..., 1]
    for sign in (1, -1):
        got = pressed_open_rows(sign * opening, forces)
        for i, force in enumerate(forces.numpy().astype(float)):
            size = np.linalg.norm(force)
            axis = sign * opening[i].numpy() @ force
            if min(abs(size - GRASP_MIN_FORCE), abs(axis - GRASP_MIN_COSINE * size)) < 1e-5:
                continue  # on the edge: rounding decides
            finger = SimpleNamespace(entity_pose=sapien.Pose(q=q[i].numpy()))
            assert got[i] == PutOnPlateInScene._holds(finger, force, sign)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[numbers(-0.15, 0.15)] * 6, *[numbers(0.001, 0.08)] * 6), min_size=1, max_size=6))
def test_over_receptacle_equals_the_scalar_one(rows):
    from envs.rules import ON_XY_SLACK, ON_Z_SLACK, over_receptacle, over_receptacle_rows

    values = torch.tensor(rows)
    got = over_receptacle_rows(*values.reshape(-1, 4, 3).unbind(1))
    for i, row in enumerate(values.numpy().astype(float)):
        obj, receptacle, object_half, receptacle_half = row.reshape(4, 3)
        offset = obj - receptacle
        edges = (
            np.linalg.norm(offset[:2]) - receptacle_half.max() - ON_XY_SLACK,
            offset[2],
            offset[2] - receptacle_half[2] - object_half[2] - ON_Z_SLACK,
        )
        if np.abs(edges).min() < 1e-6:
            continue
        assert got[i] == over_receptacle(obj, receptacle, object_half, receptacle_half)


@pytest.mark.parametrize("texture_on, scale", [("foreground", 1), ("whole", 2)])
def test_pictures_equal_the_scalar_ones(texture_on, scale):
    """Boxes of every size, nothing seen, everything seen, and rows without a texture; more rows than go at once."""
    from envs import images
    from envs.put_on_plate import PutOnPlateInScene

    random = np.random.RandomState(0)
    count, height, width = 70, 24, 32
    color, overlay = (random.randint(0, 256, (count, height, width, 3), np.uint8) for _ in range(2))
    textures = random.randint(0, 256, (5, scale * height, scale * width, 3), np.uint8)
    which, weight = random.randint(0, 5, count), random.choice([0.0, 0.3, 0.5, 0.4], count).astype(np.float32)
    seen = np.zeros((count, height, width), bool)
    for i in range(2, count):
        (top, bottom), (left, right) = (np.sort(random.randint(0, size + 1, 2)) for size in (height, width))
        seen[i, top:bottom, left:right] = random.rand(bottom - top, right - left) < 0.7
    seen[1] = True
    tensors = [torch.from_numpy(x) for x in (seen, textures, which, weight)]
    picture = images.compose_rows(torch.from_numpy(color), tensors[0], torch.from_numpy(overlay))
    got = images.textured_rows(picture, *tensors, texture_on).numpy()
    assert weight.min() == 0 and (weight > 0).sum() > images.ROWS_AT_ONCE
    for i in range(count):
        env = SimpleNamespace(
            _overlay=overlay[i],
            _stage=SimpleNamespace(per_scene_id=3),
            _texture_weight=float(weight[i]),
            _texture=textures[which[i]].astype(np.float32),
            variant=SimpleNamespace(texture_on=texture_on),
            _casters=(),
        )
        segmentation = np.where(seen[i], 7, random.choice([0, 3], seen[i].shape)).astype(np.int16)[..., None]
        want = PutOnPlateInScene._compose(env, color[i], segmentation)
        difference = np.abs(want.astype(int) - got[i])
        # bilinear weights round differently, and colours are cut to whole numbers: one level, rarely
        assert difference.max() <= 1 and (difference > 0).mean() < (0.01 if texture_on == "foreground" else 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# where the arm goes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ordinary():
    from envs import gym_env

    with closing(gym_env.build(MAIN, image_size=(16, 16), sim_freq=100)) as made:
        yield made


def test_commanded_pose_is_maniskills_bit_for_bit(ordinary):
    from mani_skill.utils.structs.pose import Pose

    from envs.kinematics import added_pose

    arm, random = ordinary.agent.controller.controllers["arm"], np.random.RandomState(0)
    pose = arm._target_pose
    for k in range(1500):
        before = pose.raw_pose
        action = random.uniform(-1, 1, (1, 7)) * [1, 1, 1, np.pi / 2, np.pi / 2, np.pi / 2, 1]
        action *= (1, 0.05, 1e-4)[k % 3]
        action[:, 3:6] *= k % 7 > 0
        action = torch.tensor(action, dtype=torch.float32)
        pose = Pose.create(arm.compute_target_pose(pose, action[:, :6]).raw_pose)
        assert torch.equal(added_pose(before, action), pose.raw_pose)


def test_tool_chain_goes_where_the_simulation_puts_the_tool(ordinary):
    from envs.kinematics import ToolChain, rotation_matrix

    chain = ToolChain(ordinary.agent.robot, "ee_gripper_link", torch.device("cpu"))
    random, arm = np.random.RandomState(1), ordinary.agent.controller.controllers["arm"]
    for _ in range(5):
        ordinary.start_episode(variants.decode(NAME + "EEPose-v1", "test", int(random.randint(10**9))))
        q = torch.from_numpy(ordinary._robot.qpos)[None, chain.indices].double()
        position, rotation, jacobian = chain.forward(q)
        pose = arm.ee_pose_at_base.raw_pose
        torch.testing.assert_close(position.float(), pose[:, :3], atol=1e-6, rtol=0)
        torch.testing.assert_close(rotation.float(), rotation_matrix(pose[:, 3:]), atol=2e-6, rtol=0)
        step = torch.full_like(q, 1e-6)
        moved = (chain.forward(q + step)[0] - chain.forward(q - step)[0]) / 2
        torch.testing.assert_close(moved, (jacobian[:, :3] @ step[..., None])[..., 0], atol=1e-12, rtol=1e-4)


def test_inverse_kinematics_equal_the_cpu_solver(ordinary):
    """Rows at once against pinocchio, one by one: joint angles to 3e-4 rad, and it gives up where pinocchio does."""
    from mani_skill.utils.geometry.rotation_conversions import matrix_to_quaternion
    from mani_skill.utils.structs.pose import Pose

    from envs.kinematics import ToolChain, turned_by

    chain = ToolChain(ordinary.agent.robot, "ee_gripper_link", torch.device("cpu"))
    solver, random = ordinary.agent.controller.controllers["arm"].kinematics, np.random.RandomState(0)
    count = 300
    start = ordinary.agent.robot.get_qpos().repeat(count, 1)
    start[:, :6] += torch.tensor(random.uniform(-0.3, 0.3, (count, 6)), dtype=torch.float32)
    size = torch.tensor(random.choice([0.0, 1e-5, 0.02, 0.05], (count, 1)))  # metres; the last fifth out of reach
    size[-count // 5 :] = 1.0
    position, rotation, _ = chain.forward(start[:, chain.indices].double())
    goal = position + size * torch.tensor(random.uniform(-1, 1, (count, 3)))
    rotation = turned_by(2 * size.clamp(max=0.3) * torch.tensor(random.uniform(-1, 1, (count, 3)))) @ rotation
    pose = torch.cat([goal, matrix_to_quaternion(rotation)], 1).float()
    angles, solved = chain.solve(pose, start[:, chain.indices])
    agree = 0
    for i in range(count):
        want = solver.compute_ik(Pose.create(pose[i]), q0=start[i : i + 1])
        agree += (want is not None) == bool(solved[i])
        if want is not None and solved[i] and size[i] < 1:
            torch.testing.assert_close(angles[i].float(), want[0], atol=3e-4, rtol=0)
        if size[i] < 1e-4:  # near enough already: both stay
            torch.testing.assert_close(angles[i].float(), start[i, chain.indices], atol=2e-5, rtol=0)
    assert agree >= count - 3 and solved[: -count // 5].all() and not solved[-count // 5 :].all()


# ---------------------------------------------------------------------------------------------------------------------
# one row on the CPU against the ordinary env
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "short, obj_set, protocol, episode_ids",
    [
        ("Main-v3", "train", "rl4vla", (5, 183_316, 700_001)),
        ("PositionChangeTo-v1", "test", "rl4vla", (132_860, 5000)),
        ("PositionChangeTo-v1", "test", "rlinf", (132_860,)),
        ("VisionTexture05-v1", "test", "rl4vla", (5_000_000,)),
        ("VisionWhole05-v1", "test", "rl4vla", (5_000_000,)),
        ("MultiPlate-v1", "test", "rl4vla", (1_234_567,)),
        ("EEPose-v1", "test", "rl4vla", (123_456_789,)),
    ],
)
def test_one_row_does_as_the_ordinary_env(short, obj_set, protocol, episode_ids):
    """Start states to the bit; then the expert's actions: the same rewards and flags, pictures to 0.2 of 255.

    Not to the bit: bodies are parked in the batch's scene, and it has a past, so PhysX adds forces in another order;
    and its inverse kinematics agree with the CPU's to 1e-4 rad. What lies or is carried stays within 5 mm of the same.
    """
    from envs import gym_env
    from envs.gpu.simulation import BatchedPutOnPlate
    from envs.gpu.start_states import settled_state

    env_id = NAME + short
    common = dict(obj_set=obj_set, image_size=(64, 48), sim_freq=100, protocol=protocol)
    one = gym_env.build(env_id, **common)
    batch = BatchedPutOnPlate(env_id, 1, sim_backend="physx_cpu", render_backend="cpu", **common)
    poses = ("object_pose", "receptacle_pose", "extra_pose", "tcp_pose", "qpos", "robot_pose")
    for episode_id in episode_ids:
        start = variants.decode(env_id, obj_set, episode_id, protocol)
        batch.start_episodes([0], [start], [settled_state(one, start)])
        assert batch.describe()[0] == one.describe() and batch.instructions == [one.instruction]
        np.testing.assert_allclose(batch.privileged_states()[0].numpy(), one.privileged_state(), atol=1e-6)
        assert np.abs(batch.render_images(torch.tensor([0]))[0].numpy().astype(int) - one.render_image()).max() <= 1
        expert, success = Expert(), False
        for step in range(40):
            action = expert(one.describe() | {"elapsed_steps": step})
            action[6] = 1 if action[6] > 0.5 else -1
            action = torch.from_numpy(action[None])
            (reward, success), (rewards, successes) = one.advance(action), batch.advance(action)
            assert reward == pytest.approx(rewards.item(), abs=1e-9) and success == successes.item()
            assert (one.grasped, one.streak_once) == (batch.grasped.item(), batch.latches.streak_once.item())
            known = batch.privileged_states()[0].numpy(), one.privileged_state()
            np.testing.assert_array_equal(known[0][-4:], known[1][-4:])  # the latches
            np.testing.assert_allclose(known[0][29:41], known[1][29:41], atol=1e-2)  # sizes, and where from each other
            ours, theirs = batch.describe()[0], one.describe()
            for key in poses:
                if ours[key] is not None:
                    np.testing.assert_allclose(ours[key][:3], theirs[key][:3], atol=5e-3)
            if step % 5 == 4:  # the move in mid-episode is one of them
                difference = batch.render_images(torch.tensor([0]))[0].numpy().astype(int) - one.render_image()
                assert np.abs(difference).mean() < 0.2
            if success:
                break
        assert batch.finite().all()
    one.close()
    batch.close()


def test_settlers_give_what_the_env_settles():
    """In other processes, without a renderer, whatever they settled before; asked beforehand or not."""
    from envs import gym_env
    from envs.gpu.start_states import Settlers, settled_state

    env_id = NAME + "MultiCarrot-v1"
    env = gym_env.build(env_id, image_size=(16, 16), sim_freq=100)
    starts = [variants.decode(env_id, "train", i) for i in (5, 1_234_567, 777_777, 5)]
    settlers = Settlers(env_id, 2, obj_set="train", sim_freq=100)
    for start in starts[:2]:
        settlers.ask(start)
    try:
        for start in starts:
            ours, theirs = settled_state(env, start), settlers.get(start)
            for field in dataclasses.fields(ours):
                np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    finally:
        settlers.close()
    settlers.close()
    failing = Settlers(env_id, 1, asset_pack="bridge", asset_dir="/proc/nowhere")
    with pytest.raises(RuntimeError, match=r"settles start states.*is not a folder"):
        failing.get(starts[0])
    failing.close()
    env.close()


def test_settlers_can_be_asked_for_thousands_at_once(monkeypatch):
    """Neither side waits for the other to read; what is no longer kept is settled again."""
    from envs.gpu import start_states

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"))
    monkeypatch.setattr(start_states, "SETTLER", "faulty_settler:main")
    monkeypatch.setattr(start_states, "KEPT", 500)
    starts = [variants.decode(MAIN, "train", i) for i in range(3000)]
    settlers = start_states.Settlers(MAIN, 2)
    for start in starts:
        settlers.ask(start)
    assert [settlers.get(start)[0] for start in starts] == list(range(3000))
    assert len(settlers._kept) <= 500 and not settlers._asked and settlers.get(starts[0])[0] == 0
    settlers.close()


def test_a_settler_that_is_lost_is_replaced(monkeypatch):
    """It may die in between, die or hang at its work, or get the signals of a cluster."""
    from envs.gpu import start_states

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "helpers"))
    monkeypatch.setattr(start_states, "SETTLER", "faulty_settler:main")
    monkeypatch.setattr(start_states, "SECONDS", 0.5)
    starts = [variants.decode(MAIN, "train", i) for i in range(9)]
    settlers = start_states.Settlers(MAIN, 1)
    assert settlers.get(starts[0])[0] == 0
    pids = settlers.pids
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pids[0], number)
    assert settlers.get(starts[1])[0] == 1 and settlers.pids == pids
    os.kill(pids[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match="killed by SIGKILL"):
        assert settlers.get(starts[2])[0] == 2
    os.kill(settlers.pids[0], signal.SIGSTOP)
    for start in starts[3:6]:
        settlers.ask(start)
    with pytest.warns(RuntimeWarning, match="no answer for 0.5 s"):
        assert [settlers.get(start)[0] for start in starts[3:6]] == [3, 4, 5]
    monkeypatch.setenv("SOLOVLA_TEST_FAULT", "7")  # a new environment: the next process has it
    settlers.ask(starts[6])
    os.kill(settlers.pids[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="start state 7 has lost 3 processes"):
        assert settlers.get(starts[6])[0] == 6
        settlers.get(starts[7])
    settlers.close()


def test_every_body_of_an_object_set_is_there():
    random = np.random.RandomState(0)
    for env_id, variant in variants.VARIANTS.items():
        for obj_set in variant.sets:
            needed, seen = variants.bodies_needed(env_id, obj_set), set()
            total = variants.num_start_states(env_id, obj_set)
            for protocol in variants.PROTOCOLS:
                for episode_id in random.randint(0, total, 300, dtype=np.int64):
                    start = variants.decode(env_id, obj_set, int(episode_id), protocol)
                    seen |= {("object", start.object_index), ("receptacle", start.receptacle_index)}
                    seen |= {start.distractor} - {None}
            assert seen <= set(needed) and len(set(needed)) == len(needed)
            assert len(seen) >= 0.7 * len(needed)  # and none is there for nothing


# ---------------------------------------------------------------------------------------------------------------------
# many rows: buffers on the CPU in the place of the GPU's
# ---------------------------------------------------------------------------------------------------------------------


class Buffer:
    def __init__(self, *shape: int):
        self.values = torch.zeros(*shape)

    def torch(self) -> torch.Tensor:
        return self.values


class FakePhysx:
    """Buffers as PhysX's on a GPU; an impulse says of which two bodies it is: (first, second, 0)."""

    timestep = 0.5

    def __init__(self, bodies: int):
        self.cuda_rigid_body_data = Buffer(bodies, 13)
        self.queries = 0

    def gpu_create_contact_pair_impulse_query(self, pairs):
        query = SimpleNamespace(cuda_impulses=Buffer(len(pairs), 3), pairs=pairs)
        return query

    def gpu_query_contact_pair_impulses(self, query):
        self.queries += 1
        query.cuda_impulses.values = torch.tensor([[float(a), float(b), 0.0] for a, b in query.pairs])


def fake_scene(num_envs: int, names: list[str]):
    """A scene and one actor per name; body n of actor k is row 100 + 10 k + n of the buffer, called 10 k + n."""
    px = FakePhysx(100 + 10 * len(names))
    scene = SimpleNamespace(px=px, num_envs=num_envs)
    actors = [
        SimpleNamespace(
            name=name,
            _bodies=[10 * k + n for n in range(num_envs)],
            _body_data_index=torch.tensor([100 + 10 * k + n for n in range(num_envs)]),
        )
        for k, name in enumerate(names)
    ]
    return scene, actors


def test_gpu_states_are_read_and_written_by_rows():
    from envs.gpu.bodies import GpuBodies

    scene, actors = fake_scene(4, ["a", "b", "c"])
    data = scene.px.cuda_rigid_body_data.values
    data[:, 0] = torch.arange(len(data))
    bodies = GpuBodies(scene, actors)
    assert torch.equal(bodies.read()[..., 0], torch.tensor([[100.0 + 10 * k + n for k in range(3)] for n in range(4)]))
    before = data.clone()
    bodies.write(torch.tensor([1, 3]), -torch.ones(2, 3, 13))
    written = [100 + 10 * k + n for k in range(3) for n in (1, 3)]
    assert (data[written] == -1).all()
    kept = [i for i in range(len(data)) if i not in written]
    assert torch.equal(data[kept], before[kept])


def test_gpu_forces_are_those_of_each_rows_bodies():
    from envs.gpu.bodies import GpuForces

    num_envs = 5
    scene, actors = fake_scene(num_envs, ["left", "right", "o0", "o1", "o2", "r0", "r1"])
    forces = GpuForces(scene, actors[:2], actors[2:], num_objects=3)
    row, obj, receptacle = torch.arange(num_envs), torch.tensor([2, 0, 1, 1, 2]), torch.tensor([4, 3, 3, 4, 3])
    left, right, on = forces.read(row, obj, receptacle)
    for n in range(num_envs):
        o, r = 10 * (2 + obj[n]) + n, 10 * (2 + receptacle[n]) + n
        assert (left[n, :2] * 0.5).tolist() == [n, o]
        assert (right[n, :2] * 0.5).tolist() == [10 + n, o]
        assert (on[n, :2] * 0.5).tolist() == [r, o]
    assert scene.px.queries == 2  # for all rows at once


class FakeRobot:
    """Joint state of N rows, set under the scene's mask as ManiSkill's articulations are on a GPU."""

    def __init__(self, scene, num_envs: int):
        self.scene, self.active_joints = scene, None
        self.values = {name: torch.zeros(num_envs, 8) for name in ("qpos", "qvel", "qf", "targets")}

    def _set(self, name: str, value: torch.Tensor) -> None:
        self.values[name][self.scene._reset_mask] = value

    def get_qpos(self):
        return self.values["qpos"]

    def get_qvel(self):
        return self.values["qvel"]

    def set_qpos(self, value):
        self._set("qpos", value)

    def set_qvel(self, value):
        self._set("qvel", value)

    def set_qf(self, value):
        self._set("qf", value)

    def set_joint_drive_targets(self, value, joints):
        self._set("targets", value)


@pytest.fixture
def rows_of_fakes(monkeypatch):
    return make_fakes(monkeypatch)


def make_fakes(monkeypatch) -> SimpleNamespace:
    """BatchedPutOnPlate of 6 rows without a simulator: a substep adds 1 to every state and every joint."""
    from envs import assets
    from envs.gpu import simulation

    monkeypatch.setattr(simulation.BatchedPutOnPlate, "device", torch.device("cpu"), raising=False)
    monkeypatch.setattr(simulation.BatchedPutOnPlate, "gpu_sim_enabled", False)
    monkeypatch.setattr(simulation.BatchedPutOnPlate, "sim_freq", 100)
    env = object.__new__(simulation.BatchedPutOnPlate)
    env.env_id, env.obj_set, env.protocol, env.num_envs = NAME + "PositionChangeTo-v1", "test", "rl4vla", 6
    env.pack, env.variant = assets.asset_pack("builtin"), variants.VARIANTS[env.env_id]
    needed = variants.bodies_needed(env.env_id, "test")
    env._place_of = {body: k for k, body in enumerate(needed)}
    env._num_objects = [kind for kind, _ in needed].count("object")
    env._parked = torch.tensor([simulation._parking_place(k) for k in range(len(needed))])
    states = torch.zeros(6, len(needed), 13)

    def step():
        states[...] += 1
        robot.values["qpos"] += 1
        robot.values["qvel"] += 1

    env.scene = SimpleNamespace(_reset_mask=torch.ones(6, dtype=torch.bool), step=step)
    robot, reset_rows = FakeRobot(env.scene, 6), []
    controller = SimpleNamespace(reset=lambda: reset_rows.append(env.scene._reset_mask.tolist()))
    env.agent = SimpleNamespace(robot=robot, controller=controller)
    env._bodies = SimpleNamespace(read=states.clone, write=lambda where, new: states.__setitem__(where, new))
    env._forces = SimpleNamespace(read=lambda row, obj, receptacle: torch.zeros(3, len(row), 3))
    env._begin_without_episodes()
    return SimpleNamespace(env=env, states=states, robot=robot, reset_rows=reset_rows, step=step)


def begin(fakes, rows: list[int], episode_ids: list[int]) -> list:
    from envs.gpu.start_states import Settled

    starts = [variants.decode(fakes.env.env_id, "test", i) for i in episode_ids]
    settled = [
        Settled(np.full((2, 13), 10 + i, np.float32), np.full(8, 20 + i, np.float32), np.full((2, 3), 30 + i))
        for i in range(len(rows))
    ]
    fakes.env.start_episodes(rows, starts, settled)
    return starts


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
def test_a_reset_touches_its_rows_alone(rows):
    with pytest.MonkeyPatch.context() as patch:
        fakes = make_fakes(patch)
        env = fakes.env
        begin(fakes, list(range(6)), [1, 2, 3, 4, 5, 6])
        env.latches.update(torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool))
        env._step_count[:] = 4
        for _ in range(3):
            fakes.step()
        states, qpos = fakes.states.clone(), fakes.robot.values["qpos"].clone()
        starts = begin(fakes, rows, [100_000 + i for i in rows])
        others = [i for i in range(6) if i not in rows]
        assert torch.equal(fakes.states[others], states[others])
        assert torch.equal(fakes.robot.values["qpos"][others], qpos[others])
        assert fakes.reset_rows[-1] == [i in rows for i in range(6)] and env.scene._reset_mask.all()
        assert (env.latches.potential[others] > 1).all() and (env._step_count[others] == 4).all()
        for i, (row, start) in enumerate(zip(rows, starts)):
            assert env.starts[row] == start and env._step_count[row] == 0 and env.latches.potential[row] == 0
            columns = [env._place_of["object", start.object_index], env._place_of["receptacle", 0]]
            assert env._chosen[row].tolist() == columns
            assert (fakes.states[row, columns] == 10 + i).all()
            parked = [k for k in range(len(env._parked)) if k not in columns]
            assert torch.equal(fakes.states[row, parked], env._parked[parked])
            for name, value in (("qpos", 20 + i), ("targets", 20 + i), ("qvel", 0)):
                assert (fakes.robot.values[name][row] == value).all()
            assert (env._half_sizes[row] == 30 + i).all() and env._table[row] == start.table_index


def test_each_row_is_moved_at_its_own_step(rows_of_fakes):
    """Rows at different steps: the one that is moved falls for 0.1 s, the others stay where they are meanwhile."""
    fakes, env = rows_of_fakes, rows_of_fakes.env
    starts = begin(fakes, list(range(6)), [132_860, 5000, 77_777, 9, 10, 11])
    env._step_count[:] = torch.tensor([0, 3, 4, 4, 5, 8])  # rows 2 and 3 are in their step 5
    env._moves_to[3] = torch.nan  # an episode whose object stays
    before, qpos = fakes.states.clone(), fakes.robot.values["qpos"].clone()
    env._after_control_step()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(fakes.states[others], before[others])
    assert torch.equal(fakes.robot.values["qpos"][others], qpos[others])
    assert (fakes.robot.values["qpos"][2] == qpos[2] + 10).all()  # 0.1 s at 100 Hz
    column = env._chosen[2, 0]
    torch.testing.assert_close(fakes.states[2, column, :3], torch.tensor(starts[2].moves_to) + 10)
    torch.testing.assert_close(fakes.states[2, column, 7:], before[2, column, 7:] + 10)  # velocities stay
    assert env._step_count.tolist() == [1, 4, 5, 5, 6, 9]


def test_contacts_of_resting_rows_are_those_before_the_extra_substeps(rows_of_fakes):
    """All rows hold and touch until the object of row 2 is moved. It falls, and nothing touches anything afterwards."""
    fakes, env = rows_of_fakes, rows_of_fakes.env
    begin(fakes, list(range(6)), [132_860, 5000, 77_777, 9, 10, 11])
    env._moves_to[3] = torch.nan
    env._step_count[:] = torch.tensor([0, 3, 4, 4, 5, 8])
    substeps, step = [], env.scene.step
    env.scene.step = lambda: substeps.append(1) or step()

    def read(row, obj, receptacle) -> list[torch.Tensor]:
        return [torch.tensor([[0.0, y, 0.0]]).repeat(len(row), 1) * (not substeps) for y in (5.0, -5.0, 5.0)]

    upright = SimpleNamespace(pose=SimpleNamespace(q=torch.tensor([[1.0, 0, 0, 0]]).repeat(6, 1)))
    env._forces, env._fingers = SimpleNamespace(read=read), (upright, upright)
    env._half_sizes[:] = 0.03
    fakes.states[torch.arange(6)[:, None], env._chosen, :3] = torch.tensor([[0.0, 0.0, 0.05], [0.0, 0.0, 0.0]])
    env._after_control_step()
    env.evaluate()
    assert env.grasped.tolist() == env.success.tolist() == [True, True, False, True, True, True]
    env._num_steps += 1  # the next step moves nothing: what PhysX says now counts for all
    env.evaluate()
    assert not env.grasped.any() and not env.success.any()


def test_rlinf_shows_the_move_for_one_step(rows_of_fakes):
    fakes, env = rows_of_fakes, rows_of_fakes.env
    env.protocol = "rlinf"
    starts = begin(fakes, list(range(6)), [132_860, 5000, 77_777, 9, 10, 11])
    env._step_count[:] = torch.tensor([4, 0, 4, 0, 0, 0])
    before = fakes.states.clone()
    env._after_control_step()
    for row in (0, 2):
        torch.testing.assert_close(fakes.states[row, env._chosen[row, 0], :3], torch.tensor(starts[row].moves_to))
    assert torch.equal(fakes.states[[1, 3, 4, 5]], before[[1, 3, 4, 5]])
    env._before_control_step()
    assert torch.equal(fakes.states, before) and env._shown_elsewhere is None


# ---------------------------------------------------------------------------------------------------------------------
# make_envs
# ---------------------------------------------------------------------------------------------------------------------


def test_who_draws(monkeypatch):
    """Without a GPU the CPU does; with one that SAPIEN cannot render on too, unless it was asked for by name."""
    with pytest.raises(ValueError, match="unknown render_backend 'gpu': use one of cpu, cuda, auto"):
        world.make_envs(MAIN, 1, render_backend="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert spec.resolve_render_backend("auto") == "cpu"
    with pytest.raises(ValueError, match=r"needs a CUDA device.*render_backend='cpu'"):
        world.make_envs(MAIN, 1, render_backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)  # a device that is not there
    with pytest.warns(RuntimeWarning, match="images, which is slow: SAPIEN cannot render on cuda:3"):
        assert spec.resolve_render_backend("auto") == "cpu"
    with pytest.raises(ValueError, match=r"render_backend='cuda': SAPIEN cannot render on cuda:3.*doctor.py"):
        spec.resolve_render_backend("cuda")
    assert spec.resolve_render_backend("cpu") == "cpu"


def test_what_can_not_run_is_said(monkeypatch):
    with pytest.raises(ValueError, match="unknown sim_backend 'cuda': use one of physx_cpu, physx_cuda, auto"):
        world.make_envs(MAIN, 1, sim_backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device.*sim_backend='physx_cpu'"):
        world.make_envs(MAIN, 1, sim_backend="physx_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="'physx_cpu' for PickCube-v1"):
        world.make_envs("PickCube-v1", 1, sim_backend="physx_cuda", instruction="pick up the cube")
    with pytest.raises(ValueError, match="leave it at 1"):
        world.make_envs(MAIN, 2, sim_backend="physx_cuda", pipeline_stages=2)


def test_a_batch_without_the_library_is_one_sentence(monkeypatch, tmp_path):
    """Both where a script checks its flags and where envs are made, and before SAPIEN downloads anything."""
    import sapien

    def download() -> None:
        raise AssertionError("SAPIEN would download the library")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sapien.physx, "enable_gpu", download)
    said = r"physx_cuda' needs PhysX's library for GPUs, and \S+\.so is missing: run `python doctor\.py --download`"
    with pytest.raises(RuntimeError, match=said):
        world.make_envs(MAIN, 1, sim_backend="physx_cuda")
    given = dict(
        obj_set="train", asset_pack="builtin", asset_dir=None, image_size=(16, 16), sim_freq=100, protocol="rl4vla"
    )
    given |= dict(max_episode_steps=4, auto_reset=False, ignore_terminations=False, seed=0, first_env=0)
    running = dict(num_env_workers=1, pipeline_stages=1, worker_timeout=60.0, render_backend="auto")
    with pytest.raises(RuntimeError, match=said):
        world.check_envs(MAIN, 1, **given, **running, sim_backend="physx_cuda")
    world.check_envs(MAIN, 1, **given, **running, sim_backend="physx_cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cuda", [False, True])
def test_auto_is_the_gpu_where_it_can(monkeypatch, cuda):
    from envs.spec import resolve_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert resolve_backend("auto", MAIN, 1) == ("physx_cuda" if cuda else "physx_cpu")
    assert resolve_backend("auto", MAIN, 2) == resolve_backend("auto", "PickCube-v1", 1) == "physx_cpu"
    assert resolve_backend("physx_cuda", MAIN, 1) == "physx_cuda"


def test_vector_env_over_a_batch(monkeypatch):
    """make_envs, reset, chunks, auto_reset and replay through one row of the batch, simulated on the CPU."""
    from envs.gpu import world as gpu_world

    opened = gpu_world.open_batch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_world, "open_batch", lambda *args: opened(*args, backends=("physx_cpu", "cpu")))
    common = dict(image_size=(48, 48), sim_freq=100, max_episode_steps=5, auto_reset=True)
    actions = np.random.RandomState(0).randn(4, 1, 3, 7).astype(np.float32) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1]
    with (
        world.make_envs(MAIN, 1, sim_backend="physx_cuda", **common) as batch,
        world.make_envs(MAIN, 1, render_backend="cpu", **common) as one,
    ):
        torch.testing.assert_close(batch.reset()["image"], one.reset()["image"], atol=1, rtol=0)
        for t, chunk in enumerate(actions):
            got, want = batch.step(chunk), one.step(chunk)
            for k in (1, 2, 3):
                torch.testing.assert_close(got[k], want[k])
            assert got[0]["task_description"] == want[0]["task_description"]
            assert torch.equal(got[4]["valid"], want[4]["valid"]) and torch.equal(got[4]["ended"], want[4]["ended"])
            assert (got[0]["image"].int() - want[0]["image"].int()).abs().float().mean() < 0.5
            if t == 2:
                state = batch.state_dict()
        with pytest.raises(ValueError, match="saved with sim_backend='physx_cuda'"):
            one.load_state_dict(state)
        after = batch.describe()[0]
        batch.load_state_dict(state)
        batch.step(actions[3])
        again = batch.describe()[0]
        assert again["episode_id"] == after["episode_id"] and again["elapsed_steps"] == after["elapsed_steps"]
        np.testing.assert_allclose(again["tcp_pose"], after["tcp_pose"], atol=1e-3)

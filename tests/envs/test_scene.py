"""Every env id: digits by hand, the published env's recordings, textures, moves, RLinf's ways, damaged assets."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from launching import python

import envs as world
from envs import variants
from envs.expert import Expert

FIXTURES, ASSETS = ROOT.parent / "shared" / "fixtures" / "env", ROOT.parent / "shared" / "assets" / "maniskill"
needs_recordings = pytest.mark.skipif(
    not (FIXTURES.exists() and ASSETS.exists()), reason=f"no recordings or published meshes under {ROOT.parent}/shared"
)
needs_assets = pytest.mark.skipif(not ASSETS.exists(), reason=f"no published meshes at {ASSETS}")
NAME = "PutOnPlateInScene25"
# the published env was recorded on a CPU
RECORDED_WORLD = dict(asset_pack="bridge", asset_dir=str(ASSETS), hulls="cpu")


def build(short: str, **kwargs):
    from envs import gym_env

    return gym_env.build(NAME + short, **(dict(image_size=(64, 48), sim_freq=100) | kwargs))


def start(env, obj_set: str, episode_id: int, short: str | None = None):
    state = variants.decode(env.env_id, obj_set, episode_id, env.protocol)
    env.start_episode(state)
    return state


STAY = torch.tensor([[0, 0, 0, 0, 0, 0, 1.0]])


def expert_episode(env, max_steps: int = 80) -> tuple[bool, list[np.ndarray]]:
    """From the env's present start state; success and the actions given."""
    expert, given = Expert(), []
    for step in range(max_steps):
        action = expert(env.describe() | {"elapsed_steps": step})
        action[6] = 1 if action[6] > 0.5 else -1
        given.append(action)
        if env.advance(torch.from_numpy(action[None]))[1]:
            return True, given
    return False, given


# ---------------------------------------------------------------------------------------------------------------------
# start states
# ---------------------------------------------------------------------------------------------------------------------


def test_seventeen_ids_and_three_sets():
    assert len(variants.VARIANTS) == 17
    for variant in variants.VARIANTS.values():
        assert tuple(variant.sets) == variants.OBJ_SETS
        for obj_set in variants.OBJ_SETS:
            total = world.num_start_states(variant.env_id, obj_set)
            for episode_id in (0, total // 3, total - 1):
                variants.decode(variant.env_id, obj_set, episode_id)
            with pytest.raises(ValueError, match="out of range"):
                variants.decode(variant.env_id, obj_set, total)


def test_every_id_decodes_to_another_start():
    for short, obj_set in (("Single-v1", "test"), ("MainCarrot-v3", "test"), ("MainImage-v3", "test")):
        total = world.num_start_states(NAME + short, obj_set)
        starts = {
            tuple(v for k, v in vars(variants.decode(NAME + short, obj_set, i)).items() if k != "episode_id")
            for i in range(total)
        }
        assert len(starts) == total


def test_number_of_all_states():
    """The sets that the published counts do not list, by hand."""
    counts = {
        "Single-v1:test": 784 * 4,
        "Carrot-v1:all": 25 * 16 * 784 * 4,
        "Plate-v1:all": 16 * 17 * 16 * 784 * 4,
        "Instruct-v1:all": 16 * 17 * 16 * 784 * 4,
        "EEPose-v1:all": 16 * 14_376 * 16 * 784 * 4,
        "MultiCarrot-v1:all": 25 * 24 * 16 * 2104 * 4,
        "MultiPlate-v1:all": 16 * 17 * 16 * 21 * 2104 * 4,
        "Position-v1:all": 16 * 16 * (784 + 628) * 8,
        "PositionChangeTo-v1:all": 16 * 16 * 2104 * 4,
        "VisionWhole05-v1:all": 16 * 17 * 16 * 784 * 4,
    }
    for key, count in counts.items():
        assert world.num_start_states(NAME + key.split(":")[0], key.split(":")[1]) == count


def test_digits_by_hand():
    per_table = 2104 * 4
    # object 3, receptacle digit 2 (index 3), extra digit 5 (three on from the local 2: 8, index 9), table 7
    start = variants.decode(NAME + "MultiPlate-v1", "test", (((3 * 16 + 2) * 15 + 5) * 21 + 7) * per_table)
    assert (start.object_index, start.receptacle_index, start.distractor) == (3, 3, ("receptacle", 9))
    assert (start.table_index, start.object_position[2], start.receptacle_position[2]) == (7, 1.0, 0.92)
    assert start.distractor_position[2] == 0.96
    # the extra digit before the receptacle's: object 2, distractor 4 on from it and one
    start = variants.decode(NAME + "MultiCarrot-v1", "train", ((2 * 15 + 4) * 16 + 1) * per_table)
    assert (start.object_index, start.distractor, start.table_index) == (2, ("object", 7), 1)
    start = variants.decode(NAME + "Instruct-v1", "test", (5 * 16 + 15) * 16 * 784 * 4)
    assert (start.object_index, start.wording_index) == (5, 16)
    start = variants.decode(NAME + "EEPose-v1", "test", 0)
    assert start.arm_offset == (-0.15, -0.15, -0.08, -0.15, -0.15, -0.6)  # -0.15 - 0.15 would be beyond 0.25
    start = variants.decode(NAME + "Position-v1", "test", 0)
    np.testing.assert_allclose(start.object_position, (-0.265, -0.105, 0.95))
    assert start.object_yaw == pytest.approx(np.deg2rad(-22.5))
    start = variants.decode(NAME + "Position-v1", "all", 784 * 8 + 4)  # the first placement of the ring
    np.testing.assert_allclose(start.object_position, (-0.265, -0.105, 0.95))
    assert start.object_yaw == pytest.approx(np.deg2rad(-22.5))
    assert len(set(variants.WORDINGS)) == 21


def test_a_distractor_is_another_object():
    """The published digits make it the object itself in 9 of 72 pairs; RLinf keeps that, the other 63 are the same."""
    per_pair = 16 * 2104 * 4
    ours, theirs = (
        [variants.decode(NAME + "MultiCarrot-v1", "test", i * per_pair, protocol) for i in range(72)]
        for protocol in ("rl4vla", "rlinf")
    )
    assert all(start.distractor != ("object", start.object_index) for start in ours)
    assert len({(start.object_index, start.distractor) for start in ours}) == 72
    alone = [i for i, start in enumerate(theirs) if start.distractor is None]
    assert alone == [8 * k + 1 for k in range(9)]
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if i in alone:
            assert b.object_position == a.distractor_position
        else:
            assert a == b


def test_rlinf_starts():
    texture = NAME + "VisionTexture03-v1"
    for episode_id in (0, 4 * 784 * 5 + 1, 12_000_000):
        ours = variants.decode(texture, "test", episode_id)
        theirs = variants.decode(texture, "test", episode_id, "rlinf")
        assert theirs.texture_index == theirs.table_index == ours.table_index
        assert 1 <= ours.texture_index <= 16
        assert (ours.object_position[2], theirs.object_position[2], theirs.receptacle_position[2]) == (0.95, 0.9, 0.9)
    for short in ("MultiPlate-v1", "Position-v1", "PositionChangeTo-v1"):
        assert variants.decode(NAME + short, "train", 5) == variants.decode(NAME + short, "train", 5, "rlinf")
    with pytest.raises(ValueError, match="rl4vla, rlinf"):
        variants.decode(texture, "test", 0, "rlvla")


# ---------------------------------------------------------------------------------------------------------------------
# against what the published env did
# ---------------------------------------------------------------------------------------------------------------------


def degrees_between(q1, q2) -> float:
    return float(np.rad2deg(2 * np.arccos(min(1.0, abs(np.dot(q1, q2))))))


@needs_recordings
def test_resets_equal_the_published_ones():
    """Names, texts, tables, textures, arm: equal. Settled poses: 1 mm, 1 degree. Pictures: 3 of 255 on average."""
    records = json.loads((FIXTURES / "resets.json").read_text())
    pictures = np.load(FIXTURES / "resets_rgb160.npz")
    compared = 0
    for env_id in dict.fromkeys(record["env_id"] for record in records):
        env = build(env_id[len(NAME) :], **RECORDED_WORLD, image_size=(640, 480), sim_freq=500)
        for record in (r for r in records if r["env_id"] == env_id):
            start(env, record["obj_set"], record["episode_id"])
            state, picture = env.describe(), env.render_image()
            for ours, theirs in (
                ("object", "object_name"),
                ("object_key", "object_key"),
                ("receptacle", "plate_name"),
                ("receptacle_key", "plate_key"),
                ("extra_key", "extra_key"),
                ("table_key", "table"),
                ("texture", "texture"),
                ("instruction", "instruction"),
            ):
                assert state[ours] == record[theirs], (env_id, record["episode_id"], ours)
            if record["texture_mix"] is not None:
                assert state["texture_weight"] == pytest.approx(record["texture_mix"])
            np.testing.assert_allclose(state["qpos"], record["qpos"], atol=1e-6)
            np.testing.assert_allclose(state["robot_pose"], record["robot_base_pose"], atol=1e-6)
            np.testing.assert_allclose(state["tcp_pose"], record["ee_pose"], atol=1e-5)
            poses = [("object_pose", "obj_pose"), ("receptacle_pose", "plate_pose")]
            if record["extra_key"] is not None:
                poses.append(("extra_pose", "extra_pose"))
            if record["repeat_obj_pos_m"] < 1e-3:
                for ours, theirs in poses:
                    assert np.linalg.norm(np.subtract(state[ours][:3], record[theirs][:3])) < 1e-3
                    assert degrees_between(state[ours][3:], record[theirs][3:]) < 1
            key = f"{env_id[len(NAME) :]}__{record['obj_set']}__{record['episode_id']}"
            small = picture.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
            if key in pictures:
                assert np.abs(small - pictures[key]).mean() < 1  # 0.3 to 0.5: the minimal shader
                compared += 1
        env.close()
    assert compared == 21


@needs_recordings
def test_rewards_and_flags_equal_the_published_ones():
    """Recorded actions through the vector env: an expert, one that retreats, one that takes the object away again."""
    recorded = np.load(FIXTURES / "rollouts.npz")
    rollouts = json.loads((FIXTURES / "rollouts.json").read_text())
    kwargs = dict(**RECORDED_WORLD, image_size=(16, 16), ignore_terminations=True)
    with world.make_envs(NAME + "Main-v3", len(rollouts), **kwargs) as envs:
        envs.reset([rollout["episode_id"] for rollout in rollouts])
        actions = np.stack([recorded[f"action_{i}"] for i in range(len(rollouts))])
        seen = []
        rewards = []
        for t in range(actions.shape[1]):
            rewards.append(envs.step(actions[:, t : t + 1])[1][:, 0].numpy())
            seen.append(envs.describe())
    for i, rollout in enumerate(rollouts):
        assert rollout["instruction"] == seen[0][i]["instruction"]
        np.testing.assert_allclose([reward[i] for reward in rewards], recorded[f"reward_{i}"], atol=1e-6)
        np.testing.assert_array_equal([state[i]["success"] for state in seen], recorded[f"success_{i}"][1:])
        for ours, theirs, atol in (("tcp_pose", "ee_pose", 1e-4), ("object_pose", "obj_pose", 2e-3)):
            np.testing.assert_allclose(
                [state[i][ours][:3] for state in seen], recorded[f"{theirs}_{i}"][1:, :3], atol=atol
            )


# ---------------------------------------------------------------------------------------------------------------------
# the solver
# ---------------------------------------------------------------------------------------------------------------------


def solver_of(env) -> set[tuple[float, int]]:
    """Contact offsets (m) and solver iterations of the bodies in the scene, as PhysX has them."""
    bodies = [env._dynamics(entity) for entity in env._bodies]
    offsets = {round(shape.contact_offset, 6) for body in bodies for shape in body.collision_shapes}
    offsets |= {round(shape.contact_offset, 6) for link in env._fingers for shape in link.collision_shapes}
    iterations = {body.solver_position_iterations for body in bodies}
    return {(offset, count) for offset in offsets for count in iterations}


def test_envs_of_one_process_keep_their_own_solver():
    """The builtin pack has a solver of its own at 100 Hz, and nobody's is that of the env that was made last."""
    push = torch.tensor([[0.02, 0, -0.03, 0, 0, 0, 1.0]])

    def course(env) -> list[dict]:
        start(env, "train", 123456)
        return [env.advance(push) and env.describe() for _ in range(6)]

    kwargs = dict(image_size=(16, 16))
    fast = build("Main-v3", **kwargs)
    alone = course(fast)
    published = build("Main-v3", **kwargs | dict(sim_freq=500))
    again = build("Main-v3", **kwargs)
    build("Main-v3", **kwargs | dict(sim_freq=50)).close()
    assert course(published) != alone and course(again) == alone
    assert solver_of(again) == {(0.005, 8)} and solver_of(published) == {(0.02, 15)}
    for env in (fast, published, again):
        env.close()


# ---------------------------------------------------------------------------------------------------------------------
# what the variants do
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short, episode_id", [("VisionTexture05-v1", 5_000_000), ("PositionChangeTo-v1", 132_860)])
@pytest.mark.parametrize("protocol", variants.PROTOCOLS)
def test_fast_path_equals_base_env_step(short, episode_id, protocol):
    """advance() and render_image() against BaseEnv.reset and step: pictures, states, rewards, bit for bit."""
    from envs import gym_env

    fast = build(short, protocol=protocol)
    plain = build(short, protocol=protocol, obs_mode="rgb+segmentation", obj_set="test")
    start(fast, "test", episode_id)
    obs, _ = plain.reset(options={"episode_id": episode_id})
    expert = Expert()
    for step in range(8):
        np.testing.assert_array_equal(obs["sensor_data"][gym_env.CAMERA]["rgb"][0].numpy(), fast.render_image())
        assert fast.describe() == plain.describe()
        action = expert(fast.describe() | {"elapsed_steps": step})[None]
        reward, success = fast.advance(torch.from_numpy(action))
        obs, plain_reward, terminated, _, _ = plain.step(action)
        assert np.float32(reward) == plain_reward.item() and success == terminated.item()
    fast.close()
    plain.close()


def test_the_short_command_sets_the_stock_controllers_targets():
    """To the bit, from many poses: near and far, out of reach, beyond the gripper's range."""
    from mani_skill.utils.structs.pose import Pose

    env, random = build("Main-v3", image_size=(16, 16)), np.random.RandomState(0)
    controller, joints = env.agent.controller, env._robot.active_joints
    arm, stayed = controller.controllers["arm"], 0
    for k in range(200):
        env._robot.qpos = env._robot.qpos + random.uniform(-0.02, 0.02, 8).astype(np.float32) * ([1] * 6 + [0] * 2)
        before = arm._target_pose = Pose.create(arm.ee_pose_at_base.raw_pose)
        scale = (0.02, 0.2, 1.0)[k % 3]
        action = torch.tensor(random.uniform(-scale, scale, (1, 7)), dtype=torch.float32)
        action[0, 6] = random.choice([-1, 1, 0.3, 1.7])
        env._command(action)
        ours, pose = [joint.drive_target.item() for joint in joints], arm._target_pose.raw_pose
        arm._target_pose = before
        controller.set_action(action)
        assert ours == [joint.drive_target.item() for joint in joints]
        assert torch.equal(pose, arm._target_pose.raw_pose)
        stayed += ours[:6] == env._robot.qpos[:6].tolist()
    assert 20 < stayed < 100
    env.close()


def test_another_envs_shader_changes_nothing():
    """ManiSkill's shader is one per process, and a camera takes the present one when it enters a new scene."""
    from mani_skill.render import set_shader_pack
    from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS

    env = build("Main-v3")
    start(env, "train", 5)
    before = env.render_image()
    set_shader_pack(PREBUILT_SHADER_CONFIGS["default"])
    start(env, "train", 5)
    np.testing.assert_array_equal(env.render_image(), before)
    env.close()


def test_gymnasium_makes_every_id_and_asks_nobody():
    code = (
        "import gymnasium, envs\n"
        "from envs import VARIANTS\n"
        "for env_id in VARIANTS:\n"
        "    seen = 'Carrot' in env_id\n"
        "    env = gymnasium.make(env_id, obs_mode='rgb+segmentation' if seen else 'none', obj_set='test',\n"
        "                         sim_backend='physx_cpu', render_backend='cpu', image_size=(32, 24), sim_freq=100)\n"
        "    obs, _ = env.reset(seed=0)\n"
        "    assert not seen or obs['sensor_data']['3rd_view_camera']['rgb'].shape == (1, 24, 32, 3)\n"
        "    assert type(env).__name__ == 'TimeLimitWrapper' and env.unwrapped.env_id == env_id\n"
        "    env.step(env.action_space.sample() * 0.01)\n"
        "    env.close()\n"
        "print('made', len(VARIANTS))"
    )
    out = python("-c", code, stdin=subprocess.DEVNULL)
    assert out.stdout.strip().endswith("made 17"), out.stderr[-2000:]
    assert "Overriding" not in out.stderr


def test_object_moves_at_its_own_step_five():
    env = build("PositionChangeTo-v1")
    for obj_set, moves in (("test", True), ("all", True), ("train", False)):
        state = start(env, obj_set, 132_860)
        before = np.asarray(env.describe()["object_pose"][:2])
        for step in range(1, 8):
            env.advance(STAY)
            here = np.asarray(env.describe()["object_pose"][:2])
            if moves and step >= 5:
                assert np.linalg.norm(here - state.moves_to[:2]) < 0.03 < np.linalg.norm(here - before)
            else:
                assert np.linalg.norm(here - before) < 0.01
    # envs of one vector env that are at different steps move their objects at different times
    with world.make_envs(env.env_id, 2, obj_set="test", auto_reset=True, image_size=(16, 16), sim_freq=100) as envs:
        envs.reset([132_860, 132_860])
        envs.step(np.zeros((2, 1, 7)))
        envs.reset([132_860], env_indices=[1])
        envs.step(np.zeros((2, 4, 7)))
        first, second = (np.asarray(state["object_pose"][:2]) for state in envs.describe())
        assert np.linalg.norm(first - second) > 0.1
        envs.step(np.zeros((2, 1, 7)))
        first, second = (np.asarray(state["object_pose"][:2]) for state in envs.describe())
        assert np.linalg.norm(first - second) < 0.01
    env.close()


def test_rlinf_neither_settles_nor_moves():
    env = build("Main-v3", protocol="rlinf")
    state = start(env, "train", 7)
    assert env.describe()["object_pose"][:3] == pytest.approx(state.object_position) and state.object_position[2] == 0.9
    env.close()
    env = build("PositionChangeTo-v1", protocol="rlinf")
    state = start(env, "test", 132_860)
    pictures, places = [], []
    for _ in range(6):
        env.advance(STAY)
        pictures.append(env.render_image().astype(int))
        places.append(np.asarray(env.describe()["object_pose"][:2]))
    shown = [np.linalg.norm(place - state.moves_to[:2]) < 1e-6 for place in places]
    assert shown == [False, False, False, False, True, False]
    assert np.abs(pictures[4] - pictures[3]).max() > 50 > np.abs(pictures[5] - pictures[3]).max()
    env.close()


def test_foreground_texture_changes_what_is_seen_and_only_that():
    plain, env = build("Main-v3"), build("VisionTexture05-v1")
    per_texture = 16 * 784 * 4
    state = start(env, "test", 2 * per_texture)  # texture 3, table 0
    start(plain, "train", 0)
    assert state.texture_index == 3 and env.describe()["texture"] == "004.png"
    plain._casters = env._casters = []  # shadows lie on the background
    a, b = plain.render_image().astype(int), env.render_image().astype(int)
    changed = (a != b).any(axis=-1)
    background = (a == plain._overlay).all(axis=-1)
    assert not (changed & background).any() and changed.sum() > 0.8 * (~background).sum()
    start(env, "train", 0)  # texture 0 has weight 0
    assert env.describe()["texture_weight"] == 0
    env._casters = []
    np.testing.assert_array_equal(env.render_image(), a)
    plain.close()
    env.close()


def test_whole_texture_by_hand():
    env = build("VisionWhole03-v1")
    start(env, "test", 0)
    color = np.full((48, 64, 3), 100, np.uint8)
    segmentation = np.zeros((48, 64, 1), np.int16)
    segmentation[10:21, 30:35] = 77  # rows 10 to 20, columns 30 to 34: middle (15, 32)
    env._overlay = np.full((48, 64, 3), 200, np.uint8)
    env._casters = []
    wanted = np.where(segmentation == 77, 100, 200) * 0.7 + env._texture[15 : 15 + 48, 32 : 32 + 64] * 0.3
    assert np.abs(env._compose(color, segmentation) - wanted).max() <= 1
    assert env._texture.shape == (96, 128, 3)
    env.close()


@pytest.mark.full
def test_members_of_a_group_start_alike_and_history_does_not_matter():
    for short, obj_set, episode_id in (
        ("MultiCarrot-v1", "test", 1_234_567),
        ("MultiPlate-v1", "train", 10_330_815),
        ("EEPose-v1", "test", 711_662_933),
        ("VisionTexture03-v1", "test", 792_111),
        ("PositionChangeTo-v1", "test", 132_860),
    ):
        kwargs = dict(obj_set=obj_set, image_size=(64, 48), sim_freq=100)
        with world.make_envs(NAME + short, 3, **kwargs) as envs:
            envs.reset([episode_id, 5, 99_999])
            envs.step(np.full((3, 4, 7), 0.01))
            obs = envs.reset([episode_id] * 3)
            assert all(torch.equal(obs["image"][0], image) for image in obs["image"])
            first = envs.describe()
            assert first[0] == first[1] == first[2] and len(set(obs["task_description"])) == 1
            actions = np.full((3, 6, 7), 0.01)
            later, states = envs.step(actions)[0]["image"], envs.describe()
            assert states[0] == states[1] == states[2] and torch.equal(later[0], later[2])


@pytest.mark.parametrize(
    "short, obj_set",
    [
        ("Carrot-v1", "test"),
        ("Plate-v1", "test"),
        ("Position-v1", "test"),
        ("EEPose-v1", "test"),
        ("PositionChangeTo-v1", "test"),
        ("MultiCarrot-v1", "test"),
        ("MultiPlate-v1", "test"),
    ],
)
def test_expert_succeeds(short, obj_set):
    env = build(short, image_size=(16, 16))
    total = variants.num_start_states(env.env_id, obj_set)
    successes = 0
    for k in range(10):
        start(env, obj_set, variants.train_episode_id(total, 3, 0, k))
        successes += expert_episode(env)[0]
    assert successes >= 8
    env.close()


def test_a_chunk_costs_one_render(monkeypatch):
    from envs.put_on_plate import PutOnPlateInScene

    count, render = [], PutOnPlateInScene.render_image
    monkeypatch.setattr(PutOnPlateInScene, "render_image", lambda self: count.append(1) or render(self))
    with world.make_envs(NAME + "Main-v3", 2, image_size=(16, 16), sim_freq=100) as envs:
        envs.reset()
        assert len(count) == 2
        envs.step(np.zeros((2, 8, 7)))
        assert len(count) == 4


# ---------------------------------------------------------------------------------------------------------------------
# assets that are missing or damaged
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the published layout that may be damaged: links to everything, folders of its own."""
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "nowhere"))
    folder = tmp_path / "assets"
    shutil.copytree(ASSETS, folder, copy_function=lambda source, target: os.symlink(os.path.realpath(source), target))
    return folder


def bridge(folder) -> object:
    from envs.assets.bridge import BridgeAssets

    return BridgeAssets(str(folder))


@needs_assets
def test_missing_files_are_named(copied, tmp_path):
    """`missing` has them all, and the error names three of them, how many more there are, and the remedy."""
    from envs.assets.bridge import Layout

    gone = [
        "carrot/more_carrot/model_db.json",
        "carrot/more_plate/002_cloth_1/collision.obj",
        "carrot/more_table/textures/017.png",
        "robots/widowx/meshes_wx250s/WXSA-250-M-5-LF.stl",
        "carrot/more_carrot/001_carrot_simpler/Image_0.005.png",
        "carrot/more_carrot/025_cup_1/textured.glb",
        "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb",
    ]
    for name in gone:
        (copied / name).unlink()
    missing = Layout(str(copied)).missing()
    assert sorted(missing) == sorted(str(copied / name) for name in gone)
    with pytest.raises(RuntimeError) as caught:
        bridge(copied)
    assert str(caught.value).startswith(
        f"asset pack 'bridge' lacks 7 files ({', '.join(missing[:3])} and 4 more): fetch what is missing with "
        "`python doctor.py --download`, or with `hf download RLinf/maniskill_assets "
    )
    for name in ("widowx250s", "bridge_v2_real2sim"):
        assert f"`python -m mani_skill.utils.download_asset {name} -y`" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"lacks 13\d files"):
        bridge(tmp_path)  # nothing at all
    with pytest.raises(ValueError, match="is not a folder"):
        bridge(tmp_path / "no_such_folder")


@needs_assets
def test_maniskills_own_folder_is_found(copied, tmp_path, monkeypatch):
    """robots/ and tasks/ where ManiSkill puts them ($MS_ASSET_DIR/data), carrot/ elsewhere; or all in one place."""
    from envs.assets.bridge import BridgeAssets

    own = tmp_path / "maniskill" / "data"
    own.mkdir(parents=True)
    for part in ("robots", "tasks"):
        (copied / part).rename(own / part)
    with pytest.raises(RuntimeError, match="lacks"):
        bridge(copied)
    monkeypatch.setenv("MS_ASSET_DIR", str(own.parent))
    pack = bridge(copied)
    assert pack.robot_urdf == str(own / "robots/widowx/wx250s.urdf") and len(pack.objects) == 25
    (copied / "carrot").rename(own / "carrot")
    assert BridgeAssets(None).receptacles[16].name == "notepad"


def _spoil(path: Path, change) -> None:
    data = path.read_bytes()
    path.unlink()  # a link
    path.write_bytes(change(data))


DB = "carrot/more_carrot/model_db.json"
GLB = "carrot/more_carrot/003_bread_1/textured.glb"
URDF, DAE = "robots/widowx/wx250s.urdf", "carrot/more_plate/001_plate_simpler/textured.dae"


def with_json(data: bytes, old: bytes, new: bytes) -> bytes:
    """A .glb whose description has every `old` replaced by `new`; for "[{" the one of its buffers alone."""
    (size,) = struct.unpack_from("<I", data, 12)
    text = data[20 : 20 + size]
    at = text.index(b'"buffers"') if old == b"[{" else text.index(old)
    text = text[:at] + text[at:].replace(old, new, 1)
    text += b" " * (-len(text) % 4)
    rest = data[20 + size :]
    return (
        struct.pack("<4sII", b"glTF", 2, 20 + len(text) + len(rest))
        + struct.pack("<I4s", len(text), b"JSON")
        + text
        + rest
    )


def huge_png() -> bytes:
    """A header that claims 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(8)


@needs_assets
@pytest.mark.parametrize(
    "name, change, use",
    [
        ("carrot/more_carrot/003_bread_1/collision.obj", lambda data: data[: len(data) // 2], "object"),
        ("carrot/more_carrot/003_bread_1/collision.obj", lambda data: data.replace(b"v 0.", b"v x.", 1), "object"),
        ("carrot/more_carrot/003_bread_1/collision.obj", lambda data: b"", "object"),
        (GLB, lambda data: data[:-100], "object"),
        (GLB, lambda data: b"<html>404</html>", "object"),
        ("carrot/more_plate/001_plate_simpler/textured.dae", lambda data: data[:2000], "receptacle"),
        ("carrot/more_plate/001_plate_simpler/plate_texture.png", lambda data: data[: len(data) // 2], "receptacle"),
        ("carrot/more_table/imgs/001_table_simpler.png", lambda data: data[: len(data) // 2], "picture"),
        ("carrot/more_table/textures/005.png", lambda data: b"version https://git-lfs", "texture"),
        ("robots/widowx/meshes_wx250s/WXSA-250-M-10-Finger.stl", lambda data: data[:-7], "robot"),
        ("carrot/more_plate/model_db.json", lambda data: data[:-20], "database"),
        ("carrot/more_plate/model_db.json", lambda data: b"{}", "database"),
        ("carrot/more_carrot/model_db.json", lambda data: data.replace(b'"density"', b'"weight"', 1), "database"),
        ("tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb", lambda data: data[:500], "stage"),
        (DB, lambda data: data.replace(b"1044", b"NaN", 1), "database"),
        (DB, lambda data: data.replace(b"1044", b"-1", 1), "database"),
        (DB, lambda data: data.replace(b'"density"', b'"name": "x", "name"', 1), "database"),
        (DB, lambda data: b"[" * 100_000, "database"),
        (GLB, lambda data: with_json(data, b'"buffers"', b'"nuffers"'), "object"),
        (GLB, lambda data: with_json(data, b'"count":', b'"count":-'), "object"),
        (GLB, lambda data: with_json(data, b"{", b"[" * 99_999), "object"),
        ("carrot/more_table/imgs/001_table_simpler.png", lambda data: huge_png(), "picture"),
        ("carrot/more_table/imgs/001_table_simpler.png", lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n", "picture"),
        (URDF, lambda data: b'<!DOCTYPE r [<!ENTITY a "b">]>' + data, "robot"),
        (URDF, lambda data: data[:3000], "robot"),
        # files that name others, outside their folder
        (URDF, lambda data: data.replace(b'"meshes_wx250s/', b'"../../', 1), "robot"),
        (URDF, lambda data: data.replace(b'"meshes_wx250s/', b'"/etc/', 1), "robot"),
        (DAE, lambda data: data.replace(b">plate_texture.png<", b">../../../../x.png<"), "receptacle"),
        ("carrot/more_carrot/003_bread_1/collision.obj", lambda data: b"mtllib ../../x.mtl\n" + data, "object"),
        (GLB, lambda data: with_json(data, b"[{", b'[{"uri":"/etc/x",'), "object"),
    ],
)
def test_damaged_files_are_named(copied, name, change, use):
    import sapien

    path = copied / name
    _spoil(path, change)
    with pytest.raises(RuntimeError, match=f"{re.escape(str(path))} is damaged") as caught:
        pack, builder = bridge(copied), sapien.ActorBuilder()
        if use in ("object", "receptacle"):
            pack.add_model(builder, pack.objects[2] if use == "object" else pack.receptacles[0])
        elif use == "picture":
            pack.table_image(0, 64, 48)
        elif use == "texture":
            pack.texture(4, 64, 48)
        elif use == "stage":
            pack.add_stage(builder)
        else:
            assert pack.robot_urdf
    assert "\n" not in str(caught.value) and "doctor.py --download" in str(caught.value)


@needs_assets
@pytest.mark.parametrize("name", [DB, URDF, "carrot/more_table/textures/017.png"])
def test_pipes_among_the_assets_are_not_waited_for(copied, name):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(RuntimeError, match=rf"lacks 1 file \({re.escape(str(copied / name))}\): fetch"):
        bridge(copied)


@needs_assets
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("shut", ["carrot", "carrot/more_table/imgs/001_table_simpler.png"])
def test_unreadable_assets_are_named(copied, shut):
    """Root may read everything, so this is tried as another user.

    That user may not be able to read the folder that holds this environment. A whole picture is therefore read first:
    nothing is left that Python would import afterwards.
    """
    path = copied / shut
    if path.is_file():
        _spoil(path, lambda data: data)
    path.chmod(0)
    for parent in copied.parents:
        if not parent.stat().st_mode & 0o001 and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys\n"
        "from envs.assets.bridge import BridgeAssets\n"
        "BridgeAssets(sys.argv[2]).table_image(0, 64, 48)\n"
        "os.setuid(65534)\n"
        "try:\n    BridgeAssets(sys.argv[1]).table_image(0, 64, 48)\n"
        "except RuntimeError as error:\n    print(error)"
    )
    out = python("-c", code, copied, ASSETS)
    path.chmod(0o755)
    assert re.search(rf"{re.escape(str(path))}.*may not be read by this user", out.stdout), out.stdout + out.stderr


@needs_assets
def test_every_published_file_is_whole(monkeypatch):
    """The checks accept what is published, and every body can be built."""
    from envs.assets.bridge import checked

    env = build("Main-v3", **RECORDED_WORLD, image_size=(16, 16))
    layout = env.pack.layout
    for kind, models in (("carrot", env.pack.objects), ("plate", env.pack.receptacles)):
        for model in models:
            folder = layout.carrot / f"more_{kind}" / model.key
            assert checked(folder / "collision.obj") and checked(layout.visual(folder, "textured.glb"))
    for index in range(21):
        assert env.pack.table_image(index, 640, 480).shape == env.pack.texture(index, 640, 480).shape == (480, 640, 3)
    env.close()


# ------------------------------------------------------------------ shader pack
def test_the_smaller_shader_pack_draws_the_same_picture(monkeypatch):
    from mani_skill.render.shaders import PREBUILT_SHADER_CONFIGS

    from envs import make_envs
    from envs.assets import shaders

    pictures, packs = [], [shaders.minimal_shader_config(), PREBUILT_SHADER_CONFIGS["minimal"]]
    assert packs[0].shader_pack != packs[1].shader_pack == "minimal"
    for config in packs:
        monkeypatch.setattr(shaders, "minimal_shader_config", lambda config=config: config)
        with make_envs("PutOnPlateInScene25VisionWhole05-v1", 3, obj_set="test", sim_freq=100) as envs:
            pictures.append(envs.reset([0, 123456, 7])["image"])
    assert (pictures[0] == pictures[1]).all() and pictures[0].float().std() > 10


def test_missing_and_changed_shaders_are_written_again(scratch):
    """What cleans temporary folders removes old files and leaves their folder."""
    import sapien

    from envs.assets import shaders

    stock = Path(sapien.__file__).parent / "vulkan_shader"
    place = shaders.write_pack(stock)
    whole = {path: path.read_bytes() for path in place.parent.rglob("*.*") if path.is_file()}
    assert {path.parent.name for path in whole} == {"common", "minimal"}
    first, second, *_ = whole
    first.unlink()
    second.write_text("half of it")
    assert shaders.write_pack(stock) == place and {path: path.read_bytes() for path in whole} == whole
    assert [path.name for path in scratch.iterdir()] == [place.parent.name]


# ------------------------------------------------------------------ the scratch folder
@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where the scratch folder will be."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"solovla_{os.getuid()}"


def test_the_scratch_folder_is_this_users_alone(scratch):
    from envs.scratch import scratch_folder

    old = os.umask(0)  # whatever is asked for elsewhere
    try:
        assert scratch_folder() == scratch and scratch.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)
    scratch.chmod(0o755)  # as earlier versions made it
    assert scratch_folder() == scratch and scratch.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "prepare",
    [
        lambda place: place.symlink_to(place.parent),
        lambda place: place.symlink_to("nothing"),
        lambda place: place.write_text("a file"),
        lambda place: (place.mkdir(), place.chmod(0o777)),
        pytest.param(
            lambda place: (place.mkdir(), os.chown(place, 65534, 65534)),
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away"),
        ),
    ],
)
def test_a_scratch_folder_that_somebody_else_made_is_refused(scratch, prepare):
    """Robots and shaders are read back from it: one sentence, and nothing is put there."""
    from envs.assets import shaders
    from envs.assets.builtin import BuiltinAssets

    prepare(scratch)
    stock = Path(shaders.sapien.__file__).parent / "vulkan_shader"
    for use in (lambda: BuiltinAssets().robot_urdf, lambda: shaders.write_pack(stock)):
        with pytest.raises(
            RuntimeError, match=f"{scratch} is not a folder of this user only: remove it, or set TMPDIR"
        ):
            use()
    assert not scratch.is_dir() or not list(scratch.glob("*.urdf"))


def test_two_versions_on_one_machine_have_an_arm_each(scratch, monkeypatch):
    """Both use one scratch folder, and a worker that starts later reads the arm of its own version."""
    from envs.assets import builtin

    ours = Path(builtin.BuiltinAssets().robot_urdf)
    text = ours.read_text()
    monkeypatch.setattr(builtin, "robot_urdf_text", lambda: text.replace("0.1", "0.2"))
    theirs = Path(builtin.BuiltinAssets().robot_urdf)
    assert theirs != ours and theirs.parent == ours.parent == scratch
    assert ours.read_text() == text != theirs.read_text()
    assert ours.with_suffix(".srdf").is_file() and theirs.with_suffix(".srdf").is_file()


def test_there_is_one_scratch_folder():
    places = [path.name for path in (ROOT / "envs").glob("*.py") if "gettempdir" in path.read_text()]
    assert places == ["scratch.py"]


def test_an_unknown_shader_pack_is_left_alone(tmp_path, scratch):
    """The whole pack makes a smaller one. A pack that lacks a part, or says it in other words, stays as it is."""
    from envs.assets import shaders

    (tmp_path / "minimal").mkdir(parents=True)
    (tmp_path / "common").mkdir()
    whole = {
        "gbuffer.frag": "layout(set = 3, binding = 8) uniform sampler2D samplerBRDFLUT;\n"
        "layout(location = 0) out vec4 outColorRaw;\n"
        "vec2 b = texture(samplerBRDFLUT, vec2(r, n)).xy;\n"
        "  outColorRaw = vec4(clamp(color, vec3(0), vec3(1)), albedo.a);\n",
        "composite.vert": "void main() {}\n",
        "composite0.frag": "uniform sampler2D samplerColorRaw;\n",
    }
    drawn = whole["gbuffer.frag"]
    for name, text in (
        ("gbuffer.frag", "void main() {}\n"),
        ("gbuffer.frag", drawn.replace("texture(", "textureLod(")),
        ("gbuffer.frag", drawn.replace("albedo.a);", "1);")),
        ("gbuffer.frag", drawn.replace("samplerBRDFLUT", "table")),
        ("composite0.frag", ""),
    ):
        for key, value in (whole | {name: text}).items():
            (tmp_path / "minimal" / key).write_text(value)
        assert shaders.write_pack(tmp_path) is None
    for key, value in whole.items():
        (tmp_path / "minimal" / key).write_text(value)
    place = shaders.write_pack(tmp_path)
    assert [path.name for path in place.iterdir()] == ["gbuffer.frag"]
    assert (place / "gbuffer.frag").read_text().splitlines() == [
        "layout(location = 0) out vec4 outColor;",
        "vec2 b = vec2(0);",
        "  outColor = vec4(clamp(color, vec3(0), vec3(1)) * albedo.a, albedo.a);",
    ]
    assert [path.name for path in scratch.iterdir()] == [place.parent.name]

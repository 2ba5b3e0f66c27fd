"""The world: start states against hand-worked numbers and recorded resets, bit-equal episodes, the step contract."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from launching import python
from made_up import busy_actions
from sameness import as_saved, same

import envs as world
from envs import variants
from envs.expert import Expert

FIXTURES = ROOT.parent / "shared" / "fixtures" / "env"
MAIN = "PutOnPlateInScene25Main-v3"
SMALL = dict(image_size=(48, 48), sim_freq=100)
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.exists(), reason=f"recorded resets of the published env are not at {FIXTURES}"
)


def make(num_envs=2, **kwargs):
    return world.make_envs(MAIN, num_envs, **(SMALL | kwargs))


def expert_episodes(envs, episode_ids) -> tuple[np.ndarray, list[np.ndarray]]:
    """Success of each episode, bool [N], and the actions given, [n_i, 7] each."""
    envs.reset(episode_ids)
    experts, given = [Expert() for _ in episode_ids], [[] for _ in episode_ids]
    success, running = np.zeros(len(episode_ids), bool), np.ones(len(episode_ids), bool)
    while running.any():
        states = envs.describe()
        actions = np.zeros((len(episode_ids), 1, 7), np.float32)
        for i in np.flatnonzero(running):
            actions[i, 0] = experts[i](states[i])
            given[i].append(actions[i, 0])
        _, _, terminations, truncations, _ = envs.step(actions)
        success |= terminations.numpy()
        running &= ~(terminations | truncations).numpy()
    return success, [np.asarray(actions) for actions in given]


# ---------------------------------------------------------------------------------------------------------------------
# start states: pure arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_number_of_start_states():
    assert len(variants.placements(variants.GRID)) == 784
    assert world.num_start_states(MAIN, "train") == 16 * 1 * 16 * 784 * 4 == 802_816
    assert world.num_start_states(MAIN, "test") == 9 * 1 * 5 * 784 * 4 == 141_120
    assert world.num_start_states(MAIN, "all") == 25 * 1 * 21 * 784 * 4


def test_decode_by_hand():
    # 183316 = (((3 * 1 + 0) * 16 + 10) * 784 + 357) * 4 + 0: object 3, receptacle 0, table 10, pair 357, yaw 0
    start = variants.decode(MAIN, "train", 183_316)
    assert (start.object_index, start.receptacle_index, start.table_index, start.object_yaw) == (3, 0, 10, 0.0)
    np.testing.assert_allclose(start.object_position, (-0.175, 0.045, 0.95), atol=1e-12)
    first, last = variants.decode(MAIN, "train", 0), variants.decode(MAIN, "train", 802_815)
    # the first object point is a corner; the nearest point more than 7 cm away along y is three cells on
    np.testing.assert_allclose(
        first.object_position[:2] + first.receptacle_position[:2], (-0.235, -0.075, -0.235, 0.015), atol=1e-12
    )
    np.testing.assert_allclose(
        last.object_position[:2] + last.receptacle_position[:2], (-0.085, 0.075, -0.085, -0.015), atol=1e-12
    )
    assert (last.object_index, last.table_index) == (15, 15)
    assert last.object_yaw == pytest.approx(np.deg2rad(135))
    test = variants.decode(MAIN, "test", 0)
    assert (test.object_index, test.table_index) == (16, 16)


def test_decode_is_one_to_one():
    ids = np.random.RandomState(0).choice(802_816, 3000, replace=False)
    starts = {
        tuple(v for k, v in vars(variants.decode(MAIN, "train", int(i))).items() if k != "episode_id") for i in ids
    }
    assert len(starts) == 3000


@needs_fixtures
def test_counts_agree_with_the_published_env():
    published = json.loads((FIXTURES / "start_states.json").read_text())
    for env_id, variant in variants.VARIANTS.items():
        for obj_set in variant.sets:
            if f"{env_id}:{obj_set}" in published:
                assert world.num_start_states(env_id, obj_set) == published[f"{env_id}:{obj_set}"]


def test_held_out_episodes():
    assert variants.splitmix64(0) == 0xE220A8397B1DCDAF  # the published generator's first output for seed 0
    total = world.num_start_states(MAIN, "train")
    share = np.mean([world.is_held_out(i) for i in range(20_000)])
    assert abs(share - 1 / 8) < 0.008
    train = [variants.train_episode_id(total, seed, env, k) for seed in range(2) for env in range(8) for k in range(50)]
    assert not any(map(world.is_held_out, train))
    assert len(set(train)) > 750  # 800 draws from 802,816
    chosen = world.eval_episode_ids(MAIN, "train", 300)
    assert all(map(world.is_held_out, chosen)) and len(set(chosen)) == 300
    assert world.eval_episode_ids(MAIN, "train", 40) == chosen[:40]
    assert world.eval_episode_ids(MAIN, "test", 40) != world.eval_episode_ids(MAIN, "all", 40)
    with pytest.raises(ValueError, match="holds out"):
        world.eval_episode_ids(MAIN, "test", 141_120)


def test_importing_envs_imports_no_simulator():
    code = "import sys, envs; print([m for m in ('mani_skill', 'sapien', 'torch', 'vla') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# the task
# ---------------------------------------------------------------------------------------------------------------------


@needs_fixtures
def test_resets_agree_with_the_published_env():
    """Names, text, table, arm: equal. Poses: same grid cell and yaw; meshes differ, so not to the millimetre."""
    from envs.assets import catalog

    recorded = [r for r in json.loads((FIXTURES / "resets.json").read_text()) if r["env_id"] == MAIN]
    assert recorded
    for record in recorded:
        with make(1, obj_set=record["obj_set"]) as envs:
            envs.reset([record["episode_id"]])
            state = envs.describe()[0]
        assert (state["object"], state["receptacle"], state["instruction"]) == (
            record["object_name"],
            record["plate_name"],
            record["instruction"],
        )
        start = variants.decode(MAIN, record["obj_set"], record["episode_id"])
        assert catalog.TABLES[start.table_index].key == record["table"]
        assert catalog.OBJECTS[start.object_index].key == record["object_key"]
        np.testing.assert_allclose(state["qpos"], record["qpos"], atol=1e-5)
        np.testing.assert_allclose(state["robot_pose"], record["robot_base_pose"], atol=1e-6)
        np.testing.assert_allclose(state["tcp_pose"], record["ee_pose"], atol=1e-5)  # link offsets are the real ones
        np.testing.assert_allclose(state["object_pose"][:2], record["obj_pose"][:2], atol=0.012)
        np.testing.assert_allclose(state["receptacle_pose"][:2], record["plate_pose"][:2], atol=0.012)
        # |<q1, q2>| = cos(half the angle between); 15 degrees, because things settle differently
        assert abs(np.dot(state["object_pose"][3:], record["obj_pose"][3:])) > np.cos(np.deg2rad(7.5))


@needs_fixtures
def test_camera_sees_what_the_published_camera_sees():
    """The yellow plate covers the same pixels, and the fingertips the same ones as in the published picture."""
    from PIL import Image

    from envs import gym_env

    env = gym_env.build(MAIN, image_size=(640, 480), sim_freq=100)
    env.start_episode(variants.decode(MAIN, "train", 183_316))
    ours = env.render_image().astype(int)
    published = np.asarray(Image.open(FIXTURES / "Main-v3__train__183316.png").convert("RGB")).astype(int)
    plates = [
        (image[..., 0] > 150) & (image[..., 1] > 150) & (image[..., 1] - image[..., 2] > 50)
        for image in (ours, published)
    ]
    assert np.logical_and(*plates).sum() / np.logical_or(*plates).sum() > 0.75
    ids = env._camera.get_picture("PositionSegmentation")[..., 3]  # our tips are light, so colours do not show them
    tips = [np.isin(ids, [finger.entity.per_scene_id for finger in env._fingers])]
    tips.append(published.max(axis=-1) < 90)  # dark, before a bright table
    tips = [mask[130:180, 265:400] for mask in tips]
    assert np.logical_and(*tips).sum() / np.logical_or(*tips).sum() > 0.6
    env.close()


def test_reward_by_hand():
    """The potential's increase: 0.1 first grasp, 0.1 five in a row, 1 for success after a grasp, -1 for losing it."""
    from envs import gym_env

    env = gym_env.build(MAIN, image_size=(16, 16), sim_freq=100)
    grasps = [0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    on = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]
    wanted = [0, 0.1, 0, 0, 0, 0, 0, 0.1, 0, 1, -1, 1]
    flags = iter(zip(map(bool, grasps), map(bool, on)))
    env._grasped_and_on = lambda: next(flags)
    np.testing.assert_allclose([env._judge()[0] for _ in grasps], wanted, atol=1e-12)
    env.start_episode(env.start)
    env._grasped_and_on = lambda: (False, True)
    assert env._judge() == (0.0, True)  # pushed onto the plate, never grasped: success without reward
    env.close()


def test_fast_path_equals_base_env_step():
    """advance() and render_image() against BaseEnv.reset and step: pictures, states, rewards, bit for bit."""
    from envs import gym_env

    fast = gym_env.build(MAIN, **SMALL)
    plain = gym_env.build(MAIN, obs_mode="rgb+segmentation", **SMALL)
    for episode_id in (5, 700_001):
        fast.start_episode(variants.decode(MAIN, "train", episode_id))
        obs, _ = plain.reset(options={"episode_id": episode_id})
        expert, steps = Expert(), 0
        while not fast.success and steps < 40:
            np.testing.assert_array_equal(obs["sensor_data"][gym_env.CAMERA]["rgb"][0].numpy(), fast.render_image())
            assert fast.describe() == plain.describe()
            action = expert(fast.describe() | {"elapsed_steps": steps})[None]
            action[0, 3:5] = 0.02 * np.sin(steps)
            action[0, 6] = 2 * action[0, 6] - 1
            if steps == 12:
                action[0, :3] = 0.6, 0.2, 0.1  # out of reach: no inverse kinematics, the arm stays
            elif steps == 13:
                action[0, :3] = -0.6, -0.2, -0.1
            reward, success = fast.advance(torch.from_numpy(action))
            obs, plain_reward, terminated, _, _ = plain.step(action)
            assert np.float32(reward) == plain_reward.item() and success == terminated.item()
            steps += 1
        assert fast.potential > 0  # contacts were part of the comparison
    fast.close()
    plain.close()


def test_expert_succeeds():
    with make(8) as envs:
        ids = [variants.train_episode_id(envs.num_start_states, 1, 0, k) for k in range(16)]
        success = np.concatenate([expert_episodes(envs, ids[:8])[0], expert_episodes(envs, ids[8:])[0]])
    assert success.sum() >= 14


# ---------------------------------------------------------------------------------------------------------------------
# determinism
# ---------------------------------------------------------------------------------------------------------------------


def play(envs, episode_id: int, actions: np.ndarray):
    """One env: everything that can be seen of one episode under given actions [n, 7]."""
    seen = [envs.reset([episode_id]), envs.describe()]
    for action in actions:
        seen += [*envs.step(action[None, None]), envs.describe()]
    return seen


def test_an_episode_does_not_depend_on_what_came_before():
    with make(2) as pair:
        ids = world.eval_episode_ids(MAIN, "train", 4)
        given = dict(
            zip(ids, expert_episodes(pair, ids[:2])[1] + expert_episodes(pair, ids[2:])[1])
        )  # grasps and places
    with make(1) as envs:
        first = {i: play(envs, i, given[i]) for i in ids}
        again = {i: play(envs, i, given[i]) for i in (ids[2], ids[0], ids[0], ids[3], ids[1])}
    for i in ids:
        with make(1) as fresh:
            assert same(play(fresh, i, given[i]), first[i])
        assert same(again[i], first[i])


def test_resume_in_the_middle_of_an_episode():
    actions = busy_actions(3, 24)
    with make(3, auto_reset=True, max_episode_steps=7, seed=4) as envs:
        envs.reset()
        for t in range(0, 12, 3):
            obs = envs.step(actions[:, t : t + 3])[0]
        state = as_saved(envs.state_dict())
        described = envs.describe()
        wanted = [envs.step(actions[:, t : t + 3]) for t in range(12, 24, 3)]
        with pytest.raises(ValueError, match="seed=4"):
            make(3, auto_reset=True, max_episode_steps=7, seed=5).load_state_dict(state)
    for workers in (0, 2):
        with make(3, auto_reset=True, max_episode_steps=7, seed=4, num_env_workers=workers) as envs:
            assert same(envs.load_state_dict(state), obs)
            assert envs.describe() == described
            assert same([envs.step(actions[:, t : t + 3]) for t in range(12, 24, 3)], wanted)


# ---------------------------------------------------------------------------------------------------------------------
# the step contract
# ---------------------------------------------------------------------------------------------------------------------


def test_shapes_and_types():
    with make(2, image_size=(64, 48)) as envs:
        obs = envs.reset()
        assert obs["image"].shape == (2, 48, 64, 3) and obs["image"].dtype == torch.uint8
        assert [text.startswith("put ") for text in obs["task_description"]] == [True, True]
        kept = obs["image"].clone()
        _, rewards, terminations, truncations, infos = envs.step(torch.zeros(2, 4, 7, dtype=torch.float64))
        assert torch.equal(obs["image"], kept)  # never overwritten
        assert rewards.shape == infos["valid"].shape == (2, 4)
        assert (rewards.dtype, infos["valid"].dtype, terminations.dtype) == (torch.float32, torch.bool, torch.bool)
        assert terminations.shape == truncations.shape == (2,)
        assert infos["ended"].dtype == torch.int64 and len(infos["ended"]) == 0
        assert infos["final_observation"]["image"].shape == (0, 48, 64, 3)
        assert (envs.num_envs, envs.image_size, envs.env_id, envs.obj_set) == (2, (64, 48), MAIN, "train")
        assert envs.max_episode_steps == 80 and envs.num_start_states == 802_816


def test_gripper_threshold_is_the_envs_business():
    with make(2) as envs:
        envs.reset([7, 7])
        actions = np.zeros((2, 3, 7), np.float32)
        actions[0, :, 6], actions[1, :, 6] = 0.51, 0.5
        envs.step(actions)
        opened, closed = (state["qpos"][6] for state in envs.describe())
    assert opened > 0.036 and closed < 0.017


def test_a_chunk_is_its_actions_one_by_one():
    """Success inside a chunk: the rest of the chunk is neither simulated nor counted."""
    ids = world.eval_episode_ids(MAIN, "train", 2)
    with make(2) as envs:
        success, given = expert_episodes(envs, ids)
        assert success.all()
        length = -(-max(map(len, given)) // 8) * 8 + 8
        actions = np.zeros((2, length, 7), np.float32)
        for i, sequence in enumerate(given):
            actions[i, : len(sequence)] = sequence

        envs.reset(ids)
        single = [envs.step(actions[:, t : t + 1]) for t in range(length)]
        frames = [step[0]["image"] for step in single]
        envs.reset(ids)
        ended = set()
        for t in range(0, length, 8):
            obs, rewards, terminations, truncations, infos = envs.step(actions[:, t : t + 8])
            part = single[t : t + 8]
            assert torch.equal(rewards, torch.cat([step[1] for step in part], dim=1))
            assert torch.equal(infos["valid"], torch.cat([step[4]["valid"] for step in part], dim=1))
            assert torch.equal(terminations, torch.stack([step[2] for step in part]).any(dim=0))
            assert not truncations.any() and torch.equal(obs["image"], frames[t + 7])
            for m, i in enumerate(infos["ended"].tolist()):
                ended.add(i)
                episode, n = infos["episode"], len(given[i])
                assert (
                    episode["episode_len"][m] == n and episode["success_once"][m] == episode["success_at_end"][m] == 1
                )
                total = sum(float(step[1][i, 0]) for step in single)
                assert episode["return"][m] == pytest.approx(total) == pytest.approx(1.2)
                assert episode["reward"][m] == pytest.approx(total / n)
                assert torch.equal(infos["final_observation"]["image"][m], frames[n - 1][i])
        assert ended == {0, 1}


def test_without_auto_reset_an_ended_env_rests():
    with make(2, max_episode_steps=3) as envs:
        envs.reset([11, 12])
        _, _, terminations, truncations, infos = envs.step(np.zeros((2, 5, 7)))
        assert truncations.all() and not terminations.any()
        assert infos["valid"].tolist() == [[True] * 3 + [False] * 2] * 2
        last, before = envs.describe(), infos["final_observation"]["image"]
        obs, rewards, terminations, truncations, infos = envs.step(busy_actions(2, 4))
        assert not (
            infos["valid"].any() or rewards.any() or terminations.any() or truncations.any() or len(infos["ended"])
        )
        assert torch.equal(obs["image"], before) and envs.describe() == last
        envs.reset([11, 12])
        assert envs.step(np.zeros((2, 1, 7)))[4]["valid"].all()


def test_auto_reset_follows_each_envs_stream():
    with make(2, auto_reset=True, max_episode_steps=3, seed=9, first_env=6) as envs, make(2) as other:
        envs.reset()
        for k in range(1, 3):
            obs, _, _, truncations, infos = envs.step(busy_actions(2, 4, seed=k))
            assert truncations.all() and infos["ended"].tolist() == [0, 1] and infos["valid"].sum() == 6
            ids = [state["episode_id"] for state in envs.describe()]
            assert ids == [variants.train_episode_id(envs.num_start_states, 9, 6 + i, k) for i in range(2)]
            assert same(obs, other.reset(ids))  # the next episode's first frame and instruction
            assert not torch.equal(obs["image"], infos["final_observation"]["image"])


def test_ignore_terminations():
    ids = world.eval_episode_ids(MAIN, "train", 1)
    with make(1) as envs:
        success, given = expert_episodes(envs, ids)
    actions = np.concatenate([given[0], np.zeros((4, 7), np.float32)])[None]
    actions[0, -4:, 2], actions[0, -4:, 6] = 0.03, given[0][-1, 6]  # take it away again
    with make(1, ignore_terminations=True, max_episode_steps=actions.shape[1]) as envs:
        envs.reset(ids)
        _, rewards, terminations, truncations, infos = envs.step(actions)
    assert success[0] and not terminations[0] and truncations[0] and infos["valid"].all()
    episode = infos["episode"]
    assert episode["success_once"][0] == 1 and episode["success_at_end"][0] == 0
    assert rewards[0].min() == pytest.approx(-1) and episode["return"][0] == pytest.approx(0.2)


def test_success_at_the_last_step_is_a_termination():
    ids = world.eval_episode_ids(MAIN, "train", 1)
    with make(1) as envs:
        given = expert_episodes(envs, ids)[1]
    with make(1, max_episode_steps=len(given[0])) as envs:
        envs.reset(ids)
        _, _, terminations, truncations, _ = envs.step(given[0][None])
    assert terminations[0] and not truncations[0]


# ---------------------------------------------------------------------------------------------------------------------
# what cannot work says so
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(env_id="PutOnPlateInScene25Mian-v3"), "did you mean 'PutOnPlateInScene25Main-v3'"),
        (dict(obj_set="trian"), "train, test, all"),
        (dict(sim_freq=101), "multiple of 5"),
        (dict(num_env_workers=3), "num_envs=2"),
        (dict(asset_pack="brigde"), "builtin, bridge"),
        (dict(protocol="rlniff"), "rl4vla, rlinf"),
        (dict(image_size=(0, 48)), "image_size"),
        (dict(num_envs=0), "num_envs"),
    ],
)
def test_bad_arguments(change, words):
    arguments = dict(env_id=MAIN, num_envs=2) | SMALL | change
    with pytest.raises(ValueError, match=words) as caught:
        world.make_envs(arguments.pop("env_id"), arguments.pop("num_envs"), **arguments)
    assert "\n" not in str(caught.value)


def test_bad_calls():
    with make(2) as envs:
        with pytest.raises(RuntimeError, match="reset"):
            envs.step(np.zeros((2, 1, 7)))
        for ids, words in (([0], "one per env"), ([0, 802_816], "ids 0 to 802815"), ([0, -1], "out of range")):
            with pytest.raises(ValueError, match=words):
                envs.reset(ids)
        envs.reset()
        for shape in ((2, 7), (3, 1, 7), (2, 1, 6), (2, 0, 7)):
            with pytest.raises(ValueError, match="num_envs=2, chunk_size, 7"):
                envs.step(np.zeros(shape))
        for bad in (np.nan, np.inf):
            actions = np.zeros((2, 2, 7))
            actions[1, 0, 3] = bad
            with pytest.raises(ValueError, match=r"actions\[1, 0, 3\]"):
                envs.step(actions)
        actions = np.zeros((2, 2, 7))
        actions[0, 1, 2] = -1.01
        with pytest.raises(ValueError, match=r"actions\[0, 1, 2\] is -1.01.*at most 1 m"):
            envs.step(actions)
        envs.step(np.zeros((2, 1, 7)))  # none of this harmed the envs


@pytest.mark.parametrize("workers", [0, 1])
def test_no_vulkan_device(workers):
    code = (
        "import envs\ntry:\n"
        f"    envs.make_envs({MAIN!r}, 1, image_size=(16, 16), sim_freq=100, num_env_workers={workers})\n"
        "except RuntimeError as error:\n    print(str(error).strip().splitlines()[-1])"
    )
    nowhere = {"VK_DRIVER_FILES": "/nonexistent", "VK_ICD_FILENAMES": "/nonexistent"}
    out = python("-c", code, env=nowhere)
    assert "no Vulkan device" in out.stdout and out.stdout.strip().endswith("run `python doctor.py`")

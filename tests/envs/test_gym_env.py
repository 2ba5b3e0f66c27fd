"""The family's ids in the hands of gymnasium's and ManiSkill's own tools: each recipe of a user is one test."""

from __future__ import annotations

import json
import shutil

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from launching import python

import envs  # registers the ids
from envs import state_dicts, variants
from envs.expert import Expert

NAME = "PutOnPlateInScene25"
MAIN = NAME + "Main-v3"
SMALL = dict(image_size=(64, 48), sim_freq=100)
CAMERA = "3rd_view_camera"
STAY = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
FORWARD = np.array([0.02, 0.01, -0.01, 0, 0, 0.1, 1], np.float32)


def make(env_id: str = MAIN, **kwargs) -> gym.Env:
    return gym.make(env_id, **SMALL | kwargs)


def picture(obs: dict) -> np.ndarray:
    return obs["sensor_data"][CAMERA]["rgb"][0].numpy()


def expert_episode(env, length: int = 40) -> list[np.ndarray]:
    """Actions of the expert from the env's present state until success, executed by env.step."""
    expert, actions = Expert(), []
    for step in range(length):
        action = expert(env.unwrapped.describe() | {"elapsed_steps": step})
        action[6] = 1 if action[6] > 0.5 else -1
        actions.append(action)
        if env.step(action)[2]:
            break
    return actions


# ---------------------------------------------------------------------------------------------------------------------
# states
# ---------------------------------------------------------------------------------------------------------------------

EPISODES = [
    ("Main-v3", dict(episode_id=5, obj_set="train"), "rl4vla"),
    ("MultiCarrot-v1", dict(episode_id=1_234_567, obj_set="test"), "rl4vla"),
    ("EEPose-v1", dict(episode_id=11_000_000_123, obj_set="all"), "rl4vla"),  # more than a float32 or an int32 holds
    ("VisionTexture05-v1", dict(episode_id=5_000_000, obj_set="test"), "rl4vla"),
    ("PositionChangeTo-v1", dict(episode_id=132_860, obj_set="test"), "rl4vla"),
    ("PositionChangeTo-v1", dict(episode_id=132_860, obj_set="test"), "rlinf"),
]


@pytest.mark.parametrize("short, options, protocol", EPISODES)
def test_a_state_comes_back_in_another_env(short, options, protocol):
    """Every state of an episode: the same state and image to the last bit, and one continuation."""
    env, other = (make(NAME + short, protocol=protocol, obs_mode="rgb") for _ in range(2))
    obs, _ = env.reset(options=options)
    states, images, instruction = [env.unwrapped.get_state_dict()], [picture(obs)], env.unwrapped.instruction
    actions = [FORWARD] * 8
    for action in actions:
        obs = env.step(action)[0]
        states.append(env.unwrapped.get_state_dict())
        images.append(picture(obs))
    other.reset(seed=1)
    for t, (state, image) in enumerate(zip(states, images)):
        other.unwrapped.set_state_dict(state)
        assert state_dicts.equal(other.unwrapped.get_state_dict(), state), t
        np.testing.assert_array_equal(picture(other.unwrapped.get_obs()), image)
        assert other.unwrapped.get_language_instruction() == [instruction]
        assert int(other.unwrapped.elapsed_steps) == t
        after = []
        for _ in range(2):
            other.unwrapped.set_state_dict(state)
            other.step(FORWARD)
            after.append(other.unwrapped.get_state_dict())
        assert state_dicts.equal(*after)
        if t < len(actions):  # PhysX's contact caches are in no state
            arm, wanted = (each["articulations"]["solovla_widowx250s"] for each in (after[0], states[t + 1]))
            torch.testing.assert_close(arm, wanted, atol=1e-4, rtol=0)
    env.close()
    other.close()


def test_the_first_state_gives_the_whole_episode_to_the_last_bit():
    env, other = make(), make()
    env.reset(seed=3)
    first = env.unwrapped.get_state_dict()
    actions = expert_episode(env)
    assert env.unwrapped.success
    other.reset(seed=4)
    other.unwrapped.set_state_dict(first)
    for action in actions:
        other.step(action)
    assert state_dicts.equal(env.unwrapped.get_state_dict(), other.unwrapped.get_state_dict())
    env.close()
    other.close()


def test_a_state_in_the_middle_leads_to_success_as_well():
    env = make()
    env.reset(seed=3)
    states, expert, actions = [], Expert(), []
    while not env.unwrapped.success:
        states.append(env.unwrapped.get_state_dict())
        action = expert(env.unwrapped.describe() | {"elapsed_steps": len(actions)})
        action[6] = 1 if action[6] > 0.5 else -1
        actions.append(action)
        env.step(action)
    place = env.unwrapped.describe()["object_pose"][:3]
    middle = len(actions) // 2
    env.reset(seed=9)
    env.unwrapped.set_state_dict(states[middle])
    assert [env.unwrapped.grasped_once, env.unwrapped.streak] == states[middle]["task"]["flags"][0, 1:2].tolist() + [
        int(states[middle]["task"]["streak"])
    ]
    rewards = [env.step(action)[1].item() for action in actions[middle:]]
    np.testing.assert_allclose(env.unwrapped.describe()["object_pose"][:3], place, atol=2e-3)
    assert env.unwrapped.success and max(rewards) == 1.0
    env.close()


def test_flat_states_and_states_of_files():
    """get_state/set_state hold everything too, and arrays without the batch dimension are taken."""
    env = make(NAME + "MultiPlate-v1")
    env.reset(seed=0)
    env.step(FORWARD)
    flat, state = env.unwrapped.get_state(), env.unwrapped.get_state_dict()
    assert flat.shape == (1, 3 * 13 + 29 + 7 + 4 + 1 + 1 + 4 + 8 + 8 + 3)
    for again in (flat, flat.numpy()):
        env.reset(seed=1)
        env.unwrapped.set_state(again)
        assert state_dicts.equal(env.unwrapped.get_state_dict(), state)
    env.reset(seed=1)
    env.unwrapped.set_state_dict(
        {"actors": {name: entry[0].numpy() for name, entry in state["actors"].items()}}
        | {name: state[name] for name in ("articulations", "controller", "task")}
    )
    assert state_dicts.equal(env.unwrapped.get_state_dict(), state)
    env.close()


def test_a_part_of_a_state_leaves_the_rest():
    env = make()
    env.reset(seed=0)
    before = env.unwrapped.get_state_dict()
    moved = before["actors"]["object"].clone()
    moved[0, 2] += 0.2
    env.unwrapped.set_state_dict({"actors": {"object": moved}})
    after = env.unwrapped.get_state_dict()
    assert torch.equal(after["actors"]["object"], moved)
    assert state_dicts.equal(after | {"actors": before["actors"]}, before)
    env.close()


def test_the_commanded_pose_comes_back_where_the_arm_lags():
    """Deltas add up on the commanded pose. A state without it would lose what the arm has not reached yet."""
    env = make()
    env.reset(seed=0)
    env.step(FORWARD * [2, 2, 1, 0, 0, 0, 1])
    state, arrived = env.unwrapped.get_state_dict(), env.unwrapped._tool.entity_pose.p
    env.step(STAY)
    wanted = env.unwrapped._tool.entity_pose.p
    env.reset(seed=1)
    env.unwrapped.set_state_dict(state)
    env.step(STAY)
    np.testing.assert_allclose(env.unwrapped._tool.entity_pose.p, wanted, atol=1e-5)
    assert np.abs(env.unwrapped._tool.entity_pose.p - arrived).max() > 1e-3  # the arm was under way
    env.close()


def test_reset_to_env_states_keeps_the_commanded_pose():
    env = make(obs_mode="rgb")
    env.reset(seed=0)
    obs = env.step(FORWARD)[0]
    state, flat = env.unwrapped.get_state_dict(), env.unwrapped.get_state()
    for again in (state, flat):
        env.reset(seed=1)
        seen, info = env.reset(options={"reset_to_env_states": {"env_states": again}})
        assert state_dicts.equal(env.unwrapped.get_state_dict(), state)
        np.testing.assert_array_equal(picture(seen), picture(obs))
        assert torch.equal(seen["agent"]["controller"]["arm"]["target_pose"], state["controller"]["arm"]["target_pose"])
        assert not info["reconfigure"]
    env.close()


def test_states_that_fit_nothing_are_one_sentence():
    env = make()
    env.reset(seed=0)
    state = env.unwrapped.get_state_dict()
    before = env.unwrapped.get_state_dict()
    for wrong, said in (
        ({"actors": {"cube": torch.zeros(1, 13)}}, "the state has actors/cube, which this env does not know"),
        ({"actors": {"object": torch.zeros(1, 12)}}, "actors/object has 12 numbers, not 13"),
        ({"actors": {"object": torch.full((1, 13), torch.nan)}}, "actors/object has numbers that are not finite"),
        ({"actors": torch.zeros(1, 13)}, "the state's entry actors must be a dict"),
        ({"task": {"episode": torch.full((1, 4), 1e6)}}, "names no episode"),
        ({"task": {"episode": torch.tensor([[0, 0, 0, 1e6]])}}, "out of range"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            env.unwrapped.set_state_dict(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="vector has 5 numbers"):
        env.unwrapped.set_state(torch.zeros(1, 5))
    assert state_dicts.equal(env.unwrapped.get_state_dict(), before) and state_dicts.equal(state, before)
    env.close()


# ---------------------------------------------------------------------------------------------------------------------
# observations
# ---------------------------------------------------------------------------------------------------------------------


def test_an_env_without_arguments_shows_what_the_published_camera_sees():
    env = gym.make(MAIN)
    obs, _ = env.reset(seed=0)
    assert env.unwrapped.obs_mode == "rgb+segmentation" and picture(obs).shape == (480, 640, 3)
    assert obs["agent"]["qpos"].shape == (1, 8) and obs["extra"]["tcp_pose"].shape == (1, 7)
    env.close()


@pytest.mark.parametrize(
    "obs_mode, textures",
    [
        ("rgb", {"rgb"}),
        ("segmentation+rgb", {"rgb", "segmentation"}),
        ("rgbd", {"rgb", "depth"}),
        ("rgb+depth+segmentation+position", {"rgb", "depth", "segmentation", "position"}),
        ("sensor_data", {"Color", "PositionSegmentation"}),
    ],
)
def test_textures(obs_mode, textures):
    env = make(obs_mode=obs_mode)
    obs, _ = env.reset(seed=0)
    images = obs["sensor_data"][CAMERA]
    assert images.keys() == textures and all(image.shape[:3] == (1, 48, 64) for image in images.values())
    if "rgb" in textures:
        np.testing.assert_array_equal(picture(obs), env.unwrapped.render_image())
    if "depth" in textures:  # of the table, where no robot and no object is
        assert (images["depth"] > 200).all()
    env.close()


def test_state_observations_hold_the_bodies_and_those_of_images_do_not():
    env = make(NAME + "MultiCarrot-v1", obs_mode="state_dict")
    extra = env.reset(seed=0)[0]["extra"]
    state = env.unwrapped.get_state_dict()
    for name in ("object", "receptacle", "distractor"):
        assert torch.equal(extra[f"{name}_pose"], state["actors"][name][:, :7])
    assert not extra["is_grasped"]
    env.close()
    env = make(obs_mode="state")
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (1, 59) and obs.dtype == torch.float32
    env.close()
    env = make(obs_mode="rgb+state")
    obs, _ = env.reset(seed=0)
    assert obs["state"].shape == (1, 59) and picture(obs).shape == (48, 64, 3)
    env.close()
    env = make(obs_mode="rgb")
    assert env.reset(seed=0)[0]["extra"].keys() == {"tcp_pose"}
    env.close()


def test_the_image_size_can_be_given_maniskills_way():
    by_name = gym.make(MAIN, sim_freq=100, obs_mode="rgb", sensor_configs={CAMERA: {"width": 96, "height": 80}})
    for_all = gym.make(MAIN, sim_freq=100, obs_mode="rgb", sensor_configs=dict(width=96, height=80))
    ours = gym.make(MAIN, sim_freq=100, obs_mode="rgb", image_size=(96, 80))
    images = [picture(env.reset(seed=0)[0]) for env in (by_name, for_all, ours)]
    assert images[0].shape == (80, 96, 3)
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[2])
    for env in (by_name, for_all, ours):
        env.close()


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(num_envs=2), "makes one env, not num_envs=2: put several into gymnasium's SyncVectorEnv"),
        (dict(sim_backend="physx_cuda"), "simulates on the CPU, not on 'physx_cuda'"),
        (dict(obs_mode="rgb+normal"), r"obs_mode 'rgb\+normal' is not one of this env: use none, rgbd"),
        (dict(obs_mode="image"), "obs_mode 'image' is not one of this env"),
        (dict(sensor_configs=dict(fov=1.0)), "sensor_configs has 'fov'"),
        (dict(sensor_configs=dict(width=32)), r"image_size=\(64, 48\) and sensor_configs={'width': 32} differ"),
        (dict(image_size=None, sensor_configs=dict(width="big")), "cannot have a size of"),
        (dict(image_size=(0, 5)), "cannot have a size of"),
        (dict(asset_pack="nice"), "unknown asset_pack 'nice'"),
        (dict(obj_set="new"), "unknown obj_set 'new'"),
    ],
)
def test_wrong_arguments_are_one_sentence(kwargs, said):
    with pytest.raises(ValueError, match=said) as caught:
        make(**kwargs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# rendering for people
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("render_mode, shape", [("rgb_array", (512, 512)), ("sensors", (48, 128)), ("all", (512, 576))])
def test_render(render_mode, shape):
    env = make(render_mode=render_mode)
    env.reset(seed=0)
    frame = env.render()[0].numpy()
    assert frame.shape == (*shape, 3) and frame.std() > 20
    env.step(FORWARD * [5, 5, 1, 0, 0, 0, 1])
    assert (env.render()[0].numpy() != frame).any()
    env.close()


def test_render_shows_the_table_and_changes_nothing_that_the_policy_sees():
    """The builtin pack has no table to look at. The one for people is in no observation and in no physics."""
    env, plain = make(render_mode="rgb_array", obs_mode="rgb+segmentation"), make(obs_mode="rgb+segmentation")
    for one in (env, plain):
        one.reset(seed=0)
    frame = env.render()[0].numpy()
    assert (frame[256:].sum(axis=-1) == 0).mean() < 0.01  # no black below the horizon
    for _ in range(3):
        seen, wanted = env.step(FORWARD)[0], plain.step(FORWARD)[0]
        env.render()
        for name in ("rgb", "segmentation"):
            assert torch.equal(seen["sensor_data"][CAMERA][name], wanted["sensor_data"][CAMERA][name])
    assert state_dicts.equal(env.unwrapped.get_state_dict(), plain.unwrapped.get_state_dict())
    np.testing.assert_array_equal(env.unwrapped.render_image(), plain.unwrapped.render_image())
    env.close()
    plain.close()


@pytest.mark.full
@pytest.mark.slow
def test_the_camera_for_people_can_have_another_shader():
    """Also after a reset, which adds all cameras to a new scene. The policy's camera keeps its own."""
    env, plain = make(render_mode="rgb_array", shader_dir="default"), make()
    for seed in (0, 1):
        seen, wanted = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        np.testing.assert_array_equal(picture(seen), picture(wanted))
        assert env.render().shape == (1, 512, 512, 3)
    env.close()
    plain.close()


def test_a_window_follows_to_the_scene_of_the_next_episode(monkeypatch):
    env = make()
    shown = []
    monkeypatch.setattr(env.unwrapped, "_viewer", object())
    monkeypatch.setattr(env.unwrapped, "_setup_viewer", lambda: shown.append(env.unwrapped.scene.sub_scenes[0]))
    env.reset(seed=0)
    assert shown == [env.unwrapped.scene.sub_scenes[0]]
    monkeypatch.undo()
    env.close()


def test_training_renders_no_camera_for_people(monkeypatch):
    from mani_skill.sensors.camera import Camera

    captured = []
    monkeypatch.setattr(Camera, "capture", lambda self: captured.append(self.config.uid))
    with envs.make_envs(MAIN, 1, **SMALL) as vector:
        vector.reset()
        vector.step(np.zeros((1, 2, 7)))
        env = vector._groups[0]._group.world.envs[0]
        assert env._backdrop is None and env._human_render_cameras == {}
    assert captured == []


# ---------------------------------------------------------------------------------------------------------------------
# gymnasium and ManiSkill's wrappers
# ---------------------------------------------------------------------------------------------------------------------


def test_seeds_choose_episodes_as_gymnasium_promises():
    one, other = make(obs_mode="none"), make(obs_mode="none")

    def episodes(env, seed: int | None) -> list[int]:
        env.reset(seed=seed)
        found = [env.unwrapped.start.episode_id]
        for _ in range(3):
            env.reset()
            found.append(env.unwrapped.start.episode_id)
        return found

    assert episodes(one, 5) == episodes(other, 5) == episodes(one, 5) != episodes(one, 6)
    assert len(set(episodes(one, 5))) == 4
    fresh = [make(obs_mode="none") for _ in range(2)]
    assert episodes(fresh[0], None) != episodes(fresh[1], None)
    for env in (one, other, *fresh):
        env.close()


def test_gymnasiums_check_env():
    from gymnasium.utils.env_checker import check_env
    from mani_skill.utils.wrappers import CPUGymWrapper

    for obs_mode in ("rgb", "rgb+segmentation", "state"):
        env = CPUGymWrapper(make(obs_mode=obs_mode, render_mode="rgb_array"))
        # both would make the env again from its spec, which ManiSkill's TimeLimitWrapper does not allow
        check_env(env, skip_render_check=True, skip_close_check=True)
        assert env.render().shape == (512, 512, 3)
        env.close()


def test_flattened_observations():
    from mani_skill.utils.wrappers.flatten import FlattenRGBDObservationWrapper

    env = FlattenRGBDObservationWrapper(make(obs_mode="rgb+depth"))
    obs, _ = env.reset(seed=0)
    assert {name: tuple(value.shape) for name, value in obs.items()} == {
        "state": (1, 30),
        "rgb": (1, 48, 64, 3),
        "depth": (1, 48, 64, 1),
    }
    assert env.observation_space["rgb"].shape == (1, 48, 64, 3)
    env.close()


def test_maniskills_vector_env_resets_and_counts():
    from mani_skill.vector.wrappers.gymnasium import ManiSkillVectorEnv

    env = ManiSkillVectorEnv(make(obs_mode="rgb", max_episode_steps=3), auto_reset=True, record_metrics=True)
    env.reset(seed=0)
    for step in range(1, 7):
        infos = env.step(torch.from_numpy(STAY[None]))[4]
        assert ("final_info" in infos) == (step % 3 == 0)
        if "final_info" in infos:
            assert infos["final_info"]["episode"]["episode_len"].item() == 3
    env.close()


def test_gymnasiums_vector_env_of_unbatched_envs():
    from gymnasium.vector import SyncVectorEnv
    from mani_skill.utils.wrappers import CPUGymWrapper

    vector = SyncVectorEnv([lambda: CPUGymWrapper(make(obs_mode="rgb")) for _ in range(2)])
    obs, _ = vector.reset(seed=0)
    images = obs["sensor_data"][CAMERA]["rgb"]
    assert images.shape == (2, 48, 64, 3) and (images[0] != images[1]).any()
    obs, rewards, *_ = vector.step(np.stack([STAY, FORWARD]))
    assert rewards.tolist() == [0.0, 0.0] and obs["agent"]["qpos"].shape == (2, 8)
    vector.close()


@pytest.mark.parametrize(
    "reward_mode, wanted", [(None, 1.2), ("dense", 1.2), ("normalized_dense", 1.0), ("sparse", 1.0), ("none", 0.0)]
)
def test_rewards_of_an_episode(reward_mode, wanted):
    env = make(reward_mode=reward_mode, obs_mode="none")
    env.reset(seed=3)
    expert, rewards = Expert(), []
    while not env.unwrapped.success:
        action = expert(env.unwrapped.describe() | {"elapsed_steps": len(rewards)})
        action[6] = 1 if action[6] > 0.5 else -1
        rewards.append(float(env.step(action)[1]))
    assert sum(rewards) == pytest.approx(wanted) and len(rewards) < 60
    env.close()


# ---------------------------------------------------------------------------------------------------------------------
# recordings
# ---------------------------------------------------------------------------------------------------------------------

REPLAY = ("-m", "mani_skill.trajectory.replay_trajectory", "--traj_path")


@pytest.mark.slow
def test_what_maniskill_records_it_replays(tmp_path):
    """An episode with a seed and one without, in an interpreter that has imported ManiSkill alone."""
    from mani_skill.utils.wrappers import RecordEpisode

    env = RecordEpisode(
        make(obs_mode="none", render_mode="rgb_array"), tmp_path, trajectory_name="mine", save_video=True, video_fps=5
    )
    for seed in (3, None):
        env.reset(seed=seed)
        expert_episode(env)
    env.close()
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"0.mp4", "1.mp4"}
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["env_info"]["env_id"] == f"envs:{MAIN}"
    with h5py.File(tmp_path / "mine.h5") as file:
        length = len(file["traj_0/actions"])
        assert file["traj_0/env_states/actors/object"].shape == (length + 1, 13)
        assert file["traj_0/env_states/task/steps"][:, 0].tolist() == list(range(length + 1))
    shutil.copytree(tmp_path, tmp_path / "again", ignore=shutil.ignore_patterns("*.mp4", "again"))
    for flags in (["--save_video"], ["--use_env_states"], ["--use_first_env_state", "--save_traj", "-o", "rgb"]):
        run = python(*REPLAY, tmp_path / "again" / "mine.h5", *flags)
        assert "2/2=100.00%" in run.stdout, run.stdout + run.stderr
    videos = list((tmp_path / "again").glob("*.mp4"))
    assert len(videos) == 2 and all(path.stat().st_size > 5_000 for path in videos)
    (copy,) = (tmp_path / "again").glob("mine.rgb.*.h5")
    with h5py.File(copy) as file:
        assert file[f"traj_0/obs/sensor_data/{CAMERA}/rgb"].shape == (length + 1, 48, 64, 3)


@pytest.mark.slow
def test_the_ids_of_recordings_import_the_package():
    code = (
        "import gymnasium, mani_skill.envs\n"
        f"env = gymnasium.make('envs:{MAIN}', obs_mode='none')\n"
        "env.reset(options={'episode_id': 3})\n"
        "print(env.spec.id, env.unwrapped.start.episode_id)"
    )
    out = python("-c", code)
    assert out.stdout.split() == [f"envs:{MAIN}", "3"], out.stderr[-2000:]


def test_episodes_are_named_by_number_in_a_state():
    for episode_id in (0, 2**20 - 1, 2**20, 11_000_000_123):
        start = variants.decode(NAME + "EEPose-v1", "all", episode_id)
        numbers = state_dicts.episode_numbers(start)
        assert numbers.dtype == torch.float32
        assert state_dicts.episode_of(NAME + "EEPose-v1", "rl4vla", numbers) == start

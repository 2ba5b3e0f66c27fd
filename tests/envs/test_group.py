"""The books of a group of envs: over scenes of their own and over a batch, both against the same by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs.gpu import world as gpu_world
from envs.gpu.world import BatchWorld
from envs.group import EnvGroup, empty_result
from envs.spec import EnvSpec
from envs.world import SceneWorld
from schemas.pixels import Pixels
from vla.models.loading import load_policy

MAIN = "PutOnPlateInScene25Main-v3"
OFFSET = 2


class Toy:
    """An env whose state is a number made of its episode id and its actions; success, reward and picture follow."""

    state, success = 0, False

    def start_episode(self, start) -> None:
        self.start, self.state = start, start.episode_id % 9973
        self.success, self.instruction = False, f"episode {start.episode_id}"

    def advance(self, action: torch.Tensor) -> tuple[float, bool]:
        self.state = (self.state * 31 + round(float(action.double().abs().sum()) * 1000)) % 9973
        before, self.success = self.success, self.state % 5 == 0
        return float(self.success) - float(before) + 0.001 * (self.state % 7), self.success

    def render_image(self) -> np.ndarray:
        return np.full((2, 3, 3), self.state % 256, np.uint8)

    def privileged_state(self) -> np.ndarray:
        return np.array([self.state, self.success], np.float32)

    def describe(self) -> dict:
        return {"episode_id": self.start.episode_id, "state": self.state}

    def close(self) -> None:
        pass


class ToyRows:
    """Toys behind the interface of BatchedPutOnPlate: all are advanced, whether anybody looks or not."""

    device = torch.device("cpu")

    def __init__(self, count: int):
        self.toys, self.pictures, self.lost = [Toy() for _ in range(count)], 0, torch.zeros(count, dtype=torch.bool)

    def start_episodes(self, chosen, starts, settled) -> None:
        for i, start, state in zip(chosen, starts, settled):
            assert state == start.episode_id
            self.toys[i].start_episode(start)

    def advance(self, actions):
        assert ((actions[:, 6] == 1) | (actions[:, 6] == -1)).all()
        results = [toy.advance(action[None]) for toy, action in zip(self.toys, actions)]
        rewards, success = zip(*results)
        return torch.tensor(rewards, dtype=torch.float64), torch.tensor(success)

    def finite(self):
        return ~self.lost

    def render_images(self, rows):
        self.pictures += 1
        return torch.from_numpy(np.stack([self.toys[i].render_image() for i in rows]))

    def privileged_states(self):
        return torch.from_numpy(np.stack([toy.privileged_state() for toy in self.toys]))

    def describe(self):
        return [toy.describe() for toy in self.toys]

    @property
    def instructions(self):
        return [toy.instruction for toy in self.toys]

    def close(self) -> None:
        pass


class ToySettlers:
    """Knows what was asked for."""

    def __init__(self):
        self.asked = set()

    def ask(self, start) -> None:
        self.asked.add(start)

    def get(self, start):
        assert start in self.asked
        return start.episode_id

    def close(self) -> None:
        pass


class ByHand:
    """The same books as plain numbers: one env after the other, one action after the other."""

    def __init__(self, spec: EnvSpec):
        count = spec.num_envs
        self.spec, self.envs, self.counters, self.explicit = spec, [Toy() for _ in range(count)], [0] * count, {}
        self.actions: list[list] = [[] for _ in range(count)]
        self.totals, self.once, self.running = [0.0] * count, [False] * count, [False] * count
        self.images, self.final_images = (np.zeros((count, 2, 3, 3), np.uint8) for _ in range(2))

    def begin(self, i: int, episode_id: int | None) -> None:
        self.explicit[i] = episode_id is not None
        if episode_id is None:
            episode_id = self.spec.next_episode_id(self.spec.first_env + OFFSET + i, self.counters[i])
            self.counters[i] += 1
        self.envs[i].start_episode(self.spec.start_state(episode_id))
        self.actions[i], self.totals[i], self.once[i], self.running[i] = [], 0.0, False, True
        self.images[i] = self.envs[i].render_image()

    def reset(self, episode_ids, chosen) -> dict:
        for i, episode_id in zip(chosen, episode_ids):
            self.begin(i, episode_id)
        return self.seen()

    def state(self, i: int) -> np.ndarray:
        return np.append(
            self.envs[i].privileged_state(), np.float32(len(self.actions[i]) / self.spec.max_episode_steps)
        )

    def seen(self) -> dict:
        states = np.stack([self.state(i) for i in range(len(self.envs))])
        return {"instructions": [env.instruction for env in self.envs], "state": states}

    def step(self, actions) -> dict:
        count, chunk_size, _ = actions.shape
        out = empty_result(count, chunk_size) | {"states": np.zeros((count, chunk_size, 3), np.float32)}
        for i in [i for i in range(count) if self.running[i]]:
            for j, action in enumerate(actions[i]):
                out["states"][i, j], out["valid"][i, j] = self.state(i), True
                out["rewards"][i, j] = self.act(i, action)
                if not self.running[i]:
                    break
            self.images[i] = self.envs[i].render_image()
            if not self.running[i]:
                out["terminations" if self.stops(i) else "truncations"][i] = True
                length, total = len(self.actions[i]), self.totals[i]
                metrics = float(self.once[i]), float(self.envs[i].success), total, float(length), total / length
                out["ended"].append((i, metrics, self.envs[i].instruction, self.state(i)))
                self.final_images[i] = self.images[i]
                if self.spec.auto_reset:
                    self.begin(i, None)
        return out | self.seen()

    def act(self, i: int, action: np.ndarray) -> float:
        command = torch.from_numpy(action.copy())[None]
        command[0, 6] = 1.0 if action[6] > 0.5 else -1.0
        reward, success = self.envs[i].advance(command)
        self.actions[i].append(action)
        self.totals[i] += reward
        self.once[i] |= success
        self.running[i] = not self.stops(i) and len(self.actions[i]) < self.spec.max_episode_steps
        return reward

    def stops(self, i: int) -> bool:
        return self.envs[i].success and not self.spec.ignore_terminations

    def describe(self) -> list[dict]:
        return [env.describe() | {"elapsed_steps": len(done)} for env, done in zip(self.envs, self.actions)]

    def state_dict(self) -> list[dict]:
        return [
            dict(counter=self.counters[i], episode_id=env.start.episode_id, explicit=self.explicit[i], actions=done)
            for i, (env, done) in enumerate(zip(self.envs, self.actions))
        ]


def spec_of(count: int, **changes) -> EnvSpec:
    spec = EnvSpec(MAIN, count, "train", "builtin", None, (3, 2), 100, 5, False, False, "rl4vla", 3, 10)
    return dataclasses.replace(spec, privileged=True, **changes)


def group_of(spec: EnvSpec, kind: str) -> EnvGroup:
    if kind == "batch":
        world = BatchWorld(ToyRows(spec.num_envs), ToySettlers())
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("envs.world._build_env", lambda spec: Toy())
            world = SceneWorld(spec, spec.num_envs)
    return EnvGroup(spec, OFFSET, world, torch.zeros(2, spec.num_envs, *spec.image_shape, dtype=torch.uint8))


def batch_of(count: int, **changes) -> EnvGroup:
    return group_of(spec_of(count, **changes), "batch")


def assert_same_step(hand: ByHand, group: EnvGroup, actions) -> None:
    want, got = hand.step(actions), group.step(actions)
    assert want.keys() == got.keys()
    executed = want["valid"]  # of an env at rest nobody asks for the state
    np.testing.assert_array_equal(want.pop("states")[executed], got.pop("states")[executed])
    assert_same_seen(hand, {key: want.pop(key) for key in ("state", "instructions")}, got)
    for key, value in want.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, got[key], err_msg=key)
    assert [one[:3] for one in want["ended"]] == [one[:3] for one in got["ended"]]  # to the last bit
    for ours, theirs in zip(want["ended"], got["ended"]):
        np.testing.assert_array_equal(ours[3], theirs[3])
    np.testing.assert_array_equal(hand.images, group.images)
    for i, *_ in want["ended"]:
        np.testing.assert_array_equal(hand.final_images[i], group.final_images[i])


def assert_same_seen(hand: ByHand, want: dict, got: dict) -> None:
    assert want["instructions"] == got["instructions"]
    np.testing.assert_array_equal(want["state"][hand.running], got["state"][hand.running])


@pytest.mark.parametrize("kind", ["scenes", "batch"])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
def test_the_books_equal_those_by_hand(kind, seed, count, chunk_size, auto_reset, ignore_terminations):
    """Ends in mid-chunk, envs at rest, partial resets, given ids, state and replay."""
    random = np.random.RandomState(seed)
    spec = spec_of(count, auto_reset=auto_reset, ignore_terminations=ignore_terminations)
    hand, group = ByHand(spec), group_of(spec, kind)
    everyone = list(range(count))
    assert_same_seen(hand, *(each.reset([None] * count, everyone) for each in (hand, group)))
    for t in range(8):
        assert_same_step(hand, group, random.uniform(-1, 1, (count, chunk_size, 7)).astype(np.float32))
        assert hand.running == group.running.tolist()
        for i, (ours, theirs) in enumerate(zip(hand.describe(), group.describe())):
            if hand.running[i]:
                assert ours == theirs
        if t == 3:
            chosen = sorted(random.choice(count, random.randint(1, count + 1), replace=False).tolist())
            ids = [None if random.rand() < 0.5 else int(random.randint(800_000)) for _ in chosen]
            assert_same_seen(hand, *(each.reset(ids, chosen) for each in (hand, group)))
            np.testing.assert_array_equal(hand.images, group.images)
    states = group.state_dict()
    for ours, theirs in zip(hand.state_dict(), states):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(np.ravel(ours[key]), np.ravel(theirs[key])) for key in ours)
    replayed = group_of(spec, kind)
    assert_same_seen(hand, hand.seen(), replayed.load_state_dict(states))
    np.testing.assert_array_equal(hand.images[hand.running], replayed.images.numpy()[hand.running])
    for _ in range(3):
        assert_same_step(hand, replayed, random.uniform(-1, 1, (count, chunk_size, 7)).astype(np.float32))


def test_replay_of_what_was_not_begun():
    batch = batch_of(2)
    state = batch.state_dict()
    assert state[0]["episode_id"] is None and batch.load_state_dict(state) == {}


def test_a_chunk_costs_one_picture_of_all_rows():
    batch = batch_of(4, max_episode_steps=12, ignore_terminations=True)
    batch.reset([1, 2, 3, 4], [0, 1, 2, 3])
    batch.world.simulation.pictures = 0
    batch.step(np.zeros((4, 8, 7), np.float32))
    assert batch.world.simulation.pictures == 1
    batch.step(np.zeros((4, 8, 7), np.float32))  # all end together after four steps
    assert batch.world.simulation.pictures == 2
    batch.reset([5, 6], [0, 1])
    batch.step(np.zeros((4, 5, 7), np.float32))
    batch.reset([7], [2])
    batch.world.simulation.pictures = 0
    batch.step(np.zeros((4, 8, 7), np.float32))  # two end after seven, one goes on
    assert batch.world.simulation.pictures == 2


def test_what_ends_costs_one_more_picture():
    """Of last images, drawn before the next episodes begin. One picture then shows all rows."""
    batch = batch_of(3, max_episode_steps=12, ignore_terminations=True, auto_reset=True)
    batch.reset([1, 2, 3], [0, 1, 2])

    def pictures(chunk_size: int) -> int:
        before = batch.world.simulation.pictures
        batch.step(np.zeros((3, chunk_size, 7), np.float32))
        return batch.world.simulation.pictures - before

    assert pictures(8) == 1
    assert pictures(8) == 2  # all end after four steps
    assert pictures(6) == 1
    batch.reset([7], [2])
    assert pictures(6) == 2  # two end with the chunk
    assert pictures(8) == 2  # the third one ends after six steps, while the others go on


def test_the_next_episode_is_settled_beforehand():
    batch = batch_of(2, auto_reset=True)
    batch.reset([None, None], [0, 1])
    coming = {batch.spec.next_episode_id(12 + i, 1) for i in range(2)}
    assert coming <= {start.episode_id for start in batch.world.settlers.asked}


@pytest.mark.parametrize("explicit", [False, True])
def test_a_row_that_blows_up_is_dropped(explicit):
    """Its chunk counts for nothing, it starts over, the others go on. Three times end the run, or a given episode."""
    spec = spec_of(3, max_episode_steps=100, ignore_terminations=True)
    hand, batch = ByHand(spec), group_of(spec, "batch")
    ids = [7, 8, 9] if explicit else [None] * 3
    hand.reset(ids, [0, 1, 2])
    batch.reset(ids, [0, 1, 2])
    actions = np.random.RandomState(0).uniform(-1, 1, (3, 4, 7)).astype(np.float32)
    batch.world.simulation.lost[1] = True
    want = hand.step(actions)
    with pytest.warns(RuntimeWarning, match="lost envs 13 "):
        got = batch.step(actions)
    assert got["dropped"].tolist() == [False, True, False] and not got["valid"][1].any() and not got["rewards"][1].any()
    for i in (0, 2):
        np.testing.assert_array_equal(got["rewards"][i], want["rewards"][i])
    assert batch.running.all() and batch.lengths.tolist() == [4, 0, 4] and not got["ended"]
    expected = 8 if explicit else batch.spec.next_episode_id(13, 1)
    assert batch.episode_ids[1] == expected and (batch.images[1] == expected % 9973 % 256).all()
    batch.world.simulation.lost[:] = False
    assert not batch.step(actions)["dropped"].any()
    batch.world.simulation.lost[1] = True
    if explicit:
        with pytest.warns(RuntimeWarning):
            assert batch.step(actions)["dropped"][1]
            got = batch.step(actions)
        assert got["lost"].tolist() == [False, True, False] == got["truncations"].tolist() and not got["dropped"].any()
        assert [(i, metrics) for i, metrics, *_ in got["ended"]] == [(1, (0.0,) * 5)]
        assert batch.running.tolist() == [True, False, True]
        return
    with pytest.warns(RuntimeWarning):
        batch.step(actions), batch.step(actions)
        with pytest.raises(RuntimeError, match="3 times in a row"):
            batch.step(actions)


def test_images_of_a_batch_stay_on_its_device(monkeypatch):
    """A tensor on "meta" has no values, so any way to the host raises."""

    class OnDevice(ToyRows):
        device = torch.device("meta")

        def render_images(self, rows):
            return super().render_images(rows).to("meta")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu_world, "open_batch", lambda spec, count, settlers: BatchWorld(OnDevice(count), ToySettlers())
    )
    world = dict(image_size=(3, 2), sim_backend="physx_cuda", auto_reset=True, max_episode_steps=3)
    # the policy on that device resizes, so pixels are not for the batch
    with envs.make_envs(MAIN, 2, pixels=Pixels((1, 1), "pil"), num_env_workers=2, **world) as vector:
        vector.reset()
        obs, _, _, _, infos = vector.step(np.zeros((2, 3, 7)))
        final = infos["final_observation"]["image"]
        assert obs["image"].is_meta and obs["image"].shape == (2, 2, 3, 3)
        assert final.is_meta and final.shape == (2, 2, 3, 3) and infos["ended"].tolist() == [0, 1]
    policy = load_policy("openvla-tiny").to("meta")
    inputs = policy.prepare(obs | {"task_description": ["put carrot on plate"] * 2})
    assert inputs.images.is_meta and inputs.images.shape == (2, *policy.image_size, 3)

"""The batch of envs on a GPU: its contract. These tests have a file of their own, and need a process of their own.

PhysX's GPU simulation must be the first one of its process, and other tests simulate on the CPU in theirs:

    python -m pytest -q -n0 -m gpu tests/envs/test_batch_on_a_gpu.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import envs as world
from envs.expert import Expert

NAME = "PutOnPlateInScene25"
MAIN = NAME + "Main-v3"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of the GPU can be run")


@pytest.mark.gpu
@needs_gpu
def test_the_contract_on_a_gpu():
    """Start states of the ids to 4 um, group members alike, partial reset, expert success, finite numbers."""
    ids = [5, 5, 183_316, 700_001]
    common = dict(image_size=(96, 96), sim_freq=100)
    with world.make_envs(MAIN, 4, num_env_workers=1, **common) as cpu:
        first = cpu.reset(ids)
        want = cpu.describe()
    with world.make_envs(MAIN, 4, sim_backend="physx_cuda", num_env_workers=2, **common) as envs:
        obs = envs.reset(ids)
        got = envs.describe()
        for ours, theirs in zip(got, want):
            assert ours["instruction"] == theirs["instruction"]
            np.testing.assert_allclose(ours["object_pose"], theirs["object_pose"], atol=4e-6)
            np.testing.assert_allclose(ours["tcp_pose"], theirs["tcp_pose"], atol=1e-5)
        assert (obs["image"].int() - first["image"].int()).abs().float().mean() < 3
        assert (obs["image"][0].int() - obs["image"][1].int()).abs().float().mean() < 0.1
        experts = [Expert() for _ in ids]
        success = np.zeros(4, bool)
        for _ in range(40):
            actions = np.stack([expert(state) for expert, state in zip(experts, envs.describe())])[:, None]
            success |= envs.step(actions)[2].numpy()
        assert success.all()
        before = envs.describe()[1]
        envs.reset([42], env_indices=[0])
        assert envs.describe()[0]["episode_id"] == 42
        np.testing.assert_allclose(envs.describe()[1]["qpos"], before["qpos"], atol=1e-4)
        again = envs.reset(ids)["image"]
        assert (again.int() - obs["image"].int()).abs().max() <= 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("short", ["MultiPlate-v1", "PositionChangeTo-v1", "VisionWhole05-v1"])
def test_random_episodes_on_a_gpu(short):
    random = np.random.RandomState(0)
    common = dict(obj_set="test", image_size=(48, 48), sim_freq=100, max_episode_steps=9, auto_reset=True)
    with world.make_envs(NAME + short, 16, sim_backend="physx_cuda", num_env_workers=4, **common) as envs:
        envs.reset()
        for _ in range(12):
            actions = random.randn(16, 4, 7) * [0.03, 0.03, 0.03, 0.2, 0.2, 0.2, 1]
            obs, rewards, _, _, infos = envs.step(actions)
            assert rewards.isfinite().all() and not infos["dropped"].any()
            assert (obs["image"].float().std(dim=(1, 2, 3)) > 0).all()

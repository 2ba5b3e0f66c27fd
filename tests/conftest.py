"""Where shared anchors are, and one thread per process: two ranks share two cores."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(HELPERS)]


@pytest.fixture(scope="session", autouse=True)
def warm_workers():
    """Worker processes of the simulator that a test starts in this process are forks of a warm one."""
    import warm

    from envs import workers
    from envs.gpu import start_states

    with pytest.MonkeyPatch.context() as patch:
        for module in (workers, start_states):
            patch.setattr(module, "subprocess", warm.AS_SUBPROCESS)
        yield


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Outputs of the published code on tiny models; not part of the repository."""
    if not (SHARED / "fixtures").is_dir():
        pytest.skip(f"no parity fixtures at {SHARED / 'fixtures'}")
    return SHARED / "fixtures"


def split_flags(flags: dict) -> dict[str, dict]:
    """Flat flags of a loss -> what it passes on to its two parts."""
    surrogate = {name: flags.pop(name) for name in ("logprob_level", "clip_ratio_low", "clip_ratio_high", "dual_clip")}
    regularizers = {name: flags.pop(name, 0.0) for name in ("ent_coef", "kl_coef", "fan_coef")}
    return {"surrogate": surrogate, "regularizers": regularizers}


def ppo_loss_of(new_logprobs, entropy, new_values, mb, total_weight, **flags):
    from train_ppo import ppo_loss
    from vla.models.policy import PolicyOutput

    return ppo_loss(PolicyOutput(new_logprobs, entropy, new_values), mb, total_weight, **split_flags(flags), **flags)


def grpo_loss_of(new_logprobs, entropy, mb, total_weight, **flags):
    from train_grpo import grpo_loss
    from vla.models.policy import PolicyOutput

    return grpo_loss(PolicyOutput(new_logprobs, entropy, None), mb, total_weight, **split_flags(flags))


def one_rank_environment() -> dict[str, str]:
    """For a script that is started without a launcher: what a test left in this process names no group to join."""
    places = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in places}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def observation(num: int, seed: int = 0) -> dict:
    """What an env of the tiny presets might return: prompts of three lengths."""
    import torch  # reads OMP_NUM_THREADS when it is imported

    generator = torch.Generator().manual_seed(seed)
    texts = ["put carrot on plate", "put fast food cup on gramophone disk", "put 7up can on plate"]
    images = torch.randint(0, 256, (num, 96, 96, 3), dtype=torch.uint8, generator=generator)
    return {"image": images, "task_description": [texts[i % 3] for i in range(num)]}


def busy_actions(num_envs: int, length: int, seed: int = 0) -> np.ndarray:
    """Actions float32 [num_envs, length, 7] that take the arm down to the table and about there."""
    random = np.random.RandomState(seed)
    actions = random.randn(num_envs, length, 7) * [0.015, 0.015, 0.01, 0.05, 0.05, 0.1, 1]
    actions[:, :5, 2] -= 0.025
    return actions.astype(np.float32)


def same(left, right) -> bool:
    """Bit equality of nested results."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def as_saved(state):
    """What a checkpoint gives back of env states."""
    from vla.files.trees import load_tree, save_tree

    with tempfile.TemporaryDirectory() as folder:
        save_tree(state, Path(folder) / "state.safetensors")
        return load_tree(Path(folder) / "state.safetensors")


def write_demos(folder: Path, recipe, actions: list[list], images: list[list]) -> None:
    """A set of made-up episodes: per episode T actions [7], wanted and executed alike, and T + 1 pictures [H, W, 3]."""
    from envs.demonstrations import DemoFolder, Demonstration
    from envs.registration import CONTROL_MODE

    made, episodes = DemoFolder(folder, recipe, {"control_mode": CONTROL_MODE}), []
    made.begin()
    for number, (steps, pictures) in enumerate(zip(actions, images)):
        demo = Demonstration(number, 100 + number, f"put {number}", success=True)
        demo.images, demo.actions, demo.expert_actions, demo.rewards = pictures, steps, steps, [0.0] * len(steps)
        episodes.append(demo)
    made.write_part(episodes)
    made.finish()

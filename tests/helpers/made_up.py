"""Made-up observations, actions and demonstrations."""

from pathlib import Path

import numpy as np
import torch


def observation(num: int, seed: int = 0) -> dict:
    """What an env of the tiny presets might return: prompts of three lengths."""
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

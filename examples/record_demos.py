"""Demonstrations of ManiSkill's PushCube-v1 by a scripted expert. Copy this file for another task.

    python -m examples.record_demos --output demos/pushcube
    deepspeed --num_gpus 2 train_sft.py --config yaml/sft_pushcube.yaml

ManiSkill's own RecordEpisode writes the files, so `python -m mani_skill.trajectory.replay_trajectory --traj_path
demos/pushcube/trajectory.h5` replays them. Only successes are kept. The expert is all that knows the task: for another
one, change ENV_ID and `expert`, and keep to states that training may use (`is_held_out` is for evaluation).
"""

import argparse
import itertools
import multiprocessing
from pathlib import Path

import gymnasium as gym
import mani_skill.envs  # noqa: F401  registers ManiSkill's ids
import numpy as np
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.trajectory.merge_trajectory import merge_trajectories
from mani_skill.utils.wrappers.record import RecordEpisode

from envs import is_held_out

ENV_ID = "PushCube-v1"
STEP = 0.05  # m, the longest step that the expert asks for. The controller allows 0.1
HOPELESS = 64  # tries of a process without a success, after which it gives up


def expert(env: BaseEnv) -> np.ndarray:
    """Go behind the cube and push it forward: the wanted motion of the tool in m along the robot's axes, float [3].

    It follows from the present state alone, so that a policy that sees one image can imitate it.
    """
    tool, cube = env.agent.tcp.pose.p[0].numpy(), env.obj.pose.p[0].numpy()
    behind = cube - [0.05, 0, 0]
    aside = tool[:2] - behind[:2]
    if abs(aside[1]) < 0.02 and aside[0] < 0.045 and tool[2] < 0.05:  # at the cube: push
        goal = np.array([tool[0] + STEP, cube[1], 0.02])
    else:  # come down while the place behind the cube comes nearer
        distance = np.linalg.norm(aside)
        goal = np.array([*behind[:2], 0.02 + np.clip(1.5 * (distance - 0.015), 0, 0.12)])
    motion = goal - tool
    return motion * min(1, STEP / max(np.linalg.norm(motion), 1e-9))


def record(part: int, parts: int, args: argparse.Namespace) -> None:
    """Record this process's share of the successes into part_<number>.h5. Every process has seeds of its own."""
    env = gym.make(
        ENV_ID,
        obs_mode="rgb",
        control_mode="pd_ee_delta_pose",
        sensor_configs={"width": args.image_size, "height": args.image_size},
        sim_backend="physx_cpu",
        render_backend="cpu",
        max_episode_steps=args.max_episode_steps,
    )
    names = dict(trajectory_name=f"part_{part}", source_type="scripted", source_desc=f"expert of {Path(__file__).name}")
    env = RecordEpisode(env, args.output, save_video=False, save_on_reset=False, clean_on_close=False, **names)
    wanted, kept, tried = len(range(part, args.num_demos, parts)), 0, 0
    for seed in itertools.count(part, parts):
        if kept == wanted:
            break
        if is_held_out(seed):
            continue
        env.reset(seed=seed)
        noise = np.random.default_rng(seed)
        success = truncated = False
        while not (success or truncated):
            motion = expert(env.unwrapped) + noise.normal(0, args.noise, 3)
            # the controller divides its bounds of 0.1 m into -1 to 1. No rotation, and a closed gripper
            action = np.array([*np.clip(motion / 0.1, -1, 1), 0, 0, 0, -1], np.float32)
            _, _, _, truncated, info = env.step(action)
            success = bool(info["success"])
        env.flush_trajectory(save=success)
        kept, tried = kept + success, tried + 1
        if not kept and tried == HOPELESS:
            raise RuntimeError(f"the expert failed in all of {tried} tries in {ENV_ID}: look at what `expert` returns")
        if success and kept % 50 == 0:
            print(f"process {part}: {kept} of {wanted} demonstrations, the expert succeeds in {kept / tried:.2f}")
    env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demos/pushcube", help="new folder for the demonstrations")
    parser.add_argument("--num_demos", type=int, default=500)
    parser.add_argument("--image_size", type=int, default=64, help="width and height of the images in pixels")
    parser.add_argument("--max_episode_steps", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation per axis of the motion, in m")
    parser.add_argument("--num_processes", type=int, default=2)
    args = parser.parse_args()
    output = Path(args.output)
    if (output / "trajectory.h5").exists():
        parser.error(f"{output} holds demonstrations already: name another folder")
    parts = range(args.num_processes)
    with multiprocessing.get_context("spawn").Pool(args.num_processes) as pool:
        pool.starmap(record, [(part, len(parts), args) for part in parts])
    files = [output / f"part_{part}.h5" for part in parts]
    merge_trajectories(str(output / "trajectory.h5"), files)
    for file in files:
        file.unlink()
        file.with_suffix(".json").unlink()
    print(f"{output}/trajectory.h5: {args.num_demos} demonstrations")


if __name__ == "__main__":
    main()

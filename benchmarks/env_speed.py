"""Where the time of an env step goes, and random episodes. The env figures of the docs come from here.

    python benchmarks/env_speed.py                        # the table, builtin pack
    python benchmarks/env_speed.py --asset_dir DIR        # also with the published meshes
    python benchmarks/env_speed.py --episodes 1000        # random episodes over all ids, with partial resets
    python benchmarks/env_speed.py --expert 32            # success of the scripted expert, per id and object set
    python benchmarks/env_speed.py --floor 48             # an env step of `make train`, and with the published solver
    python benchmarks/env_speed.py --image 96 96 --against ../other   # an image here and in another checkout, in turns

It prints medians of wall clock and CPU time (ms) in one process. CPU time is better on a shared machine. The
actions are recorded from the scripted expert, so that contacts are part of the work. The rows "reference-style" do the
same steps like RL4VLA's env, alternating in the same run (see benchmarks/reference_step.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.reference_step import ReferenceStyle
from envs import VARIANTS, eval_episode_ids, make_envs, num_start_states, variants
from envs.expert import Expert
from envs.gpu.start_states import settled_state
from envs.gym_env import build
from envs.put_on_plate import PutOnPlateInScene
from vla.models.about import known_flags
from vla.start.flag_files import read_yaml

MAIN = "PutOnPlateInScene25Main-v3"


class Clock:
    """Milliseconds of wall clock and CPU per call, by name."""

    def __init__(self):
        self.times: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name: str, function, *arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        self.times.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    def median(self, name: str) -> tuple[float, float]:
        return tuple(1e3 * np.median(self.times[name], axis=0))


def episode_ids(count: int) -> list[int]:
    """Ids spread over all 25 objects."""
    total = num_start_states(MAIN, "all")
    return [variants.train_episode_id(total, 0, 0, k) for k in range(count)]


def expert_actions(env: PutOnPlateInScene) -> list[torch.Tensor]:
    """Float32 [1, 7] each, from the env's start state until success."""
    expert, actions = Expert(), []
    while len(actions) < 80 and not env.success:
        action = expert(env.describe() | {"elapsed_steps": len(actions)})
        action[6] = 1 if action[6] > 0.5 else -1
        actions.append(torch.from_numpy(action[None]))
        env.advance(actions[-1])
    return actions


def measure_step(title: str, count: int, **kwargs) -> None:
    """Controller, physics, contacts and image of one env. The same by `BaseEnv.step` and reference-style, in turns."""
    fast, plain = (
        build(MAIN, obj_set="all", **kwargs),
        build(MAIN, obj_set="all", obs_mode="rgb+segmentation", **kwargs),
    )
    reference, clock = ReferenceStyle(MAIN, obj_set="all", **kwargs), Clock()
    for episode_id in episode_ids(count):
        start = variants.decode(MAIN, "all", episode_id)
        fast.start_episode(start)
        actions = expert_actions(fast)
        clock("reset, settled", fast.start_episode, start)
        plain.reset(options={"episode_id": episode_id})
        reference.start_episodes([0], [start], [settled_state(fast, start)])
        for action in actions:
            clock("step, no image", fast.advance, action)
            clock("  image", fast.render_image)
            clock("BaseEnv.step", plain.step, action)
            clock("reference-style", reference.step, action)
        fast.start_episode(start)
        reference.start_episodes([0], [start], [settled_state(fast, start)])
        fast.start_episode(start)
        for action in actions:
            clock("  controller", fast._command, action)
            clock("  physics", fast._substeps, fast._sim_steps_per_control)
            clock("  contacts, reward", fast._judge)
            clock("  control, physics", reference._step_action, action)
            clock("  evaluate", reference.evaluate)
            clock("  get_obs", reference.get_obs, {})
    print(f"\n{title}: {len(clock.times['BaseEnv.step'])} steps of {count} episodes")
    for name in (
        "step, no image",
        "  controller",
        "  physics",
        "  contacts, reward",
        "  image",
        "reset, settled",
        "BaseEnv.step",
        "reference-style",
        "  control, physics",
        "  evaluate",
        "  get_obs",
    ):
        print("  {:18} {:8.2f} ms wall {:8.2f} ms CPU".format(name, *clock.median(name)))
    seen = np.sum([clock.median("step, no image"), clock.median("  image")], axis=0)
    unseen = np.asarray(clock.median("step, no image"))
    for what, ours, theirs in (
        ("against BaseEnv.step", seen, np.asarray(clock.median("BaseEnv.step"))),
        ("against reference-style", seen, np.asarray(clock.median("reference-style"))),
        (
            "against it, no image",
            unseen,
            np.sum([clock.median("  control, physics"), clock.median("  evaluate")], axis=0),
        ),
    ):
        wall, cpu = ours / theirs
        print(f"  step {what}: {wall:.0%} of {theirs[0]:.1f} ms wall clock, {cpu:.0%} of {theirs[1]:.1f} ms CPU")
    for env in (fast, plain, reference):
        env.close()


def measure_throughput(num_envs: int, seconds: float, chunk_size: int = 1) -> None:
    """Control steps per second through `make_envs` at the quick start's settings, resets and images included."""
    settings = dict(image_size=(96, 96), sim_freq=100, auto_reset=True)
    with make_envs(MAIN, num_envs, **settings) as envs:
        envs.reset()
        experts = [Expert() for _ in range(num_envs)]
        steps, wall, cpu = 0, 0.0, 0.0
        renders, render = [], PutOnPlateInScene.render_image
        PutOnPlateInScene.render_image = lambda env: renders.append(1) or render(env)
        while wall < seconds:
            actions = np.stack([expert(state) for expert, state in zip(experts, envs.describe())])
            actions = np.repeat(actions[:, None], chunk_size, axis=1)
            actions[..., :6] /= chunk_size  # the same way in as many parts
            began, cpu_began = time.perf_counter(), time.process_time()
            valid = envs.step(actions)[4]["valid"]
            wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - cpu_began
            steps += int(valid.sum())
        PutOnPlateInScene.render_image = render
    print(
        f"{num_envs:3} envs, chunks of {chunk_size}: {steps / wall:6.0f} control steps/s wall, {steps / cpu:6.0f} per "
        f"CPU second, {len(renders) / steps:.2f} images per step"
    )


def measure_floor(count: int) -> None:
    """CPU time of an env step at the quickstart's settings, in turns with the published solver at the same rate.

    Both run the same `count` episodes, driven by the expert. An image is drawn at the start and after each chunk.
    """
    flags = read_yaml(Path(__file__).resolve().parent.parent / "yaml/quickstart_ppo_openvlaoft.yaml")
    env_id, chunk_size = flags["env_id"], known_flags(flags["model_path"]).flags["chunk_size"]
    settings = dict(image_size=tuple(flags["image_size"]), sim_freq=flags["sim_freq"])
    with mock.patch("envs.scene.FAST_SOLVER", {}):
        published = build(env_id, **settings)
    timed = {"published solver": (published, Clock()), "own solver": (build(env_id, **settings), Clock())}
    totals = {name: [] for name in timed}  # of each episode: CPU ms per step
    for episode_id in eval_episode_ids(env_id, "train", count):
        start = variants.decode(env_id, "train", episode_id)
        for name, (env, clock) in timed.items():
            totals[name].append(floor_episode(env, clock, start, chunk_size, flags["max_episode_steps"]))
    print(f"{env_id}, {count} episodes, chunks of {chunk_size}, {settings}: CPU ms, medians over calls")
    print("".join(f"{word:>20}" for word in ("", *timed)))
    for part in ("reset", "controller", "physics", "contacts, reward", "draw", "read back, overlay"):
        medians = (clock.median(part)[1] for _, clock in timed.values())
        print(f"{part:>20}" + "".join(f"{value:20.2f}" for value in medians))
    a_step = [float(np.median(values)) for values in totals.values()]
    print(f"{'a step, all in all':>20}" + "".join(f"{value:20.2f}" for value in a_step))
    print(f"{'env steps/s, a core':>20}" + "".join(f"{1e3 / value:20.0f}" for value in a_step))
    print(f"{a_step[0] / a_step[1]:.2f} times as many env steps")


def floor_episode(
    env: PutOnPlateInScene, clock: Clock, start: variants.StartState, chunk_size: int, max_steps: int
) -> float:
    """Run one episode like training. Returns CPU ms per step, resets and images included."""
    first = {name: len(times) for name, times in clock.times.items()}

    def draw() -> None:
        clock("draw", lambda: (env._show_stage(), env.scene.sub_scenes[0].update_render(), env._camera.take_picture()))
        clock("read back, overlay", env._composed_picture)

    clock("reset", env.start_episode, start)
    draw()
    expert, steps = Expert(), 0
    while steps < max_steps and not env.success:
        action = expert(env.describe() | {"elapsed_steps": steps})
        action[6] = 1 if action[6] > 0.5 else -1
        env._before_control_step()
        clock("controller", env._command, torch.from_numpy(action[None]))
        clock("physics", env._substeps, env._sim_steps_per_control)
        env._after_control_step()
        clock("contacts, reward", env._judge)
        steps += 1
        if steps % chunk_size == 0 or env.success:
            draw()
    spent = sum(cpu for name, times in clock.times.items() for _, cpu in times[first.get(name, 0) :])
    return 1e3 * spent / steps


def compare_images(size: tuple[int, int], checkouts: list[Path], asset_dir: str | None, rounds: int = 6) -> None:
    """CPU time of an image of each of the 25 objects in several checkouts, in turns, best of `rounds` bursts."""
    environment = os.environ | {"LP_NUM_THREADS": "0"}  # lavapipe draws in the process's one thread
    count = max(4, 2**19 // (size[0] * size[1]))
    command = [sys.executable, "-c", IMAGE_WORKER, *map(str, (*size, count)), *([asset_dir] if asset_dir else [])]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen(command, cwd=place, env=environment, **pipes) for place in checkouts]
    best = np.full((len(workers), 25), np.inf)
    for _ in range(rounds):
        for k in range(25):
            for i, worker in enumerate(workers):
                print(k, file=worker.stdin, flush=True)
                best[i, k] = min(best[i, k], float(worker.stdout.readline()))
    for place, worker, times in zip(checkouts, workers, best):
        worker.communicate()
        ratio = np.median(times / best[-1])
        print(f"{place}: {np.median(times):.3f} ms CPU, {ratio:.2f} of the last (medians over 25 objects, {size})")


# It runs in checkouts of any age, so it uses as little as possible. Arguments: width, height, images per burst, and
# perhaps the folder of the published meshes.
IMAGE_WORKER = """
import sys, time
sys.path.insert(0, "")
from envs import num_start_states, variants
from envs.gym_env import build
width, height, count = map(int, sys.argv[1:4])
pack = dict(asset_pack="bridge", asset_dir=sys.argv[4]) if sys.argv[4:] else {}
name = "PutOnPlateInScene25Main-v3"
env = build(name, obj_set="all", image_size=(width, height), sim_freq=100, **pack)
for line in sys.stdin:
    episode_id = variants.train_episode_id(num_start_states(name, "all"), 0, 0, int(line))
    env.start_episode(variants.decode(name, "all", episode_id))
    env.render_image()
    began = time.process_time()
    for _ in range(count):
        env.render_image()
    print(1e3 * (time.process_time() - began) / count, flush=True)
"""


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_episodes(count: int, asset_pack: str, asset_dir: str | None) -> None:
    """Three envs of every id in turn; each starts anew on its own, after 1 to 12 random steps. Checks all numbers."""
    random = np.random.RandomState(0)
    settings = dict(asset_pack=asset_pack, asset_dir=asset_dir, image_size=(48, 48), sim_freq=100)
    worlds = {env_id: [build(env_id, **settings) for _ in range(3)] for env_id in VARIANTS}
    left = {env: 0 for envs in worlds.values() for env in envs}
    done, memory, began = 0, [], time.perf_counter()
    while done < count:
        for env_id, envs in worlds.items():
            for env in envs:
                if left[env] == 0:
                    obj_set = variants.OBJ_SETS[random.randint(3)]
                    episode_id = random.randint(0, num_start_states(env_id, obj_set), dtype=np.int64)
                    env.start_episode(variants.decode(env_id, obj_set, int(episode_id)))
                    left[env], done = random.randint(1, 13), done + 1
                    if done % 50 == 0:
                        memory.append(resident_mib())
                action = random.randn(1, 7) * [0.03, 0.03, 0.03, 0.2, 0.2, 0.2, 1]
                action[:, 6] = np.sign(action[:, 6])
                reward, _ = env.advance(torch.from_numpy(action.astype(np.float32)))
                left[env] -= 1
                check_numbers(env, reward)
    half = memory[len(memory) // 2 :]
    print(
        f"{done} random episodes over {len(worlds)} ids, three object sets, pack {asset_pack}: no exception, no NaN; "
        f"memory {half[0]:.0f} MiB half-way, {half[-1]:.0f} MiB at the end ({half[-1] / half[0] - 1:+.1%}); "
        f"{time.perf_counter() - began:.0f} s"
    )


def expert_table(count: int, asset_pack: str, asset_dir: str | None) -> None:
    """Success of the expert over the first `count` training episodes of env 0 to count - 1, seed 0, at 500 Hz."""
    for env_id in VARIANTS:
        env = build(env_id, asset_pack=asset_pack, asset_dir=asset_dir, image_size=(16, 16))
        for obj_set in ("train", "test"):
            total, successes = num_start_states(env_id, obj_set), 0
            for k in range(count):
                start = variants.decode(env_id, obj_set, variants.train_episode_id(total, 0, k, 0))
                env.start_episode(start)
                successes += bool(expert_actions(env) and env.success)
            print(
                f"{env_id:40} {obj_set:5} {asset_pack:7} {successes:4} of {count} = {successes / count:.1%}", flush=True
            )
        env.close()


def check_numbers(env: PutOnPlateInScene, reward: float) -> None:
    state = env.describe()
    numbers = [*state["object_pose"], *state["receptacle_pose"], *state["tcp_pose"], *state["qpos"], reward]
    picture = env.render_image()
    if not np.isfinite(numbers).all() or picture.shape != (48, 48, 3) or picture.std() == 0:
        raise RuntimeError(f"{env.env_id} episode {state['episode_id']}: {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asset_dir", help="Folder of the published meshes, to measure them too.")
    parser.add_argument(
        "--episodes", type=int, default=0, help="Number of random episodes to run instead. (default: %(default)s)"
    )
    parser.add_argument(
        "--expert",
        type=int,
        default=0,
        help="Episodes per id and object set for the table of the expert. (default: %(default)s)",
    )
    parser.add_argument(
        "--floor", type=int, default=0, help="Episodes for the table of a quickstart's step. (default: %(default)s)"
    )
    parser.add_argument("--image", type=int, nargs=2, help="Width and height of an image to time instead.")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="Other checkouts, for --image.")
    parser.add_argument(
        "--seconds", type=float, default=10, help="Seconds per throughput measurement. (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    asset_pack = "bridge" if options.asset_dir else "builtin"
    if options.episodes or options.expert:
        run = random_episodes if options.episodes else expert_table
        run(options.episodes or options.expert, asset_pack, options.asset_dir)
        return
    if options.image:
        compare_images(
            tuple(options.image), [Path(__file__).resolve().parent.parent, *options.against], options.asset_dir
        )
        return
    if options.floor:
        measure_floor(options.floor)
        return
    print("quick start: builtin pack, 96 x 96, 100 Hz, one process")
    for num_envs, chunk_size in ((1, 1), (16, 1), (16, 8)):
        measure_throughput(num_envs, options.seconds, chunk_size)
    measure_step("builtin pack, 640 x 480, 500 Hz", 12)
    if options.asset_dir:
        published = dict(asset_pack="bridge", asset_dir=options.asset_dir)
        measure_step("published meshes, 640 x 480, 500 Hz", 12, **published)


if __name__ == "__main__":
    main()
